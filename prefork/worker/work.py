"""A message between claim and outcome: handed to a child, answered; and its place when the child dies.

1. `claimed`: a claim has brought messages. Each becomes an order, or an outcome at once (`intake`).
2. `hand_out`: once a turn, the dispatcher says which child gets which orders.
3. `on_answer`: a child has answered: the settlement decides.
4. `on_death`: a child has died: what it was running is charged, what it had not started is handed out again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import orjson

from prefork.app import Prefork
from prefork.config import Settings
from prefork.task import Task
from prefork.worker import evidence, fast, frames
from prefork.worker.cancel import CANCELLED, Cancels
from prefork.worker.claims import Claims
from prefork.worker.clock import ServerClock
from prefork.worker.deadline import Beginnings, Deadlines, LagWatch
from prefork.worker.dispatch import Dispatcher, RunTimes
from prefork.worker.frames import Answer, Order
from prefork.worker.governor import Governor
from prefork.worker.intake import Intake
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Death, Process
from prefork.worker.process import State as ChildState
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import BECAUSE, Shutdown
from prefork.worker.slots import Slot

log = logging.getLogger("prefork")
FENCED = "the lease is lost"
PASSAGE_S = 1e-9  # that a byte of the arguments takes to a child, while the child does nothing else


class Work:
    """What is being worked on, and by whom. What stands here without a value is given it before it begins."""

    shutdown: Shutdown
    claims: Claims
    on_ready: Callable[[Process], None]

    def __init__(
        self, app: Prefork, settings: Settings, loop: Loop, clock: ServerClock, settlement: Settlement, pool: Pool
    ) -> None:
        self._settings, self._clock, self._settlement, self._pool = settings, clock, settlement, pool
        self.tasks = app.tasks
        self.task_list: list[Task[..., Any]] = list(self.tasks.values())
        self._loop, self._ahead_armed = loop, False
        self.times = RunTimes()
        self.intake = Intake(app, settings, self.task_list, clock, settlement, self.times)
        self.dispatcher: Dispatcher[Order] = Dispatcher(pool.slots)
        self.deadlines = Deadlines(loop, pool)
        self.cancels = Cancels(loop, pool, self.dispatcher, settlement)
        self.lag = LagWatch(loop, self._look_for_lag)
        self.beginnings = Beginnings(loop, pool, self._give_back)
        self.governor = Governor(
            loop, pool, settings.max_memory_per_child_bytes, settings.max_memory_bytes, self._give_back
        )

    @property
    def busy(self) -> bool:
        """Whether anything is claimed and not answered."""
        return bool(self.dispatcher.ready) or any(child.end.unanswered for child in self._pool.children)

    def known_ids(self, queue: str = "") -> set[str]:
        """The messages that are claimed and not answered; of one queue, or of all."""
        orders = [*self.dispatcher.ready]
        for child in self._pool.children:
            orders += child.end.unanswered.values()
        return {order.message.id for order in orders if queue in ("", order.message.queue)}

    # -- claimed ------------------------------------------------------------------------------------------------

    def claimed(
        self, queue: str, ids: list[bytes], messages: list[bytes], states: list[bytes | None], serial: int
    ) -> None:
        """A claim has brought messages; `serial`: of the first."""
        orders = self.intake.orders(queue, ids, messages, states, serial)
        self._give_back(orders)
        if self.cancels.expected:
            self.cancels.come(orders, last=not self.claims.in_flight)

    # -- handed out ---------------------------------------------------------------------------------------------

    def hand_out(self, now_s: float) -> None:
        """Give what is ready to the children that have room."""
        dispatcher, pool = self.dispatcher, self._pool
        if alone := dispatcher.alone():
            slot, order = alone
            pool.hand(pool.by_slot[slot], [order])
            if not (pool.slots.awake or pool.slots.long):  # else the core may be theirs for a while
                os.sched_yield()  # what is left of this turn can wait, and the child may have been woken on this core
            slot.handed(order.expected_s, now_s)
            self._handed(slot, [order])
        for slot in dispatcher.hoarding():
            self._take_back(slot, now_s)
        if dispatcher.ready:
            for slot, orders in dispatcher.assign(now_s):
                pool.hand(pool.by_slot[slot], orders)
                self._handed(slot, orders)
        if not self.lag.armed and dispatcher.waits():
            self.lag.arm()
        nothing_comes = not dispatcher.ready and self.claims.all_drained
        in_s = None if self._ahead_armed or nothing_comes else dispatcher.ahead_in_s(now_s)
        if in_s is not None:
            self._ahead_armed = True
            self._loop.call_later(in_s, self._look_ahead)

    def _handed(self, slot: Slot, orders: list[Order]) -> None:
        if not slot.left:
            self._pool.finish(self._pool.by_slot[slot])
        self.governor.arm()
        self.beginnings.arm()
        for order in orders:
            if order.terms.timeout_s:
                self.deadlines.watch(order.terms.timeout_s)

    def _look_ahead(self) -> None:
        """A child will be done in a moment: it gets a spare, or a claim is made, at the end of this turn."""
        self._ahead_armed = False

    def _look_for_lag(self) -> None:
        """Nothing waits behind a task that takes longer than expected: others here get it, or other workers."""
        now_s = time.monotonic()
        for slot in self._pool.slots.lagging(now_s):
            self._take_back(slot, now_s)
        if not self.claims.in_flight:  # what is on its way was claimed later, and must not overtake
            self._settlement.put_back(self.dispatcher.stale(now_s))

    def _give_back(self, orders: list[Order]) -> None:
        if self.shutdown.begun:
            self.shutdown.unstarted += orders
        else:
            self.dispatcher.add(orders, time.monotonic())

    def _take_back(self, slot: Slot, now_s: float) -> None:
        self.dispatcher.add(self._pool.take_back(self._pool.by_slot[slot]), now_s)

    def resize(self, size: int) -> None:
        """Have so many children from now on."""
        self.dispatcher.add(self._pool.resize(size), time.monotonic())

    # -- answered -----------------------------------------------------------------------------------------------

    def on_answers(self, child: Process, answers: list[Answer]) -> None:
        """A child has answered, or said how far it is."""
        # Of the time when they were read: what runs now has begun before, so that its deadline is never early.
        now_s, settle, times = time.monotonic(), child.end.settle, self.times
        debug = log.isEnabledFor(logging.DEBUG)
        for answer in answers:
            if answer.kind == frames.PROGRESS:
                self._on_progress(child, answer)
                continue
            order = settle(answer.number)
            if order is None:
                continue
            name = order.message.header.task
            child.slot.answered(order.expected_s, now_s)
            times.observe(name, answer.ran_s + len(order.message.body) * PASSAGE_S)
            if child.killed_for == FENCED:
                continue
            try:
                self._settlement.answered(order, answer, self.claims.channel, child.pid)
            except Exception as error:  # as above
                log.exception("the answer of %s %s cannot be handled", name, order.message.id)
                self._settlement.bad(
                    order.message.id.encode(), order.message.queue, f"its answer cannot be handled: {error!r}"
                )
            if debug:
                done = "failed" if answer.kind == frames.FAILED else "done"
                log.debug("%s %s %s in %.6f s", name, order.message.id, done, answer.ran_s)
        self._look_at_peak(child, max(answer.peak_kib for answer in answers))

    def on_done(self, child: Process, data: bytes) -> bytes:
        """The same in C for the usual answers, done at the first attempt, as far as they come first. -> the rest"""
        times, settlement = self.times, self._settlement
        if fast.compiled is None or child.killed_for == FENCED or log.isEnabledFor(logging.DEBUG):
            return data
        size, orders, expected_s, peak_kib, times.mix_s = fast.compiled.done(
            data, child.end.unanswered, settlement.outboxes, times.known, times.mix_s, self._clock.now_ms()
        )
        if orders:
            child.slot.answered(expected_s, time.monotonic(), orders)
        self._look_at_peak(child, peak_kib)
        return data[size:]

    def _on_progress(self, child: Process, answer: Answer) -> None:
        order = child.end.unanswered.get(answer.number)
        with contextlib.suppress(ValueError):  # a task may write into the pipe
            if order:
                self._settlement.progress(order.message, orjson.loads(answer.payload))

    def _look_at_peak(self, child: Process, peak_kib: int) -> None:
        """Replace a child whose memory has grown beyond `max_memory_per_child`."""
        limit = self._settings.max_memory_per_child_bytes
        if limit and peak_kib << 10 > limit and child.slot.open:
            log.info("child %d (pid %d) has used %d MB; another takes its place", child.number, child.pid,
                     peak_kib >> 10)  # fmt: skip
            self.dispatcher.add(self._pool.take_back(child), time.monotonic())
            self._pool.finish(child)

    # -- died ---------------------------------------------------------------------------------------------------

    def on_death(self, death: Death) -> None:
        """A child has ended; what it held needs a place."""
        child, now_s = death.child, time.monotonic()
        for order in death.running:
            message, ran_s = order.message, now_s - child.slot.head_since_s
            outcome = self._placed(order, death, ran_s)
            log.log(
                logging.INFO if child.killed_for.startswith((BECAUSE, CANCELLED)) else logging.ERROR,
                "child %d (pid %d) %s in %s id=%s attempt=%d ran=%.1fs rss=%dMB: %s%s", child.number, child.pid,
                death.how, message.header.task, message.id, order.attempt, ran_s, death.peak_kib >> 10, outcome,
                f"\n{death.stack}" if death.stack else "",
            )  # fmt: skip
        idle = not death.running and not death.wanted and not self.shutdown.begun
        if idle and (child.state is not ChildState.BOOTING or self._pool.crashes.is_news(death.how)):
            log.error("child %d (pid %d) %s, with nothing running", child.number, child.pid, death.how)
        if death.waiting and child.killed_for != FENCED:
            if self.shutdown.begun:
                self.shutdown.unstarted += death.waiting
            else:
                self.dispatcher.add(death.waiting, now_s)

    def drop_all(self) -> tuple[int, int]:
        """The lease is lost, others have it all: stop what runs. -> how many ran, how many had not started"""
        unstarted, stopped = len(self.dispatcher.ready), 0
        self.dispatcher.ready.clear()
        for child in list(self._pool.children):
            unstarted += len(self._pool.take_back(child))
            if child.end.unanswered:
                stopped += 1
                self._pool.kill(child, FENCED)
                child.killed_for = FENCED  # be it in the middle of being killed for another reason
        return stopped, unstarted

    def _placed(self, order: Order, death: Death, ran_s: float) -> str:
        """Give what the dead child was running its place. -> which, in words"""
        child, why = death.child, death.child.killed_for
        known = evidence.of_death(child.pid, death.how, death.peak_kib, death.cpu_s, death.stack)
        if why == FENCED:
            return "another worker has it now"
        if why.startswith("timeout") and child.killed_order is not order:
            self.dispatcher.add([order], time.monotonic())  # it began in the moment between the look and the kill
            return f"back to queue {order.message.queue}"
        if order.cancelled:
            self._settlement.cancelled(order, f"cancelled: killed after {ran_s:.1f} s", ran_s, known)
            return "cancelled"
        if why.startswith("timeout"):
            self._settlement.timed_out(order, ran_s, known)
            return "failed at its deadline"
        if why.startswith(BECAUSE) or (self.shutdown.begun and death.asked_to_end):
            self.shutdown.killed.append(order)
            return f"back to queue {order.message.queue}"
        return self._settlement.crashed(order, death.how, ran_s, death.peak_kib, known)
