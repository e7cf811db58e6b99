"""What it takes to enqueue: time, memory of the producer, memory of the server."""

from __future__ import annotations

from typing import Any

from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene
from benchmarks.sides import PREFORK


def used_memory(scene: Scene) -> int:
    memory: Any = scene.redis.info("memory")
    return int(memory["used_memory"])


def enqueue(scene: Scene) -> Values:
    """One producer; nobody works."""
    slow = min(scene.side.slow, 10)
    one, many = scene.scale.pick(10_000, 3000, 100) // slow, scene.scale.pick(100_000, 40_000, 600) // slow
    scene.call("fill", 10)  # what the first task brings along is no part of the others
    before = used_memory(scene)
    scene.call("fill", many)
    values = {"bytes": (used_memory(scene) - before) / many, "one": one / scene.call("one_by_one", one)}
    if seconds := scene.call("in_bulk", many):
        values["bulk"] = many / seconds
    return values


def growth(scene: Scene) -> Values:
    """The memory that `enqueue_many` takes for a long iterable."""
    count = scene.scale.pick(1_000_000, 200_000, 2000)
    grown = scene.call("growth", count)
    mb = 1e6 * count / 1_000_000  # as for a million
    return {"grown": grown["grown"] / mb, "beyond": (grown["grown"] - grown["ids"]) / mb}


ROWS = (
    Row(
        "enqueue",
        enqueue,
        (
            Figure("one", "enqueue one by one", "", "/s"),
            Figure("one", "the same, of the fastest peer's", "> 1", "x", "most"),
            Figure("bulk", "enqueue_many", "", "/s"),
            Figure("bulk", "the same, of ardiq's", ">= 2", "x", "ardiq"),
            Figure("bytes", "bytes in the server for a waiting task", "<= 250"),
        ),
        (PREFORK, PEERS),
        compared=("one", "bulk", "bytes"),
    ),
    Row(
        "enqueue-memory",
        growth,
        (
            Figure("grown", "growth of a producer by enqueue_many, for a million", "", "MB"),
            Figure("beyond", "the same, without the ids", "<= 32", "MB"),
        ),
        rounds=(2, 1, 1),
    ),
)
