"""The torture itself: server, masters, producers and faults for so long, then peace, then the account.

1. A private server comes up (unless a broker is given), the masters, the producers.
2. For so many minutes faults begin and end as the plan says, and masters that have ended are started again.
3. Producers stop, faults are undone; everything that was accepted has to end within a limit.
4. The masters are stopped, and the account is made of the ledger, the broker and what was done to whom.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefork.broker import address, survey
from prefork.broker.client import Client
from prefork.broker.wire import TROUBLE
from prefork.errors import BrokerError, PreforkError
from prefork.torture import load
from prefork.torture.account import Account, World
from prefork.torture.app import KINDS, PREFIX, QUEUES
from prefork.torture.faults import Faults, plan
from prefork.torture.fleet import Fleet
from prefork.torture.ledger import Story, stories
from prefork.torture.server import Server, bundled_binary, connect, die_with_parent

DEEPEST_TEMP = 64  # bytes, which leave room for the path of the server's unix socket: 103 on macOS, 107 on Linux
READY_LIMIT_S = 60.0
UNDO_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
DRAIN_LIMIT_S = 120.0  # without any progress
TURN_S = 0.01
SHOW_EVERY_S = 0.5
MANY = 500
EXIT_INTERRUPTED = 130  # INT, before it was up
USUAL_ENDS = {0, 69, 75}  # told to end; the broker could not be reached, or refused, while it started


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. `rate`: tasks a second; `pause_s`: the mean between two faults; `broker`: "" for a private server."""

    minutes: float
    seed: str
    workers: int = 2
    children: int = 4
    producers: int = 2
    rate: float = 500.0
    pause_s: float = 1.5
    broker: str = ""
    binary: str = ""
    keep: bool = False


Show = Callable[[float, dict[str, Any]], None]  # the share of the time that is over, and what to say


class Torture:
    """One run of it."""

    def __init__(self, order: Order, show: Show) -> None:
        if order.broker:
            address.resolve(order.broker)  # a URL that is none is said before anything begins
        self._order, self._show = order, show
        deep = len(os.fsencode(tempfile.gettempdir())) > DEEPEST_TEMP
        self.folder = Path(tempfile.mkdtemp(prefix="prefork-torture-", dir="/tmp" if deep else None))
        (self.folder / "ledger").mkdir()
        self._server = None if order.broker else Server(order.binary or bundled_binary(), self.folder / "server")
        self._url = order.broker or (self._server.url if self._server else "")
        self._prefix = f"{PREFIX}-{os.urandom(4).hex()}" if order.broker else PREFIX
        self._client = Client(self._url, self._prefix)
        self._plain = connect(self._url)
        self._producers: list[subprocess.Popen[bytes]] = []
        self._fleet = Fleet(self.folder, self._url, self._prefix, order.workers, order.children)
        self._faults = Faults(self._fleet, self._plain, self._server, self.folder / "server", self._prefix)
        self.account = Account()
        self._shown_s = 0.0

    def run(self) -> dict[str, Any]:
        """Do it all. -> the report, as `--json` prints it. Raises PreforkError when it cannot begin."""
        begun_s = time.monotonic()
        try:
            if self._server:
                self._server.start()
            self._client.census(QUEUES[0])  # a broker that can't be used is said before anything begins
        except BrokerError:
            self._close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        try:
            self._fleet.mind()
            if not self._fleet.wait_ready(READY_LIMIT_S):
                raise PreforkError(f"the workers do not come up; what they say is in {self.folder}/worker-*.log")
            self._start_producers()
            self._suffer()
            self._end_load()
            self._drain()
            self._fleet.stop(STOP_LIMIT_S)
            self._make_account()
        finally:
            self._close()
        report = self._report(time.monotonic() - begun_s)
        (self.folder / "report.json").write_text(json.dumps(report, indent=1))
        if self.account.ok and not self._order.keep:
            shutil.rmtree(self.folder, ignore_errors=True)
            report["folder"] = None
        return report

    # -- the time of it -----------------------------------------------------------------------------------------

    def _start_producers(self) -> None:
        for number in range(self._order.producers):
            given = {
                "broker": self._url, "prefix": self._prefix, "folder": str(self.folder / "ledger"), "number": number,
                "seed": self._order.seed, "rate": self._order.rate / self._order.producers,
            }  # fmt: skip
            with (self.folder / f"load-{number}.log").open("wb") as log:
                self._producers.append(subprocess.Popen(
                    [sys.executable, "-m", "prefork.torture.load"], env={**os.environ, load.GIVEN: json.dumps(given)},
                    cwd=self.folder, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=die_with_parent,
                ))  # fmt: skip

    def _suffer(self) -> None:
        begun_s, length_s = time.monotonic(), self._order.minutes * 60
        draws = plan(self._order.seed, self._order.workers, self._order.pause_s, server=self._server is not None)
        draw = next(draws)
        due_s = begun_s + draw.pause_s
        while (now_s := time.monotonic()) < begun_s + length_s:
            self._turn((now_s - begun_s) / length_s)
            if now_s >= due_s:
                self._faults.begin(draw)
                draw = next(draws)
                due_s = max(due_s + draw.pause_s, now_s)

    def _turn(self, share: float) -> None:
        self._fleet.mind()
        self._faults.turn()
        if time.monotonic() - self._shown_s > SHOW_EVERY_S:
            self._shown_s = time.monotonic()
            self._show(share, {"faults": len(self._faults.done), **self._waiting()})
        time.sleep(TURN_S)

    def _waiting(self) -> dict[str, Any]:
        """Counted by the torture's own connection, which gives up at once; nothing while the server is away."""
        if self._server and not self._server.up:
            return {}
        try:
            keys = [self._client.keys(queue) for queue in QUEUES]
            attempts = [int(self._plain.one("HGET", k.stats, "processed") or 0) for k in keys]
            return {"attempts": sum(attempts), "waiting": sum(self._plain.one("LLEN", k.pending) for k in keys)}
        except TROUBLE:
            return {}

    def _end_load(self) -> None:
        for producer in self._producers:
            assert producer.stdin
            producer.stdin.close()
        until_s = time.monotonic() + UNDO_LIMIT_S
        while not self._faults.turn(all_=True) and time.monotonic() < until_s:
            self._fleet.mind()
            time.sleep(TURN_S)
        for producer in self._producers:
            try:
                code = producer.wait(UNDO_LIMIT_S)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                self.account.find("a producer ended badly", f"exit {code}; see {self.folder}/load-*.log")

    def _drain(self) -> None:
        """Wait until all that was accepted has ended; what does not is stuck."""
        last, moved_s = "", time.monotonic()
        while True:
            self._turn(1.0)
            try:
                found = [survey.census(self._client, queue) for queue in QUEUES]
            except BrokerError:
                found = []
            left = sum(it.report.pending + it.report.scheduled + it.report.active for it in found)
            if found and not left:
                for it in found:
                    if it.messages != it.report.dead:
                        about = f"queue {it.report.name}: {it.messages} messages, {it.report.dead} dead letters"
                        self.account.find("messages that are in no place", about)
                return
            said = repr(
                [(it.report.pending, it.report.scheduled, it.report.active, it.report.processed) for it in found]
            )
            if said != last:
                last, moved_s = said, time.monotonic()
            elif time.monotonic() - moved_s > DRAIN_LIMIT_S:
                self.account.find(
                    "stuck", f"{left} tasks (pending, scheduled, active, processed of each queue: {said})"
                )
                return
            time.sleep(0.1)

    # -- afterwards ---------------------------------------------------------------------------------------------

    def _make_account(self) -> None:
        for worker in self._fleet.workers:
            for life in worker.lives:
                told = {-number for number in life.told} | ({EXIT_INTERRUPTED} if signal.SIGINT in life.told else set())
                if life.code not in USUAL_ENDS | told or (life.code == 0 and not life.told):
                    self.account.find("a worker ended unasked", f"pid {life.pid}, code {life.code}; see {worker.log}")
            if b"\nTraceback (most recent call last)" in worker.log.read_bytes():  # those of tasks are amid a record
                self.account.find("a traceback in a worker's log", str(worker.log))
        dead: set[str] = set()
        for queue in QUEUES:
            dead |= {id.decode() for id in self._client.read("ZRANGE", self._client.keys(queue).dead, 0, -1)}
        lives = [life for worker in self._fleet.workers for life in worker.lives]
        world = World(self._faults.done, lives, self._fleet.fences, dead)
        for part in stories(self.folder / "ledger"):
            self.account.take(part, world, self._failed(part))

    def _failed(self, part: dict[str, Story]) -> set[str]:
        """The ids of those whose result ought to be kept, and isn't that of a success."""
        ids = [it.id for it in part.values() if it.id and it.kind and KINDS[it.kind.partition(":")[0]].kept]
        failed = set()
        for at in range(0, len(ids), MANY):
            some = ids[at : at + MANY]
            found = [
                self._client.read("MGET", *(self._client.keys(q).result_prefix + id for id in some)) for q in QUEUES
            ]
            for id, *records in zip(some, *found, strict=True):
                record = next((it for it in records if it), b"{}")
                if json.loads(record).get("status") != "SUCCESSFUL":
                    failed.add(id)
        return failed

    def _report(self, seconds: float) -> dict[str, Any]:
        a, order = self.account, self._order
        return {
            "ok": a.ok, "seed": order.seed, "minutes": order.minutes, "workers": order.workers,
            "children": order.children, "took_s": round(seconds, 1), "accepted": a.accepted, "unsure": a.unsure,
            "unsure_accepted": a.came, "refused": a.refused, "follow_ups": a.follow_ups, "done": a.done,
            "dead": a.dead, "dead_by_faults": a.crash_letters, "cancelled": a.cancelled, "lost": a.lost,
            "attempts": a.runs, "repeats": a.repeats, "repeats_explained": dict(a.explained.most_common()),
            "faults": len(self._faults.done), "faults_missed": self._faults.missed,
            "faults_by_name": dict(Counter(it.name for it in self._faults.done).most_common()),
            "masters_started": sum(len(worker.lives) for worker in self._fleet.workers),
            "leases_lost": len(self._fleet.fences), "broken": dict(a.broken), "findings": a.findings,
            "folder": str(self.folder),
        }  # fmt: skip

    def _close(self) -> None:
        for producer in self._producers:
            if producer.poll() is None:
                producer.kill()
                producer.wait()
        self._fleet.close()
        if self._server:
            self._server.close()
        elif self._order.broker and self.account.ok:
            self._wipe()

    def _wipe(self) -> None:
        """Leave nothing of it in somebody else's broker."""
        try:
            cursor = b""
            while cursor != b"0":
                cursor, keys = self._plain.one("SCAN", cursor or "0", "MATCH", f"{self._prefix}:*", "COUNT", MANY)
                if keys:
                    self._plain.one("UNLINK", *keys)
        except TROUBLE:
            self.account.find("could not tidy up", f"keys {self._prefix}:* are left in the broker")
