"""How soon an idle worker starts a task: from before the call of `enqueue` to the first line of the task."""

from __future__ import annotations

from functools import partial

from benchmarks.gauge import quantile
from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene
from benchmarks.sides import PREFORK


def latency(scene: Scene, gap_s: float, concurrency: int) -> Values:
    """A task every so often; its records are when it was sent, and when it began."""
    count = round(scene.scale.pick(8.0, 2.0, 0.2) / gap_s) + 5
    scene.warm(concurrency)
    scene.call("paced", count, gap_s)
    return delays(scene, count)


def delays(scene: Scene, count: int) -> Values:
    """Wait for so many records. -> median and 99th percentile in milliseconds, and the one by the other"""
    ms = [(began - sent) / 1e6 for records in scene.recorded(count).values() for sent, began in records]
    p50, p99 = quantile(ms, 0.5), quantile(ms, 0.99)
    return {"p50": p50, "p99": p99, "tail": p99 / p50}


def row(name: str, gap_s: float, concurrency: int, *others: str) -> Row:
    figures = (
        Figure("p50", f"start latency, {concurrency} children, tasks {gap_s * 1000:.0f} ms apart: median", "", "ms"),
        Figure("p50", "the same, of the best peer's", "<= 0.7", "x", "least"),
        Figure("p99", "99th percentile", "", "ms"),
        Figure("tail", "99th percentile, of the median", "< 2", "x"),
    )
    measure = partial(latency, gap_s=gap_s, concurrency=concurrency)
    return Row(name, measure, figures, (PREFORK, *others), compared=("p50", "p99"))


ROWS = (
    row("latency-20", 0.02, 2, PEERS),
    row("latency-200", 0.2, 2, PEERS),
    row("latency-100-children", 0.02, 100),
)
