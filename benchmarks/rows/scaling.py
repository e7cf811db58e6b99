"""From 2 children to 200: no-op tasks a second, and what the master takes for each."""

from __future__ import annotations

import time

from benchmarks import gauge
from benchmarks.rows.row import Figure, Row, Values
from benchmarks.scene import Scene, Worker

SIZES = 2, 8, 32, 100, 200


def scaling(scene: Scene) -> Values:
    """Each size in turn; all children are up before the first task is let go."""
    count = scene.scale.pick(200_000, 40_000, 1000)
    values: Values = {}
    best, worst = 0.0, 1.0
    for size in SIZES if scene.scale.pick(1, 1, 0) else SIZES[:2]:
        worker = scene.warm(size)
        scene.cli("pause", "default")
        scene.call("fill", count)
        rate, values[f"master_{size}"] = drained(scene, worker, count)
        values[f"rate_{size}"] = rate
        best = max(best, rate)
        worst = min(worst, rate / best)
        scene.clear()
    cost = [value for key, value in values.items() if key.startswith("master_")]
    return values | {"worst": worst, "uneven": max(cost) / (min(cost) or 1)}


def drained(scene: Scene, worker: Worker, count: int) -> tuple[float, float]:
    """Let what waits be worked off. -> tasks a second, and the master's CPU for each in microseconds.

    The children's CPU is not looked at: to read that of 200 would take a part of the time that is measured.
    """
    before, master_s = scene.count(), gauge.cpu_s([worker.pid])
    scene.cli("resume", "default")
    scene.finished(worker, before + 1, 0.001)
    begun_s, done = time.perf_counter(), scene.count() - before
    scene.finished(worker, before + count)
    rate = (count - done) / (time.perf_counter() - begun_s)
    return rate, (gauge.cpu_s([worker.pid]) - master_s) / count * 1e6


ROWS = (
    Row(
        "scaling",
        scaling,
        (
            Figure("worst", "2 to 200 children: least throughput, of the best with fewer children", ">= 0.85", "x"),
            Figure("uneven", "CPU of the master a task: greatest, of the least", "<= 1.3", "x"),
            *(Figure(f"rate_{size}", f"{size} children", "", "/s") for size in SIZES),
            *(Figure(f"master_{size}", f"CPU of the master a task, {size} children", "", "µs") for size in SIZES),
        ),
    ),
)
