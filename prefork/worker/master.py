"""The master: the story of a worker, top to bottom.

1. The app is imported; freeze it, fork the children.
2. Take a lease on each queue; take over from workers of this host that have died.
3. Each turn of the loop: take in what has come (answers, replies, signals, timers), hand out what is ready, settle
   what is decided, claim what there is room for. What becomes of a message on its way is told in `work`.
4. On TERM or INT: claim no more, put back what has not started, let what runs finish within `shutdown_timeout`, kill
   the rest and put it back, settle, give up the lease. A second INT, or QUIT, skips the waiting. On HUP the same, once
   the new version is known to be good, and `run` says so: the caller then becomes the new version.

One thread. The master's own code never waits for Redis, so that a slow or dead server keeps it from nothing else.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import orjson
from setproctitle import setproctitle

from prefork.app import Prefork
from prefork.broker import durability, trouble, verbs
from prefork.broker.channel import Channel, Lost
from prefork.broker.keys import Keys, queues_key, worker_key
from prefork.config import Settings
from prefork.worker.child import Child
from prefork.worker.claims import Claims, Queue
from prefork.worker.clock import ServerClock
from prefork.worker.descriptors import make_room
from prefork.worker.handoff import ChildEnd
from prefork.worker.lease import Lease
from prefork.worker.logs import Handler
from prefork.worker.loop import Loop
from prefork.worker.notify import Notifier
from prefork.worker.outage import Outage
from prefork.worker.pidfile import Pidfile
from prefork.worker.pool import Pool
from prefork.worker.process import Process, State
from prefork.worker.reload import Origin, Reload, release_signals
from prefork.worker.report import Report
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import Phase, Shutdown
from prefork.worker.slate import Slate
from prefork.worker.status import StatusSocket
from prefork.worker.work import Work

log = logging.getLogger("prefork")
REPORT_TTL_MS = 10_000
MOST_CHILDREN = 1000
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
        self._held = self._announced = self._connected = False
        self._reloading = False
        self._outage = Outage()
        self.notify = Notifier.from_environment()

        self.loop = loop = Loop()
        loop.after = self._turn
        self.clock = ServerClock()
        self.pool = Pool(loop, settings.concurrency, settings.max_tasks_per_child, self._live_as_child)
        self.pool.other_descriptors = self._own_descriptors
        url = app.client.url
        self.channel = Channel(loop, url, f"prefork-{self._pid}", self._up, self._down)
        self.blocker = Channel(
            loop, url, f"prefork-{self._pid}-wait", self._blocker_up, self._blocker_down,
            lambda push: self.claims.handed_over(push),
        )  # fmt: skip
        self.settlement = Settlement(
            app.tasks, self.clock.now_ms, prefix=app.prefix, dead_max=settings.dead_max,
            dead_ttl_s=settings.dead_ttl_s, max_crashes=settings.max_crashes, fenced=self._fenced,
            later=loop.call_later,
        )  # fmt: skip
        if settings.durability:
            self.settlement.durability = durability.parse(settings.durability)
            self.settlement.wait_s = min(DURABILITY_S, settings.lease_s / 3)
        self.work = self.pool.owner = Work(app, settings, loop, self.clock, self.settlement, self.pool)
        self.work.on_ready = self._child_ready
        names, weights = settings.queues.names, settings.queues.weights
        queues = [Queue(Keys(app.prefix, name), weight) for name, weight in zip(names, weights or [1] * len(names))]  # noqa: B905
        for queue in queues:
            self.settlement.add_queue(queue.keys)
        self.claims = self.work.claims = Claims(
            loop, self.channel, self.blocker, self.clock, queues, strict=weights is None, claimed=self._claimed,
            fenced=self._fenced, requested=self._requested, keep=self._reconcile,
        )  # fmt: skip
        self.lease = Lease(
            loop, self.channel, self.claims, self.clock, settings.lease_s, settings.max_takeovers, self._fenced
        )
        self.settlement.outage = self.claims.outage = self.lease.outage = self._outage
        self.shutdown = self.work.shutdown = Shutdown(
            loop, self.pool, self.work.dispatcher, self.settlement, self.claims, self.lease, self.channel,
            self.blocker, settings.shutdown_timeout_s,
        )  # fmt: skip
        self.report = Report(app, settings, self.pool, self.claims, self.lease, self.shutdown)
        self.status = StatusSocket(loop, status, lambda: orjson.dumps(self.report.describe()))
        self.reload = Reload(loop, self.pool, origin, self._become_new)

    # -- start --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Work until told to stop. -> whether to go on as a new version of this process"""
        # What the app's import has made is shared with the children, as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        self.loop.on_signals({
            signal.SIGTERM: self._stopping(lambda: self.shutdown.drain("TERM")),
            signal.SIGINT: self._stopping(self.shutdown.interrupt),
            signal.SIGQUIT: self._stopping(lambda: self.shutdown.now("QUIT")),
            signal.SIGHUP: self._hang_up,
            signal.SIGTTIN: lambda: self._resize(+1),
            signal.SIGTTOU: lambda: self._resize(-1),
            signal.SIGUSR1: self.report.say,
            signal.SIGUSR2: self._pause_or_resume,
            signal.SIGCHLD: self.pool.reap,
        })  # fmt: skip
        self._entitle()
        self.status.open()
        self.pool.fill()
        self.channel.connect()
        self.blocker.connect()
        release_signals()
        self._watchdog()
        self.loop.run()
        self.status.close()
        if self._reloading:
            self.notify.watchdog()  # the next one comes when the new version has imported the app
        return self._reloading

    def _live_as_child(self, number: int, end: ChildEnd, slate: Slate) -> None:
        names = self.settings.queues.names
        Child(number, self.app, self.work.task_list, names, end, slate, self._log).live(self._pid)

    def _own_descriptors(self) -> list[int]:
        self.channel.abandon()
        self.blocker.abandon()
        self.status.abandon()
        self.reload.abandon()
        self.lease.neighbours.abandon()
        if self._pidfile:
            self._pidfile.abandon()
        return list(self.loop.descriptors())

    def _entitle(self) -> None:
        setproctitle(f"prefork: master of {self.app.name}, {self.pool.size} children")

    def _watchdog(self) -> None:
        """systemd's proof that the loop turns."""
        if interval_s := self.notify.watchdog_interval_s:
            self.notify.watchdog()
            self.loop.call_later(interval_s, self._watchdog)

    # -- told by signals and by operators -----------------------------------------------------------------------

    def _stopping(self, stop: Callable[[], None]) -> Callable[[], None]:
        def stop_for_good() -> None:
            self.reload.give_up()
            self.notify.stopping()
            if self._reloading:  # it drains already, and ends now in place of becoming new
                self._reloading = False
                log.info("stopping, in place of going on as the new version")
            stop()

        return stop_for_good

    def _hang_up(self) -> None:
        if not self.shutdown.begun:
            self.reload.begin()

    def _become_new(self) -> None:
        if not self.shutdown.begun:
            self._reloading = True
            self.notify.reloading()
            self.shutdown.drain("HUP; the new version is good and comes next")

    def _resize(self, by: int) -> None:
        size = self.pool.size + by
        if self.shutdown.begun or not 1 <= size <= MOST_CHILDREN:
            return
        log.info("%s: %d children from now on", "TTIN" if by > 0 else "TTOU", size)
        if warning := make_room(size):
            log.warning("%s", warning)
        self.work.resize(size)
        self._entitle()
        self.notify.status(self._summary())

    def _pause_or_resume(self) -> None:
        self.claims.paused = not self.claims.paused
        self.claims.void()
        if self.claims.paused:
            log.warning("USR2: paused. Nothing more is claimed until the next USR2; what was claimed goes on")
        else:
            log.warning("USR2: claiming again")
            self.claims.wake_all()
        self.notify.status(self._summary())

    def _summary(self) -> str:
        """For `systemctl status`."""
        queues = ", ".join(self.settings.queues.names)
        return f"{'paused, ' if self.claims.paused else ''}{self.pool.size} children, queues {queues}"

    def _requested(self, request: str) -> None:
        """An operator has asked for something, by way of the broker."""
        verb, _, id = request.partition(" ")
        if verb == "cancel":
            self.work.cancels.cancel(id)
        elif verb == "report":
            key = worker_key(self.app.prefix, self.lease.worker)
            told = orjson.dumps(self.report.describe())
            self.channel.send_words(("SET", key, told, "PX", REPORT_TTL_MS), lambda reply: None)

    # -- the broker comes and goes ------------------------------------------------------------------------------

    def _up(self) -> None:
        self._connected = True
        if not self._held:  # nothing was claimed yet
            self._begin()
        else:
            self.lease.reconnected()
            self.lease.renew(self._reconcile)

    def _down(self, said: str) -> None:
        late = "does not answer in time" in said
        self._outage.begins("connection", said, wait=trouble.tells_little(said), lasts=trouble.lasts(said))
        if late and self._connected:  # the other connection takes the same way, and may stand for half a minute
            self.blocker.restart()
        self._connected = self.claims.open = False

    def _blocker_up(self) -> None:
        self._outage.ends("second connection")
        self.claims.blocker_up()

    def _blocker_down(self, said: str) -> None:
        if not self.shutdown.begun:
            self._outage.begins("second connection", said, wait=True)

    def _begin(self) -> None:
        self.settlement.worker = self.claims.worker = self.lease.worker
        names = self.settings.queues.names  # so that operators find this worker, also where nothing was enqueued yet
        self.channel.send_words(("SADD", queues_key(self.app.prefix), *names), lambda reply: None)
        self._held = self._announced = False

        def held() -> None:
            self._held = True
            self._outage.ends("connection")
            if not self.shutdown.begun:
                self.claims.open = True
                self.claims.wake_all()
                self._announce()

        self.lease.begin(held)

    def _child_ready(self, child: Process) -> None:
        self._announce()

    def _announce(self) -> None:
        """Say that the worker is ready, when it is: the leases are held, and somebody is there to work."""
        up = sum(child.state is State.READY for child in self.pool.children)
        if self._held and up and not self._announced and not self.shutdown.begun:
            self._announced = True
            log.info("worker %s is ready: %s", self.lease.worker, self._summary())
            self.notify.ready(self._summary())

    def _reconcile(self) -> None:
        """After a broken connection: put back what came here and got lost on its way. Only then claim again."""
        self.claims.begin_to_keep()
        known, worker = self.work.known_ids() | self.shutdown.ids(), self.lease.worker
        due = {queue.keys.queue for queue in self.claims.queues}

        def answered(queue: str, reply: object) -> None:
            if worker != self.lease.worker or isinstance(reply, Lost):
                return
            if isinstance(reply, Exception):
                self.lease.renew_soon(self._reconcile)
                return
            due.discard(queue)
            if not due:
                self._outage.ends("connection")
                if not self.shutdown.begun:
                    self.claims.open = True
                    self.claims.wake_all()
                self.settlement.resend()

        for queue in self.claims.queues:
            name = queue.keys.queue
            kept = known | self.settlement.outboxes[name].ids()
            self.channel.send(
                verbs.restore(queue.keys, worker, "keep", kept),
                lambda reply, name=name: answered(name, reply),  # type: ignore[misc]
            )

    def _fenced(self, said: str) -> None:
        """Another worker has taken over all that this one held: drop it, and begin anew as a new worker."""
        if self.lease.worker not in said or self.shutdown.phase is Phase.LEFT:
            return  # the same said once more, of what this worker was before
        self.claims.open = False
        for queue in self.claims.queues:  # where nobody has taken over yet, this worker does it itself
            self.channel.send(verbs.restore(queue.keys, self.lease.worker, "left"), lambda reply: None)
        self.lease.new_identity()
        dropped = self.settlement.forget_all()
        stopped, unstarted = self.work.drop_all()
        log.error(
            "lost the lease: another worker has taken over. Stopped %d running tasks, dropped %d outcomes and %d "
            "messages that had not started; going on as %s", stopped, dropped, unstarted, self.lease.worker,
        )  # fmt: skip
        self._begin()

    # -- work ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Once a turn, after all that has come was taken in."""
        now_s = self.loop.turned_s
        running = not self.shutdown.begun
        if running and now_s < self.lease.ends_s:  # one that stood still would start what another has now
            self.work.hand_out(now_s)
        if self.channel.ready:
            self.settlement.flush(self.channel)
            self.claims.keep_if_due()
            if not running:
                self.claims.listen()
            elif not self.settlement.backs_wait:
                dispatcher = self.work.dispatcher
                full = self.claims.in_flight or self.settlement.is_full
                self.claims.turn(0 if full else dispatcher.wanted(self.work.times.mix_s, now_s), dispatcher.room())
                if self._burst and self._nothing_left():
                    self._end_burst()
            self.channel.flush()
        if self.shutdown.begun:
            self.shutdown.turn()

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
