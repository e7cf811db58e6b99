"""Hard timeouts, and children that lag. The soft timeout is the child's own (child.py).

Timers are armed only while they can matter, and look at what is true when they fire; so a task that is done within its
time costs nothing, and an idle worker sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prefork.worker.frames import Order
from prefork.worker.loop import Loop, Timer
from prefork.worker.pool import Pool
from prefork.worker.process import Process
from prefork.worker.slots import LAG_S


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
        self._timer = None
        for child in list(self._pool.children):
            left_s = self._left_s(child)
            if left_s is not None and left_s <= 0:
                self._pool.read(child)  # it may have answered just in time
                left_s = self._left_s(child)
                order = child.head
                if left_s is not None and left_s <= 0 and order and not child.killed_for:
                    self._end(child, order)
        left = [left_s for child in self._pool.children if (left_s := self._left_s(child)) is not None and left_s > 0]
        # Others wait behind: their own time begins when they start, so that this look is early for them, never late.
        if left:
            self.watch(min(left))

    def _end(self, child: Process, order: Order) -> None:
        """Kill it, once it has told what it is doing."""
        if child.killed_order is order:
            return
        child.killed_order = order

        def kill(stack: str) -> None:
            self._pool.read(child)  # it may have answered meanwhile: late, but done
            if child.head is order:
                child.stack = stack
                self._pool.kill(child, f"timeout of {order.terms.timeout_s:g} s")
            self._look()

        self._pool.ask_stack(child, kill)

    def _left_s(self, child: Process) -> float | None:
        order = child.head
        if order is None or not order.terms.timeout_s or child.killed_for:
            behind = [t for o in child.end.unanswered.values() if (t := o.terms.timeout_s)]
            return min(behind) if behind and not child.killed_for else None
        return child.slot.head_since_s + order.terms.timeout_s - time.monotonic()


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
