"""The lease: who this worker is, its heartbeat, the takeover of the dead, the fence.

1. A worker takes a lease on each of its queues, by the server's clock, and renews it at a third of its length.
2. Each beat shows the other workers' leases. Those that have ended (rivals.py) are taken over, and at once those of
   this host whose process is gone: what they held goes back to the front of its queue.
3. A worker whose lease is gone (it stood still, and another took over) is refused by claim and settle: the fence.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import hiredis
import psutil

from prefork.broker import verbs
from prefork.broker.channel import Channel, Lost
from prefork.worker.claims import Claims
from prefork.worker.clock import ServerClock
from prefork.worker.loop import Loop, Timer
from prefork.worker.neighbours import Neighbours
from prefork.worker.outage import Outage
from prefork.worker.queues import Queue
from prefork.worker.rivals import Rivals

log = logging.getLogger("prefork")
REFUSED_PAUSE_S = 0.5
PID = re.compile("[1-9][0-9]{0,8}")


def identity(serial: int) -> str:
    """`host:machine:pid:start:serial`; tells a process from any other, also of the same pid, also after a reboot."""
    pid = os.getpid()
    return f"{socket.gethostname()}:{_machine()}:{pid}:{_start_of(pid)}:{serial}"


def pid_here(worker: str) -> int:
    """The pid of a worker of this host (this boot, this pid namespace), be it alive or not; 0 for any other."""
    parts = worker.rsplit(":", 4)
    if len(parts) != 5 or parts[0] != socket.gethostname() or parts[1] != _machine() or not PID.fullmatch(parts[2]):
        return 0
    return int(parts[2])


def has_died(worker: str) -> bool:
    """Whether this worker was a process of this host (this boot, this pid namespace) that is gone."""
    pid = pid_here(worker)
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    start = _start_of(pid)
    return start not in ("", worker.rsplit(":", 2)[1])


def _machine() -> str:
    """Tells this boot of this machine, and this pid namespace (containers share a kernel), from any other."""
    if sys.platform == "linux":
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        return hashlib.sha256(f"{boot}/{namespace}".encode()).hexdigest()[:8]
    return hashlib.sha256(str(int(psutil.boot_time())).encode()).hexdigest()[:8]


def _start_of(pid: int) -> str:
    """When a process started, in the kernel's own ticks; "dead" if it has ended; "" if it can't be told."""
    try:
        if sys.platform == "linux":
            fields = pathlib.Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode()  # X: amid its burial
        process = psutil.Process(pid)
        return "dead" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except (OSError, psutil.Error):
        return ""


class Lease:
    """This worker's lease on each of its queues."""

    def __init__(
        self, loop: Loop, channel: Channel, claims: Claims, clock: ServerClock, lease_s: float,
        max_takeovers: int, fenced: Callable[[str], None], known: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._known = known  # how many messages of a queue are here
        self._odd: set[str] = set()  # queues of which the broker holds more for this worker
        self._loop, self._channel, self._claims, self._clock = loop, channel, claims, clock
        self._lease_ms, self._max_takeovers, self._fenced = round(lease_s * 1000), max_takeovers, fenced
        self._serial = time.monotonic_ns() // 1_000_000  # a process that was replaced by exec keeps pid and start
        self._rivals = Rivals(lease_s)
        self.neighbours = Neighbours(loop, self._look_now)
        self._near: dict[str, dict[str, int]] = {}  # queue -> living workers of this host -> their pids
        self._timer: Timer | None = None
        self.ends_s = 0.0  # by this process's own clock: from then on another may have taken over
        self._taking_over: set[tuple[str, str]] = set()
        self.outage = Outage()
        self._asked: tuple[bool, Callable[[], None]] | None = None  # first or not, whom to call, until it is granted
        self.worker = ""
        self.new_identity()

    def new_identity(self) -> None:
        """Become another worker, as far as the broker can see."""
        self._serial += 1
        self.worker = identity(self._serial)

    def reconnected(self) -> None:
        """After an outage all leases have ended; give the others time to come back too, before taking over."""
        self._rivals.be_patient(time.monotonic())

    def begin(self, held: Callable[[], None]) -> None:
        """Take a lease on each queue, then call `held`. What the broker refuses is asked for again."""
        self._asked = True, held
        self._beat_all()

    def renew(self, held: Callable[[], None] = lambda: None) -> None:
        """Renew all leases now, then call `held`, as above; `fenced` is called in its place if one is gone."""
        self._asked = False, held
        self._beat_all()

    def renew_soon(self, held: Callable[[], None]) -> None:
        """The same, after the pause that a broker which refuses something is given."""
        self._asked = False, held
        self._beat_in(REFUSED_PAUSE_S)

    def _beat_in(self, pause_s: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(min(pause_s, self._lease_ms / 3000), self._tick)

    def _beat_all(self) -> None:
        self._beat_in(self._lease_ms / 3000)
        asked, sent_s = self._asked, time.monotonic()
        due = set(map(id, self._claims.queues))

        def answered(queue: Queue, reply: Any) -> None:
            if self._take_in(queue, sent_s, reply):
                due.discard(id(queue))
                if not due:
                    self.ends_s = max(self.ends_s, sent_s + self._lease_ms / 1000)
                if asked and not due and self._asked is asked:
                    self._asked = None
                    asked[1]()

        for queue in self._claims.queues:
            call = verbs.beat(queue.keys, self.worker, self._lease_ms, first=bool(asked and asked[0]))
            self._channel.send(call, lambda reply, queue=queue: answered(queue, reply))  # type: ignore[misc]

    def _tick(self) -> None:
        if self._channel.ready:
            self._beat_all()
            self._channel.flush()
        else:
            self._beat_in(self._lease_ms / 3000)

    def _look_now(self) -> None:
        """A worker of this host has ended, perhaps without a word."""
        if self._timer:
            self._tick()

    def _take_in(self, queue: Queue, sent_s: float, reply: Any) -> bool:
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("FENCED"):
            self._fenced(str(reply))
            return False
        part = f"lease {queue.keys.queue}"
        if isinstance(reply, Exception):
            if not isinstance(reply, Lost):  # a connection that broke comes back with a renewal
                self.outage.begins(part, f"the broker refuses the lease on queue {queue.keys.queue}: {reply}")
                self._beat_in(REFUSED_PAUSE_S)
            return False
        self.outage.ends(part)
        now_ms, next_due_ms, waiting, holds, *leases = reply
        self._compare(queue, holds)
        self._clock.told(now_ms, sent_s)
        self._claims.due(queue, next_due_ms)
        if waiting:
            self._claims.wake(queue)
        others = zip((name.decode("utf-8", "backslashreplace") for name in leases[::2]), leases[1::2], strict=True)
        alive, near = [], {}
        process = self.worker.rpartition(":")[0]
        for worker, end_ms in others:
            if worker != self.worker:
                if worker.rpartition(":")[0] == process:  # what could not be given up before a reload
                    self._take_over(queue, worker, "left")
                elif self.neighbours.has_ended(worker) or has_died(worker):
                    self._take_over(queue, worker, "gone")
                else:
                    alive.append((worker, end_ms))
                    if pid := pid_here(worker):
                        near[worker] = pid
        self._near[queue.keys.queue] = near
        self.neighbours.watch({worker: pid for workers in self._near.values() for worker, pid in workers.items()})
        for worker, end_ms, unmoved in self._rivals.judge(queue.keys.queue, now_ms, time.monotonic(), alive):
            self._take_over(queue, worker, "unmoved" if unmoved else "expired", end_ms)
        return True

    def _compare(self, queue: Queue, holds: int) -> None:
        """A claim that an outage has held up may be carried out when it is over, and its reply goes nowhere.

        What `enqueue` has handed over may be on its way: so not before it is found twice.
        """
        name = queue.keys.queue
        if not self._claims.open or queue.unkept or holds <= (known := self._known(name)):
            self._odd.discard(name)
        elif name not in self._odd:
            self._odd.add(name)
            self._beat_in(REFUSED_PAUSE_S)
        else:
            self._odd.discard(name)
            log.info(
                "the broker holds %d messages of queue %s for this worker, of which %d have come; the others go back",
                holds, name, known,
            )  # fmt: skip
            self._claims.keep_soon()

    def _take_over(self, queue: Queue, worker: str, mode: str, end_ms: int = 0) -> None:
        key = queue.keys.queue, worker
        if key in self._taking_over:
            return
        self._taking_over.add(key)

        def done(moved: Any) -> None:
            self._taking_over.discard(key)
            moved, buried = moved if isinstance(moved, list) else (moved, 0)
            if isinstance(moved, int) and moved >= 0:
                why = {"gone": "its process is gone", "left": "this process was it"}.get(mode, "its lease has ended")
                log.warning("took over from worker %s (%s): %d messages back to queue %s", worker, why, moved - buried,
                            key[0])  # fmt: skip
                if buried:
                    log.error("%d messages of queue %s were held by %d workers that died; dead letters now",
                              buried, key[0], self._max_takeovers)  # fmt: skip
                self._claims.wake(queue)
            elif isinstance(moved, Exception) and not isinstance(moved, Lost):
                log.error("cannot take over from worker %s: %s", worker, moved)

        seen = (str(end_ms),) if mode == "unmoved" else ()
        self._channel.send(verbs.restore(queue.keys, worker, mode, seen, self._max_takeovers), done)

    def stop(self) -> None:
        """Renew no more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
