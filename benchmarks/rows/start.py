"""How long it takes until a worker runs its first task, until it has ended, and until `prefork queues` has answered."""

from __future__ import annotations

import signal
import statistics
import subprocess
import time

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.scene import Scene


def start(scene: Scene) -> Values:
    """Again and again; medians. The first time, which writes the bytecode, is left out."""
    taken: dict[str, list[float]] = {"import": [], "first": [], "stop": [], "queues": []}
    for number in range(1, scene.scale.pick(9, 5, 1) + 2):
        taken["import"].append(own_import(scene))
        scene.call("send", "stamp", [(0,)])
        worker = scene.worker(2)
        began = max(began for records in scene.recorded(number).values() for _, began in records)
        taken["first"].append((began - worker.begun_ns) / 1e6)
        worker.settle()
        begun = time.perf_counter()
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(30)
        taken["stop"].append((time.perf_counter() - begun) * 1000)
        taken["queues"].append(scene.cli("queues") * 1000)
    values = {name: statistics.median(ms[1:]) for name, ms in taken.items()}
    return values | {"over": values["first"] - values["import"]}


def own_import(scene: Scene) -> float:
    """Milliseconds that Python takes to start and import what the app has besides prefork."""
    begun = time.perf_counter()
    subprocess.run([str(scene.side.python), "-c", "import work"], env=scene.env, cwd=scene.folder, check=True)
    return (time.perf_counter() - begun) * 1000


ROWS = (
    Row(
        "start",
        start,
        (
            Figure("over", "from the command to the first task, over the app's own import", "< 150", "ms"),
            Figure("first", "the same, with it", "", "ms"),
            Figure("queues", "`prefork queues`", "< 150", "ms"),
            Figure("stop", "SIGTERM to the exit of an idle worker", "< 100", "ms"),
        ),
    ),
)
