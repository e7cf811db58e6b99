"""No-ops that keep their results, as is the default, until they are settled: one that is not runs again if its master
is killed."""

from __future__ import annotations

import time

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.scene import Scene

CHILDREN = 8
MESSAGES = "prefork:{default}:m"


def kept(scene: Scene) -> Values:
    """-> the rate at which they are settled, and the most that had run at once without being settled"""
    count = scene.scale.pick(200_000, 100_000, 2_000)
    scene.call("fill_kept", count)
    worker, most = scene.worker(CHILDREN), 0
    scene.finished(worker, 1, 0.001)
    begun_s, settled_before = time.perf_counter(), count - scene.redis.hlen(MESSAGES)
    settled = settled_before
    while settled < count:
        ran = scene.count()
        settled = count - scene.redis.hlen(MESSAGES)
        most = max(most, ran - settled)
        worker.look()
        time.sleep(0.01)
    return {"rate": (count - settled_before) / (time.perf_counter() - begun_s), "unsettled": most}


ROWS = (
    Row(
        "kept",
        kept,
        (
            Figure("rate", f"no-op tasks/s that keep their results, {CHILDREN} children, until settled", "", "/s"),
            Figure("unsettled", "the most that had run and were not settled yet", "<= 2000"),
        ),
    ),
)
