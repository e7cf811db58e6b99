"""A worker that is full, beside many producers. What it loses is told in its own rate without them."""

from __future__ import annotations

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.rows.throughput import Drain
from benchmarks.scene import Scene, until

CONNECTIONS = 50
PACE = 2000.0  # tasks a second of all producers: work for the server and the worker, without taking the CPUs away
LONG_S = 300.0


def producers(scene: Scene) -> Values:
    """Alone, beside producers that go about their work, beside producers that do nothing else."""
    alone = rate(scene, None)
    return {
        "alone": alone,
        "paced": rate(scene, PACE) / alone,
        "flat_out": rate(scene, 0.0) / alone,
    }


def rate(scene: Scene, per_s: float | None) -> float:
    """No-ops that a worker runs in a second, beside producers that enqueue so many."""
    count = scene.scale.pick(200_000, 50_000, 1000)
    worker = scene.warm(2)
    scene.cli("pause", "default")
    scene.call("fill", count)
    before, idle = scene.count(), scene.connections()
    crowd = None if per_s is None else scene.calling("crowd", CONNECTIONS, per_s, LONG_S)
    try:
        if crowd:
            until(lambda: scene.connections() >= idle + CONNECTIONS, "all producers are connected")
        scene.cli("resume", "default")
        return Drain(scene, worker, before).last(count)["rate"]
    finally:
        if crowd:
            crowd.kill()
        scene.clear()


ROWS = (
    Row(
        "producers",
        producers,
        (
            Figure("paced", "50 connections enqueue 2,000 tasks/s: rate of a full worker, of its own", ">= 0.8", "x"),
            Figure("flat_out", "the same, as fast as they can: they take CPUs away, too", "", "x"),
            Figure("alone", "without", "", "/s"),
        ),
    ),
)
