"""Memory of a worker whose app is large: what its children share with the master is counted once."""

from __future__ import annotations

from benchmarks import gauge
from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene
from benchmarks.sides import PREFORK


def memory(scene: Scene) -> Values:
    """Eight children, an app whose import makes 100 MB of objects; before and after many tasks."""
    count = scene.scale.pick(100_000, 20_000, 500) // scene.side.slow
    one = scene.calling("size", BENCH_HEAVY="1").result()
    worker = scene.warm(8, BENCH_HEAVY="1")
    before, done = gauge.pss_bytes(worker.family()), scene.count()
    scene.call("fill", count)
    scene.finished(worker, done + count)
    worker.settle()
    after = gauge.pss_bytes(worker.family())
    return {"one": one / 1e6, "before": before / one, "after": after / one, "whole": after / 1e6}


ROWS = (
    Row(
        "memory",
        memory,
        (
            Figure("before", "an app of 100 MB, 8 children: memory (PSS), of one process", "< 1.5", "x"),
            Figure("after", "the same, after many tasks", "< 1.5", "x"),
            Figure("whole", "the same", "", "MB"),
            Figure("one", "one process that has imported the app", "", "MB"),
        ),
        (PREFORK, PEERS),
        (2, 1, 1),
        compared=("after", "whole"),
    ),
)
