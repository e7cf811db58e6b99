"""The pool of children: spawn, reap, kill, recycle. It knows nothing of Redis.

A dead child is reaped at once: first its answers are read to their end, then its tokens; what is left was running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from prefork.worker import fast, process, stack
from prefork.worker.crashes import CrashLoop
from prefork.worker.evidence import OutOfMemory
from prefork.worker.frames import BOOT_FAILED, READY, Answer, Order
from prefork.worker.handoff import ChildEnd, MasterEnd
from prefork.worker.loop import Loop, Timer
from prefork.worker.process import Death, Process, State
from prefork.worker.slate import STOP_SIGNAL, Slate
from prefork.worker.slots import Slot, Slots

log = logging.getLogger("prefork")
STARTS = (READY, BOOT_FAILED)
SETTLED_S = 1.0  # a child that lives so long after its start is not part of a crash loop
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
UNLIMITED = 1 << 62
UNKILLABLE_S = 2.0  # after a kill: more than a child needs to give its memory back
BOOT_S = 60.0
LOST_S = 0.5  # from the end of a child's pipe to its own, at most


class Owner(Protocol):
    """Who uses the children."""

    def on_ready(self, child: Process) -> None:
        """A child has come up."""

    def on_answers(self, child: Process, answers: list[Answer]) -> None:
        """A child has answered, or said how far it is."""

    def on_done(self, child: Process, data: bytes) -> bytes:
        """What a child has said, as it came, for those who read it faster. -> what is left of it to be read"""

    def on_death(self, death: Death) -> None:
        """A child has ended; what it held needs a place."""


class Pool:
    """As many children as are wanted, never more. `owner` is given it before it begins."""

    owner: Owner

    def __init__(
        self, loop: Loop, size: int, tasks_per_child: int | None,
        live: Callable[[int, ChildEnd, Slate], None],
    ) -> None:  # fmt: skip
        self._loop, self._live = loop, live
        self.size, self._tasks_per_child = size, tasks_per_child
        self.children: list[Process] = []
        self.slots = Slots()
        self.by_slot: dict[Slot, Process] = {}
        self.strangers: dict[int, Callable[[int], None]] = {}  # other processes of ours: pid -> who wants its status
        self.other_descriptors: Callable[[], Iterable[int]] = tuple
        self.crashes = CrashLoop()
        self._oom = OutOfMemory()
        self._pause: Timer | None = None  # until the next one may be tried
        self._left_behind = 0
        self.growing = True

    # -- spawn --------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Fork until there are as many children as wanted; later, if they keep dying, or the system refuses."""
        # As many as are wanted may be left behind and replaced; no more, or a dead disk would fill the host with them.
        most = self.size - max(0, self._left_behind - self.size)
        while self.growing and self._pause is None and len(self.children) < most:
            if self.crashes.too_many:
                self._back_off(f"{self.crashes.times} children died in a row with no task")
            else:
                self._try_to_spawn()

    def _try_to_spawn(self) -> None:
        try:
            self._spawn()
        except OSError as error:  # no process, no memory, no descriptor left
            self.crashes.count(f"cannot fork: {error.strerror}")
            self._back_off(f"cannot fork a child: {error.strerror}")

    def _back_off(self, why: str) -> None:
        def again() -> None:
            self._pause = None
            if self.growing and len(self.children) < self.size:
                self._try_to_spawn()
            if not self.crashes.too_many:
                self.fill()

        self._pause = self._loop.call_later(self.crashes.pause_s(why), again)

    def _spawn(self) -> None:
        taken = {child.number for child in self.children}
        number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        for stream in (sys.stdout, sys.stderr):  # what stands there would be written by each child once more
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        end, slate = MasterEnd(), None
        # A signal that came between the fork and the child's own handlers would go to the master's pipe.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            slate = Slate()
            pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            end.forked()
            end.close()
            if slate:
                slate.close()
            raise
        if pid == 0:
            for fd in self.other_descriptors():
                os.close(fd)
            self.close()
            self._live(number, end.child_end(), slate)
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        end.forked()
        child = Process(number, pid, end, slate, Slot(self.slots, left=self._tasks_per_child or UNLIMITED))
        child.boot_watch = self._loop.call_later(BOOT_S, lambda: self._boots_late(child))
        self.children.append(child)
        self.by_slot[child.slot] = child

        def readable() -> None:
            self.read(child)

        self._loop.on_read(end.answer_r, readable)

    # -- work ---------------------------------------------------------------------------------------------------

    def hand(self, child: Process, orders: list[Order]) -> None:
        """Give it orders."""
        if not child.end.hand(orders):
            self._loop.on_write(child.end.task_w, lambda: self._write_on(child))

    def _write_on(self, child: Process) -> None:
        if child.end.write_on():
            self._loop.on_write(child.end.task_w, None)

    def read(self, child: Process, *, reaped: bool = False) -> bool:
        """Read what a child has answered. -> whether there was anything to read

        `reaped`: its pid may be another's by now.
        """
        try:
            answers = child.end.receive(partial(self._done, child) if fast.compiled else None)
        except EOFError:
            self._loop.forget(child.end.answer_r)  # it is dying, or has closed its pipe
            self._loop.call_later(LOST_S, lambda: self._end_lost(child))
            return False
        except ValueError as error:
            self._loop.forget(child.end.answer_r)
            if not reaped:
                self.kill(child, f"it sent garbage: {error}")
            return False
        if answers is None:
            return False
        work: list[Answer] = []
        for answer in answers:
            if answer.kind in STARTS:
                self._on_start(child, answer, reaped=reaped)
            else:
                work.append(answer)
        if work:
            self._trust_again(child)
            self.owner.on_answers(child, work)
        return True

    def _done(self, child: Process, data: bytes) -> bytes:
        rest = self.owner.on_done(child, data)
        if len(rest) < len(data):
            self._trust_again(child)
        return rest

    def _boots_late(self, child: Process) -> None:
        """Its hooks may load something large, or wait for what will never come: that is said, and others are tried."""
        log.warning("child %d (pid %d) has not started after %g s: its on_child_start hooks still run", child.number,
                    child.pid, BOOT_S)  # fmt: skip
        if self.growing and self._pause is None and len(self.children) < self.size:
            self._try_to_spawn()

    def _on_start(self, child: Process, answer: Answer, *, reaped: bool) -> None:
        """A child says whether it could start."""
        if child.boot_watch:
            child.boot_watch.cancel()
        if child.state is State.READY:  # a task has written into the pipe
            if not reaped:
                self.kill(child, "it sent garbage: it said a second time how it had started")
        elif answer.kind == READY:
            child.state = State.READY if child.state is State.BOOTING else child.state
            child.slot.open = child.state is State.READY
            if self.crashes.times:
                self._loop.call_later(SETTLED_S, lambda: self._trust_again(child))
            self.owner.on_ready(child)
        else:
            child.killed_for = "on_child_start failed"
            why = process.boot_error(answer.payload)
            child.boot_error = why.rpartition("\n")[2]
            if self.crashes.is_news(why):
                log.error("child %d could not start: %s", child.number, why)

    def _end_lost(self, child: Process) -> None:
        """Its task has closed the pipe, or has become another program: no answer can come any more."""
        if child in self.children:
            self.kill(child, "it had closed its pipe to the master")

    def _trust_again(self, child: Process) -> None:
        """A child works that was forked since others have died: more will. Or all that are wanted work."""
        if not self.crashes.times or child not in self.children:
            return
        whole = len(self.children) >= self.size and all(it.state is State.READY for it in self.children)
        if whole or child.born_s >= self.crashes.since_s:
            if self.crashes.too_many and self._pause:
                self._pause.cancel()
                self._pause = None
            self.crashes.over()
            self.fill()

    def take_back(self, child: Process) -> list[Order]:
        """Take back what it has not started."""
        orders = child.end.take_back()
        for order in orders:
            child.slot.taken_back(order.expected_s)
        return orders

    # -- end ----------------------------------------------------------------------------------------------------

    def finish(self, child: Process) -> None:
        """Give it no more; it ends when it has done what it holds, and another takes its place."""
        if child.state is not State.FINISHING:
            child.state = State.FINISHING
            child.slot.open = False
            child.end.finish()

    def kill(self, child: Process, why: str) -> None:
        """End it now, with all that its tasks have started."""
        if not child.killed_for:
            self._loop.call_later(UNKILLABLE_S, lambda: self._leave_behind(child))
        child.killed_for = child.killed_for or why
        child.slot.open = False
        process.kill_family(child.pid)

    def _leave_behind(self, child: Process) -> None:
        """The kernel does not let it die (a dead network disk, say): what it ran ends as if it had. No step of it
        can run any more, and it is reaped when the kernel lets go."""
        if child not in self.children or not self.growing:  # a worker that stops has a bound of its own
            return
        log.error("child %d (pid %d) does not die, the kernel holds it; it is left behind", child.number, child.pid)

        def ended(_: int) -> None:
            self._left_behind -= 1
            log.info("child %d (pid %d), left behind, has ended", child.number, child.pid)
            self.fill()

        self.strangers[child.pid] = ended
        self._left_behind += 1
        self._bury(child, signal.SIGKILL, *process.used(child.pid))

    def resize(self, size: int) -> list[Order]:
        """Have so many children from now on: more at once, fewer as they get done. -> what those have not started"""
        self.size = size
        staying = [child for child in self.children if child.state is not State.FINISHING]
        orders: list[Order] = []
        for child in sorted(staying, key=lambda child: child.slot.outstanding)[: max(0, len(staying) - size)]:
            orders += self.take_back(child)
            self.finish(child)
        self.fill()
        return orders

    def ask_stack(self, child: Process, then: Callable[[str], None]) -> None:
        """Call `then` with the Python stack of a child, or with why there is none; see `stack`."""
        stack.ask(self._loop, child, lambda: child in self.children, then)

    def tell_to_stop(self, child: Process, number: int) -> None:
        """Let the child raise Cancelled in the task of that order, if it is running it."""
        child.slate.stop(number)
        process.send(child.pid, STOP_SIGNAL)

    def reap(self) -> None:
        """Take leave of all children that have ended."""
        for pid, status, usage in process.ended(lambda: {child.pid for child in self.children}, self.strangers):
            child = next((child for child in self.children if child.pid == pid), None)
            if child:
                self._bury(child, status, *process.used_of(usage))
            elif tell := self.strangers.pop(pid, None):
                tell(status)

    def _bury(self, child: Process, status: int, peak_kib: int, cpu_s: float) -> None:
        while self.read(child, reaped=True):
            pass
        waiting = child.end.take_back()
        running = list(child.end.unanswered.values())
        self._loop.forget(child.end.answer_r)
        if child.boot_watch:
            child.boot_watch.cancel()
        if child.end.backlog:
            self._loop.forget(child.end.task_w)
        child.end.close()
        told = child.stack or child.slate.stack()  # faulthandler writes there as it crashes
        child.slate.close()
        self.children.remove(child)
        child.slot.leave()
        del self.by_slot[child.slot]
        wanted = child.state is State.FINISHING and not running and not child.killed_for
        asked = os.WIFSIGNALED(status) and os.WTERMSIG(status) in ASKING
        strange = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not child.killed_for
        how = process.how(status, child.killed_for, out_of_memory=strange and self._oom.has_struck())
        # A death amid a task is that task's doing, and `max_crashes` bounds it.
        if not wanted and not running and (not child.killed_for or child.state is State.BOOTING):
            self.crashes.count(child.boot_error or how)
        self.owner.on_death(Death(child, how, wanted, asked, running, waiting, peak_kib, cpu_s, told))
        self.fill()

    def close(self) -> None:
        """In a forked process that is no child of this pool: close its copies of all pipes."""
        for child in self.children:
            child.end.close()
            child.slate.close()
