"""What a long queue costs: throughput and latency with a million of tasks waiting, or scheduled for tomorrow."""

from __future__ import annotations

from benchmarks.rows.latency import delays
from benchmarks.rows.row import Figure, Row, Values
from benchmarks.rows.throughput import Drain
from benchmarks.scene import Scene

PROBES, GAP_S = 60, 0.02
REST_S = 0.01
DAY_S = 86_400


def backlog(scene: Scene) -> Values:
    """The same work with nothing behind it, with many tasks behind it, and beside many that are scheduled."""
    many, some = scene.scale.pick(1_000_000, 100_000, 3000), scene.scale.pick(100_000, 30_000, 500)
    none = variant(scene, some, some)
    waiting = variant(scene, some, many)
    scene.call("later", many, DAY_S)
    scheduled = variant(scene, some, some)
    return {
        "waiting_rate": waiting["rate"] / none["rate"],
        "scheduled_rate": scheduled["rate"] / none["rate"],
        "waiting_latency": none["p50"] / waiting["p50"],
        "scheduled_latency": none["p50"] / scheduled["p50"],
        **{f"{name}_{key}": values[key] for name, values in (("waiting", waiting), ("scheduled", scheduled))
           for key in ("queues", "doctor")},
    }  # fmt: skip


def variant(scene: Scene, some: int, in_line: int) -> Values:
    """So many no-ops wait, and before them what keeps two children busy while tasks of high priority come in.

    -> the latency of those, the rate of `some` no-ops after that, and what it takes to look at the queue before
    """
    rests = scene.scale.pick(600, 600, 100)
    scene.call("send", "rest", [(REST_S,)] * rests)
    scene.call("fill", in_line)
    values = {"queues": scene.cli("queues") * 1000, "doctor": scene.cli("doctor", status=1) * 1000}
    before, worker = scene.count(), scene.worker(2)
    scene.call("urgent", PROBES, GAP_S)
    values |= delays(scene, PROBES)
    values["rate"] = Drain(scene, worker, before).last(some)["rate"]
    scene.clear()
    return values


ROWS = (
    Row(
        "backlog",
        backlog,
        (
            Figure("waiting_rate", "many tasks waiting: throughput, of that without", ">= 0.9", "x"),
            Figure("waiting_latency", "latency ahead of them: of that without, inverse", ">= 0.9", "x"),
            Figure("scheduled_rate", "many tasks scheduled: throughput, of that without", ">= 0.9", "x"),
            Figure("scheduled_latency", "latency beside them: of that without, inverse", ">= 0.9", "x"),
            Figure("waiting_queues", "`prefork queues`, many waiting", "< 150", "ms"),
            Figure("waiting_doctor", "`prefork doctor`, many waiting", "", "ms"),
            Figure("scheduled_queues", "`prefork queues`, many scheduled", "< 150", "ms"),
            Figure("scheduled_doctor", "`prefork doctor`, many scheduled", "", "ms"),
        ),
        rounds=(3, 1, 1),
    ),
)
