"""The fleet: the masters under torture, and who starts them again, at once, as a supervisor does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from prefork.torture.app import LEDGER, MAX_CRASHES, MAX_TAKEOVERS, QUEUES
from prefork.torture.ledger import now_us
from prefork.torture.server import die_with_parent

LEASE_S = 2.0
SHUTDOWN_S = 1.5
LOST = b"lost the lease: "
PID = re.compile(rb'"pid":([0-9]+)')
CONF = """[prefork]
app = prefork.torture.app:app
broker = {broker}
prefix = {prefix}
queues = {queues}
concurrency = {concurrency}
lease = {lease:g}s
shutdown_timeout = {shutdown:g}
max_crashes = {crashes}
max_takeovers = {takeovers}
dead_max = 1000000000
log_format = json
{more}"""
# Each worker is another one: by strict order, by weights; with children that are replaced now and then.
QUEUES_OF = (", ".join(QUEUES), f"{QUEUES[1]}:2, {QUEUES[0]}:1")
MORE_OF = ("max_tasks_per_child = 3000\n", "")


@dataclass(slots=True)
class Life:
    """One process of a master, from its start to its end. `told`: the signals that may have ended it."""

    pid: int
    began_us: int
    ended_us: int = 0
    code: int = 0
    told: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Worker:
    """One master's place: its configuration, its log, the processes that were it, the last one last."""

    number: int
    conf: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False
    began_at: int = 0  # where in the log its present process begins
    heard: int = 0  # how far its log was read for lost leases
    lives: list[Life] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Of its present process."""
        return self.lives[-1].pid

    def children(self) -> list[int]:
        """The pids of its living children, and not of others that it starts."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.pid).children()
            return [p.pid for p in found if _is_child(p)]
        return []


def _is_child(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return bool(process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == process.pid)
    return False


class Fleet:
    """Starts the masters, and keeps them up."""

    def __init__(self, folder: Path, broker: str, prefix: str, workers: int, children: int) -> None:
        self._folder, self._going = folder, True
        self.fences: list[tuple[int, int]] = []  # (pid, when) of each lease that a worker says it has lost
        self.workers = []
        for n in range(workers):
            conf = folder / f"worker-{n}.conf"
            conf.touch(mode=0o600)  # the URL may hold a password
            conf.write_text(CONF.format(
                broker=broker, prefix=prefix, queues=QUEUES_OF[n % 2], concurrency=children, lease=LEASE_S,
                shutdown=SHUTDOWN_S, crashes=MAX_CRASHES, takeovers=MAX_TAKEOVERS, more=MORE_OF[n % 2],
            ))  # fmt: skip
            self.workers.append(Worker(n, conf, folder / f"worker-{n}.log"))
            self.workers[-1].log.touch()

    def mind(self) -> None:
        """Take notice of masters that have ended, and start them again."""
        for worker in self.workers:
            if worker.process and (code := worker.process.poll()) is not None:
                worker.lives[-1].ended_us, worker.lives[-1].code = now_us(), code
                worker.process = None
            if worker.process is None and self._going:
                self._start(worker)
            self._listen(worker)

    def _listen(self, worker: Worker) -> None:
        with worker.log.open("rb") as log:
            log.seek(worker.heard)
            new = log.read()
        new = new[: new.rfind(b"\n") + 1]
        worker.heard += len(new)
        if LOST in new:
            for line in new.splitlines():
                if LOST in line and (who := PID.search(line)):
                    self.fences.append((int(who[1]), now_us()))

    def _start(self, worker: Worker) -> None:
        environment = {**os.environ, LEDGER: str(self._folder / "ledger"), "TMPDIR": str(self._folder)}
        command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(worker.conf)]
        with worker.log.open("ab") as log:
            worker.began_at = log.tell()
            worker.process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        worker.stopped = False
        worker.lives.append(Life(worker.process.pid, now_us()))

    def signal(self, worker: Worker, number: int) -> bool:
        """Send a master a signal. -> whether it is there"""
        if worker.process is None or worker.process.poll() is not None:
            return False
        worker.lives[-1].told.add(number)
        worker.process.send_signal(number)
        worker.stopped = number == signal.SIGSTOP or (worker.stopped and number != signal.SIGCONT)
        return True

    def is_ready(self, worker: Worker) -> bool:
        """Whether its present process has said so: before that, a signal might only end it."""
        return self._last_word(worker, " is ready: ") != ""

    def resume(self, worker: Worker) -> None:
        """Send USR2 to one that is paused by it; one that was replaced meanwhile is not paused any more."""
        if self._last_word(worker, " is ready: ", "USR2: paused", "USR2: claiming") == "USR2: paused":
            self.signal(worker, signal.SIGUSR2)

    def _last_word(self, worker: Worker, *words: str) -> str:
        """Which of these words the present process has logged last; "" if none."""
        who = f'"pid":{worker.pid},'
        with contextlib.suppress(OSError):
            text = worker.log.read_bytes()[worker.began_at :].decode("utf-8", "replace")
            for line in reversed(text.splitlines()):
                if who in line and (said := next((word for word in words if word in line), "")):
                    return said
        return ""

    def wait_ready(self, limit_s: float) -> bool:
        """Wait until all are up. -> whether they are"""
        until_s = time.monotonic() + limit_s
        while not all(self.is_ready(worker) for worker in self.workers):
            self.mind()
            if time.monotonic() > until_s:
                return False
            time.sleep(0.02)
        return True

    def stop(self, limit_s: float) -> None:
        """Let all end by TERM; what has not within the limit is killed, and stands in the account by its code."""
        self._going = False
        for worker in self.workers:
            self.signal(worker, signal.SIGCONT)
            self.signal(worker, signal.SIGTERM)
        until_s = time.monotonic() + limit_s
        while any(worker.process for worker in self.workers) and time.monotonic() < until_s:
            self.mind()
            time.sleep(0.01)
        self.close()

    def close(self) -> None:
        """Leave no process behind; the kernel, or the end of their pipes, ends the children."""
        self._going = False
        for worker in self.workers:
            if worker.process and worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
            self.mind()
