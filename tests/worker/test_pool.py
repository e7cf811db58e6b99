"""The pool with real children, and a loop that has nothing else to do."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator

import pytest

from prefork.worker import frames
from prefork.worker.frames import Answer
from prefork.worker.handoff import ChildEnd
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Death, Process, State
from prefork.worker.slate import Slate
from tests.conftest import PATIENCE_S


class Nursery:
    """Four children. `lives`, when each is forked: whether it works, or dies at its start; None: it hangs."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.answer_every_s = 3600.0
        self.ready: list[Process] = []
        self.deaths = 0
        self.pool = Pool(self.loop, 4, None, self._live)
        self.pool.owner = self
        self.loop.after = self._turn

    def lives(self) -> bool | None:
        raise NotImplementedError

    def _live(self, number: int, end: ChildEnd, slate: Slate) -> None:
        os.setsid()
        lives = self.lives()
        if lives is None:
            time.sleep(3600)  # its hooks never end
        elif lives:
            end.answer(0, frames.READY)
            while True:
                time.sleep(self.answer_every_s)
                end.answer(1, frames.DONE)

    def run(self) -> None:
        """Until all are there."""
        self.pool.fill()
        self._look()
        limit = self.loop.call_later(PATIENCE_S, self.loop.stop)
        self.loop.run()
        limit.cancel()

    def _look(self) -> None:
        self.pool.reap()
        self.loop.call_later(0.005, self._look)

    def _turn(self) -> None:
        if self.is_over():
            self.loop.stop()

    def is_over(self) -> bool:
        return [child.state for child in self.pool.children] == [State.READY] * 4

    def on_ready(self, child: Process) -> None:
        self.ready.append(child)

    def on_death(self, death: Death) -> None:
        self.deaths += 1

    def on_answers(self, child: Process, answers: list[Answer]) -> None: ...

    def on_done(self, child: Process, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        self.pool.growing = False
        for child in self.pool.children:
            self.pool.kill(child, "the test is over")
            os.waitpid(child.pid, 0)
        self.pool.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    it = Nursery()
    yield it
    it.close()


def test_all_children_are_there_as_soon_as_one_works_though_another_had_to_wait(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one that lives is forked when five have died. After eight the next one is tried, and dies, so that a
    long pause has begun when the first one is trusted."""
    times = nursery.pool.crashes

    def lives() -> bool:
        return times.times != 8 if nursery.ready else times.times == 5

    monkeypatch.setattr(nursery, "lives", lives)
    monkeypatch.setattr("prefork.worker.crashes.LONGEST_PAUSE_S", 3600.0)
    pause_s = nursery.pool.crashes.pause_s
    monkeypatch.setattr(times, "pause_s", lambda why: 3600.0 if times.times > 8 else pause_s(why))
    nursery.run()
    assert len(nursery.pool.children) == 4
    assert nursery.deaths >= 8


def test_a_child_that_the_system_refused_is_not_the_last_one_that_is_tried(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, refused = os.fork, list[None]()

    def refuse_twice() -> int:
        if len(refused) < 2:
            refused.append(None)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr("prefork.worker.pool.os.fork", refuse_twice)
    monkeypatch.setattr("prefork.worker.pool.SETTLED_S", 3600.0)  # nobody trusts again
    monkeypatch.setattr(nursery, "lives", lambda: True)
    nursery.run()
    assert len(nursery.pool.children) == 4


def leave_three(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that work, and one that is dead and has none to follow it."""
    nursery.answer_every_s = 0.001
    monkeypatch.setattr(nursery, "lives", lambda: len(nursery.ready) < 4)
    nursery.run()
    os.kill(nursery.pool.children[0].pid, signal.SIGKILL)


def test_children_that_have_long_worked_do_not_end_the_pauses_of_those_that_cannot_start(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a database has no connection left for the next one. Else the master forks as fast as they die."""
    leave_three(nursery, monkeypatch)
    monkeypatch.setattr(nursery, "is_over", lambda: nursery.pool.crashes.times > 7)
    nursery.run()
    assert nursery.is_over()
    assert len(nursery.pool.children) == 3


def test_a_child_that_never_starts_is_told_of_and_others_are_tried(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that is tried after a crash loop connects to what never answers."""
    monkeypatch.setattr("prefork.worker.pool.BOOT_S", 0.3)
    monkeypatch.setattr(nursery, "lives", lambda: False if nursery.pool.crashes.times < 8 else None)
    told = "has not started after 0.3 s: its on_child_start hooks still run"
    monkeypatch.setattr(nursery, "is_over", lambda: len(nursery.pool.children) == 3 and told in caplog.text)
    nursery.run()
    assert nursery.is_over()
    assert all(child.state is State.BOOTING for child in nursery.pool.children)


def test_a_crash_loop_is_over_when_fewer_are_wanted_and_all_of_them_work(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_three(nursery, monkeypatch)
    monkeypatch.setattr(nursery, "is_over", lambda: nursery.pool.crashes.too_many)
    nursery.run()
    nursery.pool.resize(3)
    monkeypatch.setattr(nursery, "is_over", lambda: nursery.pool.crashes.times == 0)
    nursery.run()
    assert nursery.is_over()
