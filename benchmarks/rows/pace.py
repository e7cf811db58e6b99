"""Whether children ever wait: tasks of 10 ms on eight of them, and long tasks mixed with short ones on two workers."""

from __future__ import annotations

from itertools import pairwise

from benchmarks import gauge
from benchmarks.gauge import quantile
from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene
from benchmarks.sides import PREFORK

CHILDREN = 8
UNKNOWN_NS = 100_000_000


def pace(scene: Scene) -> Values:
    """Tasks that sleep; each records when it began and ended."""
    count = scene.scale.pick(4000, 1600, 80)
    worker = scene.warm(CHILDREN)
    family = worker.family()
    master_s, worker_s = gauge.cpu_s([worker.pid]), gauge.cpu_s(family)
    scene.call("makespan", 0, 0, 0.01, count)
    scene.recorded(count)
    master_s, worker_s = gauge.cpu_s([worker.pid]) - master_s, gauge.cpu_s(family) - worker_s
    spans = [sorted(records) for records in scene.recorded(count).values()]
    begun, ended = min(records[0][0] for records in spans), max(records[-1][1] for records in spans)
    busy = sum(end - begin for records in spans for begin, end in records)
    gaps = [(later - end) / 1e6 for records in spans for (_, end), (later, _) in pairwise(records)]
    known_ns = begun + UNKNOWN_NS
    settled = [(later - end) / 1e6 for records in spans for (_, end), (later, _) in pairwise(records) if end > known_ns]
    return {
        "busy": busy / CHILDREN / (ended - begun) * 100,
        "nominal": count * 0.01e9 / CHILDREN / (ended - begun) * 100,
        "gap_p50": quantile(gaps, 0.5),
        "gap_p90": quantile(gaps, 0.9),
        "gap_p99": quantile(gaps, 0.99),
        "gap_max": max(gaps, default=0.0),
        "gap_settled": max(settled, default=0.0),
        "master_us": master_s / count * 1e6,
        "worker_us": worker_s / count * 1e6,
    }


def fairness(scene: Scene) -> Values:
    """As many long tasks as there are children, then short ones: who hoards finishes late."""
    long_s, shorts, short_s = scene.scale.pick(2.0, 2.0, 0.2), scene.scale.pick(200, 200, 40), 0.01
    for worker in [scene.worker(CHILDREN // 2) for _ in range(2)]:
        scene.call("fill", CHILDREN * 4)
        scene.finished(worker, 1)
        worker.settle()
    begun = scene.call("makespan", long_s, CHILDREN, short_s, shorts)
    ended = max(end for records in scene.recorded(CHILDREN + shorts).values() for _, end in records)
    took_s = (ended - begun) / 1e9
    return {"makespan": took_s, "of_ideal": took_s / (long_s + shorts * short_s / CHILDREN)}


ROWS = (
    Row(
        "pace",
        pace,
        (
            Figure("busy", "tasks of 10 ms on 8 children: of their time, children are in tasks", ">= 97", "%"),
            Figure("nominal", "of ideal, if a sleep of 10 ms took no longer", "", "%"),
            Figure("gap_p50", "a child between two tasks: median", "", "ms"),
            Figure("gap_p90", "90th percentile", "", "ms"),
            Figure("gap_p99", "99th percentile", "", "ms"),
            Figure("gap_max", "the longest", "<= 1", "ms"),
            Figure(
                "gap_settled",
                "the longest, once the worker knows how long they take (0.1 s)",
                "",
                "ms",
            ),
            Figure("master_us", "CPU of the master a task", "", "µs"),
            Figure("worker_us", "CPU of the worker a task", "", "µs"),
        ),
    ),
    Row(
        "fairness",
        fairness,
        (
            Figure("of_ideal", "8 tasks of 2 s, then 200 of 10 ms, 2 workers: makespan, of ideal", "<= 1.05", "x"),
            Figure("makespan", "the same", "", "s"),
        ),
        (PREFORK, PEERS),
        compared=("makespan",),
    ),
)
