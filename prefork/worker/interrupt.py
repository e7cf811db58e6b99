"""What ends a task from within its own process: the soft timeout, and the master's word that it shall stop."""

from __future__ import annotations

import signal
import types
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefork.errors import Cancelled, SoftTimeout
from prefork.worker.slate import STOP_SIGNAL, Slate

if TYPE_CHECKING:
    import asyncio


class Stopper:
    """Raises Cancelled in the task that the master wants stopped; cancels it if it is a coroutine.

    `running`: the number of the order whose task is running now; 0: none. `coroutine`, `loop`: of an async one.
    """

    def __init__(self, slate: Slate) -> None:
        self._slate = slate
        self._told = 0
        self.running = 0
        self.coroutine: Coroutine[Any, Any, Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def arm(self) -> None:
        """Hear the master from now on."""
        signal.signal(STOP_SIGNAL, self._hear)

    def _hear(self, *_: object) -> None:
        # The number tells whether it is still that task: the signal may have been long on its way.
        if not self.running or self._told == self.running or self._slate.to_stop() != self.running:
            return
        self._told = self.running
        if self.coroutine is None or self.loop is None:
            raise Cancelled("told to stop by an operator")
        import asyncio  # the loop has it

        task = next((t for t in asyncio.all_tasks(self.loop) if t.get_coro() is self.coroutine), None)
        if task:
            self.loop.call_soon_threadsafe(task.cancel)


@contextmanager
def soft_timeout(soft_s: float) -> Generator[None, None, None]:
    """Raise SoftTimeout in the block, once, when it takes longer."""
    armed = True

    def fire(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise SoftTimeout(f"still running after {soft_s:g} s")

    signal.signal(signal.SIGALRM, fire)  # each time: a task may have put its own there, or blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Again and again: in a process with threads, the kernel may give a signal to one that does not run the handler.
    signal.setitimer(signal.ITIMER_REAL, soft_s, 0.1)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


async def with_soft_timeout(coroutine: Coroutine[Any, Any, Any], soft_s: float) -> Any:
    """Await a coroutine; when its time is over, raise SoftTimeout inside it, where it waits."""
    import asyncio  # whoever awaits this has it

    running = asyncio.current_task()
    assert running
    over = False

    def fire() -> None:
        nonlocal over
        over = True
        running.cancel()

    timer = asyncio.get_running_loop().call_later(soft_s, fire)

    @types.coroutine
    def drive() -> Generator[Any, Any, Any]:
        sent: Any = None
        raised: BaseException | None = None
        told = False
        while True:
            try:
                waits_for = coroutine.throw(raised) if raised else coroutine.send(sent)
            except StopIteration as end:
                return end.value
            sent = raised = None
            try:
                sent = yield waits_for
            except asyncio.CancelledError as cancelled:
                raised = cancelled
                if over and not told:
                    told = True
                    running.uncancel()
                    raised = SoftTimeout(f"still running after {soft_s:g} s")
            except BaseException as error:
                raised = error

    try:
        return await drive()
    finally:
        timer.cancel()
