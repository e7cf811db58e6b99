"""The faults: which, when and where is drawn from the seed alone, so that the same seed brings the same ones in the
same order; what they meet is not the same, of course.

1. `plan` draws: a pause, a fault, which worker, which of its children, for how long.
2. `Faults.begin` does it, and keeps what undoes it; `Faults.turn` undoes it when its time is over.
3. Each stands in `Faults.done` with its time, for the account. What met nobody is `missed`.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefork.broker import verbs
from prefork.broker.keys import Keys
from prefork.broker.wire import TROUBLE, Unreached, Wire
from prefork.torture import server as private
from prefork.torture.app import QUEUES
from prefork.torture.fleet import LEASE_S, Fleet, Worker
from prefork.torture.ledger import NEVER, now_us
from prefork.torture.server import Server

AGAIN_S = 0.5  # until a fault that could not be undone is tried again
SNAPSHOT_LIMIT_S = 3.0
LEAP_AHEAD_S, LONGEST_LEAP_BACK_S = 3600.0, 3.0
# To all that stands in the keys, a leap of the server's clock is that all times in them have moved the other way.
LEAP = """
for _, key in ipairs(KEYS) do
  local found = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #found, 2 do redis.call('ZINCRBY', key, ARGV[1], found[i]) end
end
"""
MANY_CLIENTS, FEW_CLIENTS = 10_000, 1
TERM, INT, QUIT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP
Undo = Callable[[], None]

# name -> (weight, least and most seconds until it is undone, whether it is the server's)
KINDS: dict[str, tuple[int, float, float, bool]] = {
    "child killed": (16, 0, 0, False),
    "child stopped": (6, 0.1, 3, False),
    "master killed": (8, 0, 0, False),
    "master stopped": (5, 0.05, 0.5 * LEASE_S, False),
    "master stopped beyond its lease": (4, 1.2 * LEASE_S, 2.2 * LEASE_S, False),
    "master told TERM": (5, 0, 0, False),
    "master told INT": (1, 0, 0, False),
    "master told QUIT": (2, 0, 0, False),
    "master told HUP": (3, 0, 0, False),
    "master told USR1": (1, 0, 0, False),
    "master told USR2, twice": (3, 0.3, 3, False),
    "master told TTIN and TTOU": (3, 0.2, 3, False),
    "connections cut": (8, 0, 0, False),
    "queue paused": (4, 0.2, 3, False),
    "server killed": (5, 0, 1, True),
    "server restarted": (2, 0, 1, True),
    "server stopped": (5, 0.1, 1.6 * LEASE_S, True),
    "scripts forgotten": (4, 0, 0, True),
    "clock leapt": (3, 0, LONGEST_LEAP_BACK_S, True),
    "snapshot failed": (3, 0.2, 2.5, True),
    "memory full": (4, 0.2, 2.5, True),
    "no more clients": (2, 0.2, 1.5, True),
}


def void(_: object) -> None:
    """Drop what an undoing says."""


class Missed(Exception):
    """There is nothing here that this fault could meet."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One fault as it was drawn. `which`: 0 to 1, which child, queue or way."""

    pause_s: float
    name: str
    worker: int
    which: float
    seconds: float


@dataclass(slots=True)
class Done:
    """One fault as it was done. `pid`: of the process that it met; 0 for the server's."""

    name: str
    pid: int
    begin_us: int
    end_us: int = NEVER


def plan(seed: str, workers: int, pause_s: float, *, server: bool) -> Iterator[Draw]:
    """The faults of a seed, without end; `pause_s`: the mean between two. `server`: also those of the server."""
    draw = random.Random(f"{seed}/faults")
    names = [name for name, (_, _, _, servers) in KINDS.items() if server or not servers]
    weights = [KINDS[name][0] for name in names]
    while True:
        (name,) = draw.choices(names, weights)
        _, least, most, _ = KINDS[name]
        yield Draw(
            draw.uniform(0.2, 1.8) * pause_s, name, draw.randrange(workers), draw.random(), draw.uniform(least, most)
        )


class Faults:
    """Does them. `wire`: the torture's own connection; `server`: None for a broker that is somebody else's."""

    def __init__(self, fleet: Fleet, wire: Wire, server: Server | None, folder: Path, prefix: str) -> None:
        self._fleet, self._wire, self._server, self._folder = fleet, wire, server, folder
        self._keys = [Keys(prefix, queue) for queue in QUEUES]
        self._undo: list[tuple[float, int, Undo, Done]] = []
        self.done: list[Done] = []
        self.missed = 0

    def begin(self, draw: Draw) -> None:
        """Do one."""
        done = Done(draw.name, 0, now_us())
        try:
            undo = self._do(draw, done)
        except (Missed, *TROUBLE):
            self.missed += 1
            return
        self.done.append(done)
        if undo is None:
            done.end_us = now_us()
        else:
            heapq.heappush(self._undo, (time.monotonic() + draw.seconds, len(self.done), undo, done))

    def turn(self, *, all_: bool = False) -> bool:
        """Undo those whose time is over, or all. -> whether none is left"""
        while self._undo and (all_ or self._undo[0][0] <= time.monotonic()):
            due_s, number, undo, done = heapq.heappop(self._undo)
            try:
                undo()
                done.end_us = now_us()
            except TROUBLE:
                heapq.heappush(self._undo, (max(due_s, time.monotonic()) + AGAIN_S, number, undo, done))
                if all_:
                    break
        return not self._undo

    # -- each of them -------------------------------------------------------------------------------------------

    def _do(self, draw: Draw, done: Done) -> Undo | None:
        kind, _, rest = draw.name.partition(" ")
        worker = self._fleet.workers[draw.worker]
        if kind == "child":
            return self._to_child(worker, draw, done)
        if kind == "master":
            return self._to_master(worker, rest, draw, done)
        if kind == "queue":
            return self._pause(self._keys[int(draw.which * len(self._keys))])
        if draw.name == "connections cut":
            self._cut()
            return None
        if self._server is None or not self._server.up:
            raise Missed
        if kind == "server":
            return self._to_server(self._server, rest)
        if draw.name == "clock leapt":
            self._leap(LEAP_AHEAD_S if draw.which < 0.5 else -draw.seconds)
            return None
        return {
            "scripts forgotten": self._forget_scripts, "snapshot failed": self._fail_snapshot,
            "memory full": self._fill_memory, "no more clients": self._refuse_clients,
        }[draw.name]()  # fmt: skip

    def _to_child(self, worker: Worker, draw: Draw, done: Done) -> Undo | None:
        children = worker.children() if worker.process else []
        if not children:
            raise Missed
        done.pid = pid = children[int(draw.which * len(children))]
        if draw.name == "child killed":
            os.kill(pid, signal.SIGKILL)
            return None
        os.kill(pid, signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        return go_on

    def _to_master(self, worker: Worker, what: str, draw: Draw, done: Done) -> Undo | None:
        if worker.process is None or worker.process.poll() is not None:
            raise Missed
        done.pid = pid = worker.pid
        if what == "killed":
            self._send(worker, signal.SIGKILL)
            return None
        if not self._fleet.is_ready(worker):
            raise Missed
        if what.startswith("stopped"):
            if worker.stopped:
                raise Missed
            self._send(worker, signal.SIGSTOP)
            return lambda: self._undo_for(worker, pid, lambda: self._send(worker, signal.SIGCONT))
        told = what.split()[1].rstrip(",")
        if told == "USR2":
            self._send(worker, signal.SIGUSR2)
            return lambda: self._undo_for(worker, pid, lambda: self._fleet.resume(worker))
        if told == "TTIN":
            more, fewer = (signal.SIGTTIN, signal.SIGTTOU) if draw.which < 0.5 else (signal.SIGTTOU, signal.SIGTTIN)
            self._send(worker, more)
            return lambda: self._undo_for(worker, pid, lambda: self._send(worker, fewer))
        self._send(worker, {"TERM": TERM, "INT": INT, "QUIT": QUIT, "HUP": HUP, "USR1": signal.SIGUSR1}[told])
        return None

    def _send(self, worker: Worker, number: int) -> None:
        if not self._fleet.signal(worker, number):
            raise Missed

    def _undo_for(self, worker: Worker, pid: int, undo: Undo) -> None:
        """Undo it for the process that it was done to, if that is still there."""
        if worker.process and worker.pid == pid:
            with contextlib.suppress(Missed):
                undo()

    def _pause(self, keys: Keys) -> Undo:
        script = verbs.script("pause").text

        def switch(on: str) -> bool:
            return bool(self._wire.one("EVAL", script, 2, keys.paused, keys.wake, on))

        with contextlib.suppress(*TROUBLE):  # it may come through all the same
            if not switch("1"):
                raise Missed
        return lambda: void(switch("0"))

    def _cut(self) -> None:
        if self._server:
            self._wire.one("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            return
        ours = {f"prefork-{worker.pid}{which}" for worker in self._fleet.workers for which in ("", "-wait")}
        for line in self._wire.one("CLIENT", "LIST").decode().splitlines():
            it = dict(word.partition("=")[::2] for word in line.split())
            if it["name"] in ours:  # those of others are none of our business
                self._wire.one("CLIENT", "KILL", "ID", it["id"])

    # -- the server's -------------------------------------------------------------------------------------------

    def _to_server(self, server: Server, what: str) -> Undo:
        if what == "stopped":
            server.signal(signal.SIGSTOP)
            return lambda: server.signal(signal.SIGCONT)
        server.end(signal.SIGKILL if what == "killed" else signal.SIGTERM)
        return server.start

    def _leap(self, seconds: float) -> None:
        for keys in self._keys:
            self._wire.one("EVAL", LEAP, 2, keys.leases, keys.scheduled, round(-seconds * 1000))

    def _forget_scripts(self) -> None:
        self._wire.one("SCRIPT", "FLUSH")

    def _configure(self, name: str, value: str | int) -> None:
        self._wire.one("CONFIG", "SET", name, value)

    def _fail_snapshot(self) -> Undo:
        private.break_snapshots(self._folder)
        limit_s = time.monotonic() + SNAPSHOT_LIMIT_S
        with contextlib.suppress(*TROUBLE):  # here too what was asked for may still come, and is to be undone
            self._configure("save", "86400 1000000000")
            self._wire.one("BGSAVE")
            while not private.snapshot_failed(self._wire) and time.monotonic() < limit_s:
                time.sleep(0.01)
        return lambda: self._configure("save", "")

    def _fill_memory(self) -> Undo:
        with contextlib.suppress(*TROUBLE):
            self._configure("maxmemory", 1)
        return lambda: self._configure("maxmemory", 0)

    def _refuse_clients(self) -> Undo:
        with contextlib.suppress(*TROUBLE):
            self._configure("maxclients", FEW_CLIENTS)
            self._cut()

        def allow() -> None:
            try:
                self._configure("maxclients", MANY_CLIENTS)
            except (ConnectionError, Unreached):  # our own is gone, and there is no way in: a restart resets it
                assert self._server
                if self._server.up:
                    self._server.end(signal.SIGKILL)
                    self._server.start()

        return allow
