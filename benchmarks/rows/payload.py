"""Large arguments: megabytes a second through a queue, enqueue and all, beside what the server and a client can do."""

from __future__ import annotations

import time

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.rows.throughput import Drain
from benchmarks.scene import Scene

SIZES = {"10kb": 10_000, "100kb": 100_000, "1mb": 1_000_000}


def payload(scene: Scene) -> Values:
    """Each size in turn: a producer enqueues one by one, then a worker runs them."""
    values: Values = {}
    megabytes = scene.scale.pick(80, 30, 2)
    for name, size in SIZES.items():
        count = megabytes * 1_000_000 // size
        plain_s = plain(scene, count, size)
        enqueue_s = scene.call("payloads", count, size)
        before, worker = scene.count(), scene.worker(2)
        ours_s = enqueue_s + count / Drain(scene, worker, before).last(count)["rate"]
        values |= {f"{name}_rate": megabytes / ours_s, f"{name}_of_plain": plain_s / ours_s}
        scene.clear()
    return values


def plain(scene: Scene, count: int, size: int) -> float:
    """The same bytes through a list of the server, by the same client. -> the seconds that took"""
    text = b"x" * size
    begun = time.perf_counter()
    for _ in range(count):
        scene.redis.lpush("plain", text)
    for _ in range(count):
        scene.redis.lpop("plain")
    return time.perf_counter() - begun


def figures(name: str) -> tuple[Figure, ...]:
    said = name.upper().replace("KB", " KB").replace("MB", " MB")
    return (
        Figure(f"{name}_of_plain", f"arguments of {said}: of plain LPUSH and LPOP", ">= 0.5", "x"),
        Figure(f"{name}_rate", "the same", "", "MB/s"),
    )


ROWS = (Row("payload", payload, tuple(figure for name in SIZES for figure in figures(name))),)
