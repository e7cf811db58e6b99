"""The master: the story of a worker, top to bottom.

1. The app is imported; freeze it, fork the children.
2. Take a lease on each queue; take over from workers of this host that have died. How all that is kept while the broker
   goes away and comes back is told in `link`.
3. Each turn of the loop: take in what has come (answers, replies, signals, timers), hand out what is ready, settle
   what is decided, claim what there is room for. What becomes of a message on its way is told in `work`.
4. Do what signals and operators ask for, as told in `commands`. On TERM or INT: claim no more, put back what has not
   started, let what runs finish within `shutdown_timeout`, kill the rest and put it back, settle, give up the lease. A
   second INT, or QUIT, skips the waiting. On HUP the same, once the new version is known to be good, and `run` says
   so: the caller then becomes the new version.

One thread. The master's own code never waits for Redis, so that a slow or dead server keeps it from nothing else.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path

import orjson

from prefork.app import Prefork
from prefork.broker import durability
from prefork.broker.keys import Keys
from prefork.config import Settings
from prefork.worker.child import Child
from prefork.worker.claims import Claims
from prefork.worker.clock import ServerClock
from prefork.worker.commands import Commands
from prefork.worker.handoff import ChildEnd
from prefork.worker.lease import Lease
from prefork.worker.link import Link
from prefork.worker.logs import Handler
from prefork.worker.loop import Loop
from prefork.worker.notify import Notifier
from prefork.worker.pidfile import Pidfile
from prefork.worker.pool import Pool
from prefork.worker.process import State
from prefork.worker.queues import Queue
from prefork.worker.reload import ENDS, Origin, end_by_default, release_signals
from prefork.worker.report import Report
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import Shutdown
from prefork.worker.slate import Slate
from prefork.worker.status import StatusSocket
from prefork.worker.work import Work

log = logging.getLogger("prefork")
DURABILITY_S = 2.0  # a disk that is synced every second may take so long


class Master:
    """One worker: this process and its children.

    `status`: where its status socket is to be; `origin`: how the command was started, and a new version will be.
    """

    def __init__(
        self, app: Prefork, settings: Settings, handler: Handler, *, status: Path, pidfile: Pidfile | None,
        origin: Origin, burst: bool = False,
    ) -> None:  # fmt: skip
        self.app, self.settings, self._pidfile, self._burst = app, settings, pidfile, burst
        self._log = handler
        self._pid = os.getpid()
        self._asked_again = False
        self._announced_as = ""
        self.notify = Notifier.from_environment()

        self.loop = loop = Loop()
        loop.after = self._turn
        self.clock = ServerClock()
        self.pool = Pool(loop, settings.concurrency, settings.max_tasks_per_child, self._live_as_child)
        self.pool.other_descriptors = self._own_descriptors
        self.link = link = Link(loop, app.client.url, app.prefix, self._announce)
        self.channel = link.channel
        self.settlement = link.settlement = Settlement(
            app.tasks, self.clock.now_ms, prefix=app.prefix, dead_max=settings.dead_max,
            dead_ttl_s=settings.dead_ttl_s, max_crashes=settings.max_crashes, fenced=link.fenced,
            later=loop.call_later,
        )  # fmt: skip
        if settings.durability:
            self.settlement.durability = durability.parse(settings.durability)
            self.settlement.wait_s = min(DURABILITY_S, settings.lease_s / 3)
        self.work = link.work = self.pool.owner = Work(app, settings, loop, self.clock, self.settlement, self.pool)
        self.work.on_ready = lambda child: self._announce()
        names, weights = settings.queues.names, settings.queues.weights
        queues = [Queue(Keys(app.prefix, name), weight) for name, weight in zip(names, weights or [1] * len(names))]  # noqa: B905
        for queue in queues:
            self.settlement.add_queue(queue.keys)
        self.claims = link.claims = self.work.claims = Claims(
            loop, link.channel, link.blocker, self.clock, queues, strict=weights is None, claimed=self._claimed,
            fenced=link.fenced, requested=lambda request: self.commands.requested(request), keep=link.reconcile,
        )  # fmt: skip
        self.lease = link.lease = Lease(
            loop, link.channel, self.claims, self.clock, settings.lease_s, settings.max_takeovers, link.fenced,
            link.known,
        )  # fmt: skip
        self.settlement.outage = self.claims.outage = self.lease.outage = link.outage
        self.shutdown = link.shutdown = self.work.shutdown = Shutdown(
            loop, self.pool, self.work.dispatcher, self.settlement, self.claims, self.lease, link.channel,
            link.blocker, settings.shutdown_timeout_s,
        )  # fmt: skip
        self.report = Report(app, settings, self.pool, self.claims, self.lease, self.shutdown)
        self.status = StatusSocket(loop, status, lambda: orjson.dumps(self.report.describe()))
        self.commands = Commands(
            app.prefix, loop, self.pool, self.work, link, self.shutdown, self.report, self.notify, origin
        )

    # -- start --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Work until told to stop. -> whether to go on as a new version of this process"""
        # What the app's import has made is shared with the children, as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        self.loop.on_signals(self.commands.by_signal() | {signal.SIGCHLD: self.pool.reap})
        self.report.entitle()
        self.status.open()
        self.pool.fill()
        self.link.connect()
        release_signals()
        self._watchdog()
        self.loop.run()
        self.status.close()
        if not self.commands.reloading or self._ends_all_the_same():
            return False
        self.notify.watchdog()  # the next one comes when the new version has imported the app
        return True

    def _ends_all_the_same(self) -> bool:
        """Whether it was told to end after the last turn, when nobody listens any more."""
        end_by_default()  # from now on; so none is lost between this look and the new version
        ends = bool(ENDS & set(self.loop.come_signals()))
        if ends:
            log.info("stopping, in place of going on as the new version")
            self.notify.stopping()
        return ends

    def _live_as_child(self, number: int, end: ChildEnd, slate: Slate) -> None:
        names = self.settings.queues.names
        Child(number, self.app, self.work.task_list, names, end, slate, self._log).live(self._pid)

    def _own_descriptors(self) -> list[int]:
        self.link.abandon()
        self.status.abandon()
        self.commands.reload.abandon()
        self.lease.neighbours.abandon()
        if self._pidfile:
            self._pidfile.abandon()
        return list(self.loop.descriptors())

    def _watchdog(self) -> None:
        """systemd's proof that the loop turns."""
        if interval_s := self.notify.watchdog_interval_s:
            self.notify.watchdog()
            self.loop.call_later(interval_s, self._watchdog)

    def _announce(self) -> None:
        """Say that the worker is ready, when it is: the leases are held, and somebody is there to work."""
        up = sum(child.state is State.READY for child in self.pool.children)
        if self.link.held and up and self._announced_as != self.lease.worker and not self.shutdown.begun:
            self._announced_as = self.lease.worker
            log.info("worker %s is ready: %s", self.lease.worker, self.report.summary())
            self.notify.ready(self.report.summary())

    # -- work ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Once a turn, after all that has come was taken in."""
        now_s = self.loop.turned_s
        if self._log.is_behind:
            self._log.flush()
        running = not self.shutdown.begun
        holds = now_s < self.lease.ends_s
        if running and holds:  # one that stood still would start what another has now
            self.work.hand_out(now_s)
        if self.channel.ready:
            self.settlement.flush(self.channel)
            self.claims.keep_if_due()
            self.claims.bar(self.settlement.barred)
            if not running or self.settlement.backs_wait:
                self.claims.listen()
            else:
                dispatcher = self.work.dispatcher
                full = not holds or self.claims.in_flight or self.settlement.is_full
                self.claims.turn(0 if full else dispatcher.wanted(self.work.times.mix_s, now_s), dispatcher.room())
                if self._burst and self._nothing_left():
                    self._end_burst()
            self.channel.flush()
        if self.shutdown.begun:
            self.shutdown.turn()
            if self.channel.ready:  # nothing may wake the loop to send what goes back by that
                self.settlement.flush(self.channel)
                self.channel.flush()

    def _claimed(
        self, queue: str, ids: list[bytes], messages: list[bytes], states: list[bytes | None], serial: int
    ) -> None:
        self._asked_again = False
        if self.settlement.refuses:
            self.settlement.came_back(queue, ids)
        self.work.claimed(queue, ids, messages, states, serial)

    def _end_burst(self) -> None:
        """What the last outcomes have put into a queue, follow-ups and retries, is seen by asking once more."""
        if self._asked_again:
            self.shutdown.drain("everything is done")
        self._asked_again = True
        self.claims.wake_all()

    def _nothing_left(self) -> bool:
        return self.claims.open and self.claims.all_drained and not self.work.busy and self.settlement.is_empty
