"""When deadlines are looked at, with made-up children."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from prefork.worker.deadline import Deadlines
from tests.worker.test_claims import Loop


class Pool:
    """Children that run, each with what waits behind it: their timeouts in seconds, 0 for none."""

    def __init__(self, *children: list[float]) -> None:
        self.children = [self._child(timeouts) for timeouts in children]
        self.asked: list[Any] = []
        self.killed: list[Any] = []

    def _child(self, timeouts: list[float]) -> Any:
        orders = [SimpleNamespace(terms=SimpleNamespace(timeout_s=timeout_s)) for timeout_s in timeouts]
        unanswered = dict(enumerate(orders))
        return SimpleNamespace(
            end=SimpleNamespace(unanswered=unanswered), head=orders[0], killed_for="", killed_order=None, stack="",
            slot=SimpleNamespace(head_since_s=time.monotonic()),
        )  # fmt: skip

    def read(self, child: Any) -> None: ...

    def ask_stack(self, child: Any, then: Any) -> None:
        self.asked.append(then)

    def kill(self, child: Any, why: str) -> None:
        child.killed_for = why
        self.killed.append(child)


class LiveLoop(Loop):
    def call_later(self, delay_s: float, callback: Any) -> Any:
        timer = super().call_later(delay_s, callback)
        timer.due_s = time.monotonic() + delay_s  # type: ignore[attr-defined]
        return timer


def looked_at(pool: Pool) -> tuple[LiveLoop, Deadlines]:
    loop = LiveLoop()
    deadlines = Deadlines(loop, pool)  # type: ignore[arg-type]
    return loop, deadlines


def test_there_is_one_timer_however_often_children_are_killed() -> None:
    """Each deadline is looked at again when the child has told its stack."""
    pool = Pool([1.0], [3600.0])
    loop, deadlines = looked_at(pool)
    deadlines.watch(1.0)
    for _ in range(5):
        pool.children[0].slot.head_since_s -= 2.0
        deadlines._look()
        pool.asked.pop()("its stack")
        assert len(pool.killed) == 1
        assert len(loop.live()) == 1
        pool.killed.clear()
        pool.children[0] = Pool([1.0]).children[0]
        deadlines.watch(1.0)
        assert len(loop.live()) == 1


def test_what_waits_behind_a_long_task_has_a_look_in_its_own_time() -> None:
    """It may begin at any moment, and nobody tells when."""
    pool = Pool([3600.0, 0, 5.0])
    loop, deadlines = looked_at(pool)
    deadlines._look()
    (timer,) = loop.live()
    assert timer.delay_s <= 5.0
    assert not pool.asked


def test_nothing_is_looked_at_where_nothing_has_a_timeout() -> None:
    loop, deadlines = looked_at(Pool([0, 0], [0]))
    deadlines._look()
    assert loop.live() == []
