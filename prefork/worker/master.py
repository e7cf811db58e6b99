"""The master: the story of a worker, top to bottom.

1. Import the app, freeze it, fork the children.
2. Take a lease on each queue; take over from workers of this host that have died.
3. Each turn of the loop: take in what has come (answers, replies, signals, timers), hand out what is ready, settle
   what is decided, claim what there is room for.
4. On TERM or INT: claim no more, put back what has not started, let what runs finish within `shutdown_timeout`, kill
   the rest and put it back, settle, give up the lease. A second INT, or QUIT, skips the waiting.

One thread. The master's own code never waits for Redis, so that a slow or dead server keeps it from nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import time
from typing import Any

import orjson
from setproctitle import setproctitle

from prefork.app import Prefork
from prefork.broker import verbs
from prefork.broker.channel import Channel
from prefork.broker.keys import Keys
from prefork.config import Settings
from prefork.errors import BadMessage
from prefork.message import Message, State, decode
from prefork.task import Task
from prefork.worker import handoff
from prefork.worker.child import Child
from prefork.worker.claims import Claims, Queue
from prefork.worker.clock import ServerClock
from prefork.worker.deadline import Deadlines, LagWatch
from prefork.worker.dispatch import Dispatcher, RunTimes
from prefork.worker.handoff import Answer, ChildEnd, Order
from prefork.worker.lease import Lease
from prefork.worker.logs import Handler
from prefork.worker.loop import Loop
from prefork.worker.outage import Outage
from prefork.worker.pool import Death, Pool, Process
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import BECAUSE, Phase, Shutdown

log = logging.getLogger("prefork")
TITLE_AFTER_S = 0.05


class Master:
    """One worker: this process and its children."""

    def __init__(self, app: Prefork, settings: Settings, handler: Handler, *, burst: bool = False) -> None:
        self.app, self.settings, self._burst = app, settings, burst
        self._log = handler
        self.tasks = app.tasks
        self._task_list: list[Task[..., Any]] = list(self.tasks.values())
        self._index = {task.name: number for number, task in enumerate(self._task_list)}
        self._pid = os.getpid()
        self._claimed_count = 0
        self._asked_again = False
        self._outage = Outage("the broker is back")

        self.loop = loop = Loop()
        loop.after = self._turn
        self.clock = ServerClock()
        self.times = RunTimes()
        self.dispatcher: Dispatcher[Order] = Dispatcher()
        self.pool = Pool(loop, self, settings.concurrency, settings.max_tasks_per_child, self._live_as_child)
        self.pool.other_descriptors = self._own_descriptors
        self.deadlines = Deadlines(loop, self.pool)
        self.lag = LagWatch(loop, self._look_for_lag)
        url = app.client.url
        self.channel = Channel(loop, url, f"prefork-{self._pid}", self._up, self._down)
        self.blocker = Channel(loop, url, f"prefork-{self._pid}-wait", self._blocker_up, lambda said: None)
        self.settlement = Settlement(
            self.tasks, self.clock.now_ms, prefix=app.prefix, dead_max=settings.dead_max,
            dead_ttl_s=settings.dead_ttl_s, max_crashes=settings.max_crashes, fenced=self._fenced,
            later=loop.call_later,
        )  # fmt: skip
        names, weights = settings.queues.names, settings.queues.weights
        self._queue_index = {name: number for number, name in enumerate(names)}
        queues = [Queue(Keys(app.prefix, name), weight) for name, weight in zip(names, weights or [1] * len(names))]  # noqa: B905
        for queue in queues:
            self.settlement.add_queue(queue.keys)
        self.claims = Claims(
            loop, self.channel, self.blocker, self.clock, queues, strict=weights is None, claimed=self._claimed,
            fenced=self._fenced,
        )  # fmt: skip
        self.lease = Lease(loop, self.channel, self.claims, self.clock, settings.lease_s, self._fenced)
        self.shutdown = Shutdown(
            loop, self.pool, self.dispatcher, self.settlement, self.claims, self.lease, self.channel, self.blocker,
            settings.shutdown_timeout_s,
        )  # fmt: skip

    # -- start --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to stop."""
        # What the app's import has made is shared with the children, as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        self.loop.on_signals({
            signal.SIGTERM: lambda: self.shutdown.drain("TERM"),
            signal.SIGHUP: lambda: self.shutdown.drain("HUP"),
            signal.SIGINT: self.shutdown.interrupt,
            signal.SIGQUIT: lambda: self.shutdown.now("QUIT"),
            signal.SIGCHLD: self.pool.reap,
        })  # fmt: skip
        setproctitle(f"prefork: master of {self.app.name}, {self.settings.concurrency} children")
        self.pool.fill()
        self.channel.connect()
        self.blocker.connect()
        self.loop.run()

    def _live_as_child(self, number: int, end: ChildEnd) -> None:
        names = self.settings.queues.names
        Child(number, self.app, self._task_list, names, end, self._log).live(self._pid)

    def _own_descriptors(self) -> list[int]:
        self.channel.abandon()
        self.blocker.abandon()
        return list(self.loop.descriptors())

    # -- the broker comes and goes ------------------------------------------------------------------------------

    def _up(self) -> None:
        self._outage.ends()
        if not self.settlement.worker:
            self._begin()
        else:
            self.lease.reconnected()
            self.lease.renew(self._reconcile)

    def _down(self, said: str) -> None:
        self._outage.begins(f"{said}; trying again, what runs goes on")
        self.claims.open = False

    def _blocker_up(self) -> None:
        self.claims.blocker_up()

    def _begin(self) -> None:
        self.settlement.worker = self.claims.worker = self.lease.worker

        def held() -> None:
            if not self.shutdown.begun:
                self.claims.open = True
                self.claims.wake_all()
                log.info("worker %s is ready: %d children, queues %s", self.lease.worker, self.settings.concurrency,
                         ", ".join(self.settings.queues.names))  # fmt: skip

        self.lease.begin(held)

    def _reconcile(self) -> None:
        """After a broken connection: put back what a claim took whose reply was lost."""
        known = {order.message.id for order in self.dispatcher.ready}
        for child in self.pool.children:
            known.update(order.message.id for order in child.end.unanswered.values())
        for queue in self.claims.queues:
            kept = known | self.settlement.outboxes[queue.keys.queue].ids()
            self.channel.send(verbs.restore(queue.keys, self.lease.worker, "keep", kept), lambda reply: None)
        if not self.shutdown.begun:
            self.claims.open = True
            self.claims.wake_all()
        self.settlement.resend()

    def _fenced(self, said: str) -> None:
        """Another worker has taken over all that this one held: drop it, and begin anew as a new worker."""
        if self.lease.worker not in said or self.shutdown.phase is Phase.LEFT:
            return  # the same said once more, of what this worker was before
        self.claims.open = False
        for queue in self.claims.queues:  # where nobody has taken over yet, this worker does it itself
            self.channel.send(verbs.restore(queue.keys, self.lease.worker, "gone"), lambda reply: None)
        self.lease.new_identity()
        dropped = self.settlement.forget_all()
        unstarted = len(self.dispatcher.ready)
        self.dispatcher.ready.clear()
        stopped = 0
        for child in list(self.pool.children):
            unstarted += len(self.pool.take_back(child))
            if child.end.unanswered:
                stopped += 1
                self.pool.kill(child, FENCED)
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
        if running:
            self._hand_out(now_s)
        if self.channel.ready:
            self.settlement.flush(self.channel)
            if running and not self.settlement.backs_wait:
                self.claims.turn(self.dispatcher.wanted(self.times.mix_s, now_s))
                if self._burst and self._nothing_left():
                    self._end_burst()
            self.channel.flush()
        if self.shutdown.begun:
            self.shutdown.turn()

    def _claimed(self, queue: str, ids: list[bytes], messages: list[bytes], states: list[bytes | None]) -> None:
        orders = []
        self._asked_again = False
        now_ms = self.clock.now_ms()
        for raw_id, raw, state in zip(ids, messages, states, strict=True):
            try:
                message = decode(raw_id, queue, raw, state)
                task = self.tasks.get(message.header.task)
                if task is None:
                    self.settlement.unknown(message)
                elif _has_expired(message, task, now_ms):
                    self.settlement.expired(message)
                else:
                    orders.append(self._order(message, task))
            except BadMessage as error:
                self.settlement.bad(raw_id, queue, str(error))
            except Exception as error:  # no message, however strange, may end the worker again and again
                log.exception("message %r cannot be handled", raw_id)
                self.settlement.bad(raw_id, queue, f"message {raw_id!r} cannot be handled: {error!r}")
        if self.shutdown.begun:
            self.shutdown.unstarted += orders
        else:
            self.dispatcher.add(orders, time.monotonic())

    def _order(self, message: Message, task: Task[..., Any]) -> Order:
        header, options, state = message.header, task.options, message.state or State()
        timeout_s = header.timeout_s or options.timeout_s or self.settings.timeout_s or 0.0
        soft_s = header.soft_timeout_s or options.soft_timeout_s or 0.0
        expected_s = self.times.expect_s(task.name)
        retries = options.max_retries if header.max_retries is None else min(int(header.max_retries), 1000)
        self._claimed_count += 1
        return Order(
            message, self._index[task.name], self._queue_index[message.queue], state.attempts + 1, state.retried,
            retries, timeout_s, soft_s, expected_s, self._claimed_count,
            handoff.WILL_LAST if expected_s > TITLE_AFTER_S else 0,
        )  # fmt: skip

    def _hand_out(self, now_s: float) -> None:
        dispatcher = self.dispatcher
        dispatcher.slots = [child.slot for child in self.pool.children]
        if dispatcher.ready:
            by_slot = {child.slot: child for child in self.pool.children}
            for slot, orders in dispatcher.assign(now_s):
                self.pool.hand(by_slot[slot], orders)
                for order in orders:
                    if order.timeout_s:
                        self.deadlines.watch(order.timeout_s)
        if dispatcher.waits():
            self.lag.arm()

    def _look_for_lag(self) -> None:
        """Nothing waits behind a task that takes longer than expected: others here get it, or other workers."""
        now_s = time.monotonic()
        for child in self.pool.children:
            if child.slot.outstanding > 1 and child.slot.lags(now_s):
                self.dispatcher.add(self.pool.take_back(child), now_s)
        if not self.claims.in_flight:  # what is on its way was claimed later, and must not overtake
            self.settlement.put_back(self.dispatcher.stale(now_s))

    def on_answer(self, child: Process, answer: Answer) -> None:
        """A child has answered, or said how far it is."""
        if answer.kind == handoff.PROGRESS:
            order = child.end.unanswered.get(answer.number)
            with contextlib.suppress(ValueError):  # a task may write into the pipe
                if order:
                    self.settlement.progress(order.message, orjson.loads(answer.payload))
            return
        order = child.end.settle(answer.number)
        if order is None:
            return
        name = order.message.header.task
        child.slot.answered(order.expected_s, time.monotonic())
        self.times.observe(name, answer.ran_s)
        if child.killed_for == FENCED:
            return
        try:
            self.settlement.answered(order, answer, self.channel)
        except Exception as error:  # as above
            log.exception("the answer of %s %s cannot be handled", name, order.message.id)
            self.settlement.bad(
                order.message.id.encode(), order.message.queue, f"its answer cannot be handled: {error!r}"
            )
        if log.isEnabledFor(logging.DEBUG):
            done = "failed" if answer.kind == handoff.FAILED else "done"
            log.debug("%s %s %s in %.6f s, cpu %.6f s", name, order.message.id, done, answer.ran_s, answer.cpu_s)

    def on_death(self, death: Death) -> None:
        """A child has ended; what it held needs a place."""
        child, now_s = death.child, time.monotonic()
        for order in death.running:
            message, ran_s = order.message, now_s - child.slot.head_since_s
            outcome = "back to queue " + message.queue
            if child.killed_for == FENCED:
                outcome = "another worker has it now"
            elif child.killed_for.startswith("timeout") and child.killed_order is not order:
                self.dispatcher.add([order], now_s)  # it began in the moment between the look and the kill
            elif child.killed_for.startswith("timeout"):
                outcome = "failed at its deadline"
                self.settlement.timed_out(order, ran_s)
            elif child.killed_for.startswith(BECAUSE) or (self.shutdown.begun and death.asked_to_end):
                self.shutdown.killed.append(order)
            else:
                outcome = self.settlement.crashed(order, death.how, ran_s, death.peak_kib)
            log.log(
                logging.INFO if child.killed_for.startswith(BECAUSE) else logging.ERROR,
                "child %d (pid %d) %s in %s id=%s attempt=%d ran=%.1fs rss=%dMB: %s", child.number, child.pid,
                death.how, message.header.task, message.id, order.attempt, ran_s, death.peak_kib >> 10, outcome,
            )  # fmt: skip
        if not death.running and not death.wanted and not self.shutdown.begun:
            log.error("child %d (pid %d) %s, with nothing running", child.number, child.pid, death.how)
        if death.waiting and child.killed_for != FENCED:
            if self.shutdown.begun:
                self.shutdown.unstarted += death.waiting
            else:
                self.dispatcher.add(death.waiting, now_s)

    def _end_burst(self) -> None:
        """What the last outcomes have put into a queue, follow-ups and retries, is seen by asking once more."""
        if self._asked_again:
            self.shutdown.drain("everything is done")
        self._asked_again = True
        self.claims.wake_all()

    def _nothing_left(self) -> bool:
        busy = self.dispatcher.ready or any(child.end.unanswered for child in self.pool.children)
        return self.claims.open and self.claims.all_drained and not busy and self.settlement.is_empty


FENCED = "the lease is lost"


def _has_expired(message: Message, task: Task[..., Any], now_ms: int) -> bool:
    header = message.header
    if header.expires_ms is not None:
        return now_ms > header.expires_ms
    expires_s = task.options.expires_s if header.expires_s is None else header.expires_s
    return expires_s is not None and now_ms > message.enqueued_ms + expires_s * 1000
