"""Cancelling what a worker holds: what has not started is dropped; what runs is told, and killed if it goes on."""

from __future__ import annotations

import logging
import time

from prefork.worker.dispatch import Dispatcher
from prefork.worker.frames import Order
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Process
from prefork.worker.settlement import Settlement

log = logging.getLogger("prefork")
GRACE_S = 5.0  # for a task that was told, until it is killed
AGAIN_S = 0.1  # a thread of the task may have taken the signal: say it again
CANCELLED = "cancelled"  # the reason of a kill begins so


class Cancels:
    """The cancellations of one worker."""

    def __init__(self, loop: Loop, pool: Pool, dispatcher: Dispatcher[Order], settlement: Settlement) -> None:
        self._loop, self._pool, self._dispatcher, self._settlement = loop, pool, dispatcher, settlement
        self.expected: dict[str, int] = {}  # what may be on its way here -> below which serial

    def cancel(self, id: str, serial: int = 0) -> None:
        """An operator wants this task to stop. What is decided already ends when it is settled (settle.lua).

        `serial`: what is on its way here is below it; 0: nothing is.
        """
        if serial:
            self.expected[id] = serial
        waiting = [order for order in self._dispatcher.ready if order.message.id == id]
        for order in waiting:
            self._dispatcher.ready.remove(order)
        for child in self._pool.children:
            if any(order.message.id == id for order in child.end.unanswered.values()):
                waiting += self._stop_in(child, id)
        for order in waiting:
            self._settlement.cancelled(order, "cancelled before it started")

    def come(self, orders: list[Order], *, last: bool) -> None:
        """Orders have come, and are among what is ready now; `last`: nothing more is on its way."""
        for order in orders:
            if order.serial < self.expected.get(order.message.id, 0):
                self.cancel(order.message.id)
        if last:
            self.expected.clear()

    def _stop_in(self, child: Process, id: str) -> list[Order]:
        """-> the order, if the child had not started it"""
        orders = self._pool.take_back(child)
        self._dispatcher.add([order for order in orders if order.message.id != id], time.monotonic())
        running = next(((n, o) for n, o in child.end.unanswered.items() if o.message.id == id), None)
        if running and not running[1].cancelled:
            number, order = running
            order.cancelled = True
            log.info("%s %s is told to stop", order.message.header.task, id)
            self._tell(child, number, time.monotonic() + GRACE_S)
        return [order for order in orders if order.message.id == id]

    def _tell(self, child: Process, number: int, until_s: float) -> None:
        if child not in self._pool.children or number not in child.end.unanswered or child.killed_for:
            return
        if time.monotonic() < until_s:
            self._pool.tell_to_stop(child, number)
            self._loop.call_later(AGAIN_S, lambda: self._tell(child, number, until_s))
            return

        def kill(stack: str) -> None:
            self._pool.read(child)
            if child in self._pool.children and number in child.end.unanswered:
                child.stack = stack
                self._pool.kill(child, f"{CANCELLED} {GRACE_S:g} s ago")

        self._pool.ask_stack(child, kill)
