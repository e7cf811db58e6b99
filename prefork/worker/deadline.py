"""Hard timeouts, children that lag, and those that do not begin. The soft timeout is the child's own (child.py).

Timers are armed only while they can matter, and look at what is true when they fire; so a task that is done within its
time costs nothing, and an idle worker sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from prefork.worker.frames import Order
from prefork.worker.loop import Loop, Timer
from prefork.worker.pool import Pool
from prefork.worker.process import Process
from prefork.worker.slots import LAG_S

LOOK_S = 3.0


class Deadlines:
    """Kills children whose task is over its time."""

    def __init__(self, loop: Loop, pool: Pool) -> None:
        self._loop, self._pool = loop, pool
        self._timer: Timer | None = None

    def watch(self, timeout_s: float) -> None:
        """A child was handed a task with this timeout: look no later than then."""
        if timeout_s and (self._timer is None or self._timer.due_s > time.monotonic() + timeout_s):
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_later(timeout_s, self._look)

    def _look(self) -> None:
        if self._timer:  # this is not always its own time
            self._timer.cancel()
        self._timer = None
        for child in list(self._pool.children):
            left_s = self._left_s(child)
            if left_s is not None and left_s <= 0:
                self._pool.read(child)  # it may have answered just in time
                left_s = self._left_s(child)
                order = child.head
                if left_s is not None and left_s <= 0 and order and not child.killed_for:
                    self._end(child, order)
        if left := [left_s for child in self._pool.children for left_s in self._all_left_s(child) if left_s > 0]:
            self.watch(min(left))

    def _end(self, child: Process, order: Order) -> None:
        """Kill it, once it has told what it is doing."""
        if child.killed_order is order:
            return
        child.killed_order = order

        def kill(stack: str) -> None:
            self._pool.read(child)  # it may have answered meanwhile: late, but done
            if child in self._pool.children and child.head is order:  # else its pid may be another's
                child.stack = stack
                self._pool.kill(child, f"timeout of {order.terms.timeout_s:g} s")
            self._look()

        self._pool.ask_stack(child, kill)

    def _left_s(self, child: Process) -> float | None:
        order = child.head
        if order is None or not order.terms.timeout_s or child.killed_for:
            return None
        return child.slot.head_since_s + order.terms.timeout_s - time.monotonic()

    def _all_left_s(self, child: Process) -> Iterator[float]:
        """When to look again. The time of what waits behind begins when that does: early for it, never late."""
        if child.killed_for:
            return
        if (left_s := self._left_s(child)) is not None:
            yield left_s
        for order in islice(child.end.unanswered.values(), 1, None):
            yield order.terms.timeout_s


class LagWatch:
    """Looks, while anything waits behind another, whether it should wait no longer."""

    def __init__(self, loop: Loop, look: Callable[[], None]) -> None:
        self._loop, self._look = loop, look
        self._timer: Timer | None = None

    @property
    def armed(self) -> bool:
        """Whether a look is due."""
        return self._timer is not None

    def arm(self) -> None:
        """Something waits."""
        if self._timer is None:
            self._timer = self._loop.call_later(LAG_S, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._look()


class Beginnings:
    """Replaces a child that does not begin with what it was given: one that was stopped while it had nothing to do.

    All tokens that it was given are still in the pipe, so that nothing of it can have run; another child gets it. Two
    looks have to find the same, or the first one after a time in which all stood still would find every child guilty.
    """

    def __init__(self, loop: Loop, pool: Pool, give_back: Callable[[list[Order]], None]) -> None:
        self._loop, self._pool, self._give_back = loop, pool, give_back
        self._armed = False
        self._suspects: dict[Process, int] = {}  # the number of what each has not begun with

    def arm(self) -> None:
        """A child was given something."""
        if not self._armed:
            self._armed = True
            self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._armed = False
        before, self._suspects = self._suspects, {}
        for child in list(self._pool.children):
            held = child.end.unanswered
            if not held or child.killed_for:
                continue
            self.arm()
            if child.end.unstarted() == len(held):
                self._suspects[child] = first = next(iter(held))
                if before.get(child) == first:
                    self._replace(child)

    def _replace(self, child: Process) -> None:
        orders = self._pool.take_back(child)
        if not child.end.unanswered:
            self._pool.kill(child, f"it did not begin with what it was given {LOOK_S:g} s ago or before")
        self._give_back(orders)
