"""What is a child doing? It is asked by a signal, and writes its Python stack to its slate, also when stuck in C.

The master goes on meanwhile, and looks again and again: until the stack is written, or it is clear that none will be.
"""

from __future__ import annotations

from collections.abc import Callable

from prefork.worker import process
from prefork.worker.evidence import awaits_core, ran_ns, without_stack
from prefork.worker.loop import Loop
from prefork.worker.process import Process
from prefork.worker.slate import STACK_SIGNAL

PAUSES_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.1)  # between two looks
LATE_PAUSES_S = (0.1,) * 20  # the same, as long as the child is ready to run and gets no core
ENOUGH_NS = 10_000_000  # of a core, to write it


def ask(loop: Loop, child: Process, lives: Callable[[], bool], then: Callable[[str], None]) -> None:
    """Call `then` with its stack; with why not if it does not tell it in a quarter of a second, or in two more while it
    gets no core; with what there is when it has died.
    """
    child.slate.wipe()
    pauses, late = iter(PAUSES_S), iter(LATE_PAUSES_S)
    before = ""

    def look() -> None:
        nonlocal before
        if not lives():
            return then(before)
        # Before the stack is read: what it writes between the two is seen.
        starved = awaits_core(child.pid) and 0 <= ran_ns(child.pid) - asked_ns < ENOUGH_NS
        stack, pause_s = child.slate.stack(), next(pauses, None)
        written = stack and stack == before and not starved  # else it may be in the middle of its writing
        if pause_s is None and not written and (stack or starved):
            pause_s = next(late, None)
        if pause_s is None or written:
            child.slate.wipe()
            return then(stack or without_stack(child.pid))
        before = stack
        loop.call_later(pause_s, look)
        return None

    process.send(child.pid, STACK_SIGNAL)
    asked_ns = ran_ns(child.pid)  # what it ran before it was asked does not count
    look()
