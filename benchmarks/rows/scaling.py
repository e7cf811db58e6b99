"""From 2 children to 200: no-op tasks a second, and what the master takes for each."""

from __future__ import annotations

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.rows.throughput import Drain
from benchmarks.scene import Scene

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
        before = scene.count()
        scene.cli("resume", "default")
        drained = Drain(scene, worker, before).last(count)
        values |= {f"rate_{size}": drained["rate"], f"master_{size}": drained["master_us"]}
        best = max(best, drained["rate"])
        worst = min(worst, drained["rate"] / best)
        scene.clear()
    cost = [value for key, value in values.items() if key.startswith("master_")]
    return values | {"worst": worst, "uneven": max(cost) / (min(cost) or 1)}


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
