"""The stack of a child that runs and does not answer, with real children."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from prefork.worker import frames, stack
from prefork.worker.frames import Answer
from prefork.worker.handoff import ChildEnd
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Death, Process
from prefork.worker.slate import STACK_SIGNAL, Slate

LIMIT_S = 30.0
AskedStack = Callable[[Callable[[], object]], str]


class Owner:
    """One who gives no work."""

    def __init__(self, on_ready: Callable[[Process], None]) -> None:
        self.on_ready = on_ready

    def on_answers(self, child: Process, answers: list[Answer]) -> None: ...

    def on_done(self, child: Process, data: bytes) -> bytes:
        return data

    def on_death(self, death: Death) -> None: ...


def spin(mark: mmap.mmap) -> None:
    while True:
        mark[0] = 1


@pytest.fixture
def asked_stack() -> Iterator[AskedStack]:
    """What the master is told of a child that does something before it spins, and is asked for its stack then."""
    loop, pools = Loop(), list[Pool]()

    def ask(first: Callable[[], object]) -> str:
        def live(number: int, end: ChildEnd, slate: Slate) -> None:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            slate.listen()
            first()
            end.answer(0, frames.READY)
            spin(mark)

        def told(stack: str) -> None:
            said.append(stack)
            loop.stop()

        def ask_when_it_spins(child: Process) -> None:
            if mark[0]:
                pool.ask_stack(child, told)
            else:
                loop.call_later(0.005, lambda: ask_when_it_spins(child))

        said, mark = list[str](), mmap.mmap(-1, 1)
        pool = Pool(loop, 1, None, live)
        pools.append(pool)
        pool.owner = Owner(ask_when_it_spins)
        pool.fill()
        limit = loop.call_later(LIMIT_S, loop.stop)
        loop.run()
        limit.cancel()
        return said[0]

    yield ask
    for pool in pools:
        pool.growing = False
        for child in pool.children:
            pool.kill(child, "the test is over")
            os.waitpid(child.pid, 0)
        pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what the child waits for")
def test_a_child_that_gets_no_core_is_waited_for(asked_stack: AskedStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "PAUSES_S", ())
    monkeypatch.setattr(stack, "LATE_PAUSES_S", (0.1,) * 200)
    assert "in spin" in asked_stack(lambda: None)


def test_a_child_that_will_not_tell_is_not_waited_for(asked_stack: AskedStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "LATE_PAUSES_S", (3600.0,))
    blocked = asked_stack(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [STACK_SIGNAL]))
    assert "no Python stack" in blocked or sys.platform != "linux"


def test_all_threads_of_a_child_are_told(asked_stack: AskedStack) -> None:
    there, waits = threading.Event(), threading.Event()

    def wait_aside() -> None:
        there.set()
        waits.wait()

    def begin() -> None:
        threading.Thread(target=wait_aside, daemon=True).start()
        there.wait()

    told = asked_stack(begin)
    assert "in spin" in told
    assert "in wait_aside" in told
