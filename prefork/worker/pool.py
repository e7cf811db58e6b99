"""The pool of children: spawn, reap, kill, recycle. It knows nothing of Redis.

A dead child is reaped at once: first its answers are read to their end, then its tokens; what is left was running.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from prefork.worker.dispatch import Slot
from prefork.worker.handoff import BOOT_FAILED, READY, Answer, ChildEnd, MasterEnd, Order
from prefork.worker.loop import Loop

log = logging.getLogger("prefork")
QUICK_DEATHS_ALLOWED = 5  # in a row, with nothing running; further ones are made to wait
SETTLED_S = 1.0  # a child that lives so long after its start is not part of a crash loop
LONGEST_BACKOFF_S = 30.0
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
UNLIMITED = 1 << 62


class State(enum.Enum):
    """Of a child. A FINISHING one gets no more messages and ends by itself."""

    BOOTING = enum.auto()
    READY = enum.auto()
    FINISHING = enum.auto()


@dataclass(slots=True, eq=False)
class Process:
    """A child, as the master sees it."""

    number: int
    pid: int
    end: MasterEnd
    slot: Slot = field(default_factory=Slot)
    state: State = State.BOOTING
    born_s: float = field(default_factory=time.monotonic)
    killed_for: str = ""  # why the master killed it
    killed_order: Order | None = None  # because of which

    @property
    def head(self) -> Order | None:
        """What it is running, or will run next."""
        return next(iter(self.end.unanswered.values()), None)


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of a child's death. `running`: what it had started; `waiting`: what it had not."""

    child: Process
    how: str
    wanted: bool
    asked_to_end: bool  # by a signal that supervisors send to all processes of a service
    running: list[Order]
    waiting: list[Order]
    peak_kib: int


class Owner(Protocol):
    """Who uses the children."""

    def on_answer(self, child: Process, answer: Answer) -> None:
        """A child has answered, or said how far it is."""

    def on_death(self, death: Death) -> None:
        """A child has ended; what it held needs a place."""


class Pool:
    """As many children as are wanted, never more."""

    def __init__(
        self, loop: Loop, owner: Owner, size: int, tasks_per_child: int | None, live: Callable[[int, ChildEnd], None]
    ) -> None:
        self._loop, self._owner, self._live = loop, owner, live
        self.size, self._tasks_per_child = size, tasks_per_child
        self.children: list[Process] = []
        self.other_descriptors: Callable[[], Iterable[int]] = tuple
        self._deaths = 0
        self._backing_off = False
        self.growing = True

    # -- spawn --------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Fork until there are as many children as wanted; later, if they keep dying, or the system refuses."""
        while self.growing and not self._backing_off and len(self.children) < self.size:
            if self._deaths > QUICK_DEATHS_ALLOWED:
                self._back_off(f"{self._deaths} children died in a row with no task")
            else:
                self._try_to_spawn()

    def _try_to_spawn(self) -> None:
        try:
            self._spawn()
        except OSError as error:  # no process, no memory, no descriptor left
            self._deaths += 1
            self._back_off(f"cannot fork a child: {error.strerror}")

    def _back_off(self, why: str) -> None:
        pause_s = min(LONGEST_BACKOFF_S, 0.1 * 2 ** max(0, self._deaths - QUICK_DEATHS_ALLOWED))
        self._backing_off = True
        log.warning("%s; the next one starts in %.1f s", why, pause_s)

        def again() -> None:
            self._backing_off = False
            if self.growing and len(self.children) < self.size:
                self._try_to_spawn()

        self._loop.call_later(pause_s, again)

    def _spawn(self) -> None:
        taken = {child.number for child in self.children}
        number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        end = MasterEnd()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that came between the fork and the child's own handlers would go to the master's pipe.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            end.forked()
            end.close()
            raise
        if pid == 0:
            for fd in self.other_descriptors():
                os.close(fd)
            for sibling in self.children:
                sibling.end.close()
            self._live(number, end.child_end())
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        end.forked()
        child = Process(number, pid, end, Slot(left=self._tasks_per_child or UNLIMITED))
        self.children.append(child)

        def readable() -> None:
            self.read(child)

        self._loop.on_read(end.answer_r, readable)

    # -- work ---------------------------------------------------------------------------------------------------

    def hand(self, child: Process, orders: list[Order]) -> None:
        """Give it orders; recycle it when it has had its share."""
        if not child.end.hand(orders):
            self._loop.on_write(child.end.task_w, lambda: self._write_on(child))
        if not child.slot.left:
            self.finish(child)

    def _write_on(self, child: Process) -> None:
        if child.end.write_on():
            self._loop.on_write(child.end.task_w, None)

    def read(self, child: Process) -> bool:
        """Read what a child has answered. -> whether there was anything to read"""
        try:
            answers = child.end.receive()
        except EOFError:
            self._loop.forget(child.end.answer_r)  # it is dying, or has closed its pipe and will notice
            return False
        except ValueError as error:
            self._loop.forget(child.end.answer_r)
            self.kill(child, f"it sent garbage: {error}")
            return False
        if answers is None:
            return False
        for answer in answers:
            if answer.kind == READY:
                child.state = State.READY if child.state is State.BOOTING else child.state
                child.slot.open = child.state is State.READY
                if self._deaths:
                    self._loop.call_later(SETTLED_S, lambda: self._trust_again(child))
            elif answer.kind == BOOT_FAILED:
                child.killed_for = "on_child_start failed"
                log.error("child %d could not start: %s", child.number, _boot_error(answer.payload))
            else:
                self._trust_again(child)
                self._owner.on_answer(child, answer)
        return True

    def _trust_again(self, child: Process) -> None:
        """A child works: others will too."""
        if self._deaths and child in self.children:
            self._deaths = 0
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
        child.killed_for = child.killed_for or why
        child.slot.open = False
        for send, target in ((os.killpg, child.pid), (os.kill, child.pid)):  # it may have no group of its own yet
            try:
                send(target, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def reap(self) -> None:
        """Take leave of all children that have ended. Unknown ones are reaped quietly: this may be pid 1."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            self._reap_known()
            return
        while pid := _ended():
            child = next((c for c in self.children if c.pid == pid), None)
            if child:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what its tasks have started and left running
            try:
                _, status, usage = os.wait4(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            if child:
                self._bury(child, status, usage.ru_maxrss if sys.platform == "linux" else usage.ru_maxrss >> 10)

    def _reap_known(self) -> None:
        for child in list(self.children):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                self._bury(child, status, usage.ru_maxrss >> 10)

    def _bury(self, child: Process, status: int, peak_kib: int) -> None:
        while self.read(child):
            pass
        waiting = child.end.take_back()
        running = list(child.end.unanswered.values())
        self._loop.forget(child.end.answer_r)
        if child.end.backlog:
            self._loop.forget(child.end.task_w)
        child.end.close()
        self.children.remove(child)
        wanted = child.state is State.FINISHING and not running and not child.killed_for
        # A death amid a task is that task's doing, and `max_crashes` bounds it.
        if not wanted and not running and (not child.killed_for or child.state is State.BOOTING):
            self._deaths += 1
        asked = os.WIFSIGNALED(status) and os.WTERMSIG(status) in ASKING
        self._owner.on_death(Death(child, _how(status, child.killed_for), wanted, asked, running, waiting, peak_kib))
        self.fill()

    def close(self) -> None:
        """In a forked process that is no child of this pool: close its copies of all pipes."""
        for child in self.children:
            child.end.close()


def _ended() -> int:
    """The pid of a child process that has ended and is not yet reaped; 0 if there is none."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return ended.si_pid if ended else 0


def _how(status: int, killed_for: str) -> str:
    """An exit status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if killed_for:
            return f"killed by {name}: {killed_for}"
        hints: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGSEGV: " (a fault in C code)"}
        hint = hints.get(number, "")
        return f"killed by {name}{hint}"
    code = os.waitstatus_to_exitcode(status)
    meaning = {11: " (could not start)", 12: " (its pipes to the master were closed)"}.get(code, "")
    return f"exited with {code}{meaning}"


def _boot_error(payload: bytes) -> str:
    error = orjson.loads(payload)
    return str(error["traceback"] or error["class"]).rstrip()
