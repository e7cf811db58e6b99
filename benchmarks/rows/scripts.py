"""How long a script holds the server up at most, at the largest sizes (SLOWLOG)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gauge import RUN_SCRIPTS
from benchmarks.rows.row import Figure, Row, Values
from benchmarks.scene import Scene

LATEST_US = 100  # what is quicker is not looked at


def scripts(scene: Scene) -> Values:
    """Each kind of work in turn: -> milliseconds of the slowest script in each"""
    with contextlib.suppress(PermissionError):  # what is measured is the script, not who else wants the CPU
        os.sched_setscheduler(scene.server.pid, os.SCHED_FIFO, os.sched_param(1))
    scene.redis.config_set("slowlog-log-slower-than", LATEST_US)
    scene.redis.config_set("slowlog-max-len", 100_000)
    many, due = scene.scale.pick(1_000_000, 100_000, 2000), scene.scale.pick(100_000, 20_000, 200)
    large = scene.scale.pick(5000, 2000, 100)

    def run() -> None:
        before = scene.count()
        scene.call("later", due, 0.001)
        time.sleep(0.01)
        scene.finished(scene.worker(200 if many > 2000 else 2), before + many // 4)

    def look() -> None:
        scene.cli("queues")
        scene.cli("doctor", status=1)
        scene.cli("purge", "default", "--yes")

    work: dict[str, Callable[[], object]] = {
        "enqueue": lambda: scene.call("fill", many),
        "large": lambda: scene.call("bulky", large, 2000),
        "run": run,
        "look": look,
    }
    values = {}
    for name, do in work.items():
        scene.redis.slowlog_reset()
        do()
        values[name] = slowest_ms(scene)
    return values | {"worst": max(values.values())}


def slowest_ms(scene: Scene) -> float:
    """Of all scripts that were logged."""
    entries: list[Any] = scene.redis.slowlog_get(100_000)
    named = {name.upper().encode() for name in RUN_SCRIPTS}
    return (
        max((entry["duration"] for entry in entries if entry["command"].split()[0].upper() in named), default=0) / 1000
    )


ROWS = (
    Row(
        "scripts",
        scripts,
        (
            Figure("worst", "the slowest script, at the largest sizes", "<= 2", "ms"),
            Figure("enqueue", "to enqueue, in bulk", "", "ms"),
            Figure("large", "to enqueue arguments of 2 KB, in bulk", "", "ms"),
            Figure("run", "to claim, settle, promote what is due; 200 children", "", "ms"),
            Figure("look", "to look, and to purge", "", "ms"),
        ),
    ),
)
