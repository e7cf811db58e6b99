"""A child as the master sees it, and what is known when it has ended."""

from __future__ import annotations

import contextlib
import enum
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import orjson
import psutil

from prefork.worker.frames import Order
from prefork.worker.handoff import MasterEnd
from prefork.worker.loop import Timer
from prefork.worker.slate import Slate
from prefork.worker.slots import Slot

Ended = tuple[int, int, resource.struct_rusage]


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
    slate: Slate
    slot: Slot = field(default_factory=Slot)
    state: State = State.BOOTING
    born_s: float = field(default_factory=time.monotonic)
    killed_for: str = ""  # why the master killed it
    killed_order: Order | None = None  # because of which
    stack: str = ""  # what it was doing then
    boot_error: str = ""  # why it could not start, in a line
    boot_watch: Timer | None = None  # until it has started

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
    cpu_s: float  # of its whole life
    stack: str  # what it was doing, as far as is known


def how(status: int, killed_for: str, *, out_of_memory: bool = False) -> str:
    """An exit status in words. `out_of_memory`: the kernel has killed something for that reason just now."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if killed_for:
            return f"killed by {name}: {killed_for}"
        if out_of_memory and number == signal.SIGKILL:
            return "killed by the kernel, which was out of memory"
        hints: dict[int, str] = {signal.SIGKILL: " (out of memory?)", signal.SIGSEGV: " (a fault in C code)"}
        hint = hints.get(number, "")
        return f"killed by {name}{hint}"
    code = os.waitstatus_to_exitcode(status)
    meaning = {11: " (could not start)", 12: " (its pipes to the master were closed)"}.get(code, "")
    return f"exited with {code}{meaning}"


def kill_family(pid: int) -> None:
    """End a child now, with all that its tasks have started, also in sessions of their own."""
    # Whom to ask is known only as long as the child lives: then its children become somebody else's.
    try:
        strays = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        strays = []
    for send in (os.killpg, os.kill):  # it may have no group of its own yet
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may be a program of another user now
            send(pid, signal.SIGKILL)
    for stray in strays:
        with contextlib.suppress(psutil.Error):
            stray.kill()  # not if its pid is another's by now


def send(pid: int, number: int) -> None:
    """Send a signal to a child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def ended(children: Callable[[], Collection[int]], others: Collection[int]) -> Iterator[Ended]:
    """Reap what has ended of all processes, be they unknown: this may be pid 1. -> pid, status, usage of each"""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        for pid in [*others, *children()]:
            if found := _reap(pid, is_child=pid in children()):
                yield found
        return
    while True:
        try:
            first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if first is None:
            return
        if found := _reap(first.si_pid, is_child=first.si_pid in children()):
            yield found


def _reap(pid: int, *, is_child: bool) -> Ended | None:
    before = hasattr(os, "waitid")  # it has ended, then; until it is reaped, its group's number is its own
    if is_child and before:
        _end_group(pid)
    try:
        gone, status, usage = os.wait4(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    if gone and is_child and not before:
        _end_group(pid)
    return (pid, status, usage) if gone else None


def _end_group(pid: int) -> None:
    """What its tasks have started and left running."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def used_of(usage: resource.struct_rusage) -> tuple[int, float]:
    """Peak memory in KiB, and CPU time, of a child that was reaped."""
    peak_kib = usage.ru_maxrss if sys.platform == "linux" else usage.ru_maxrss >> 10
    return peak_kib, usage.ru_utime + usage.ru_stime


def used(pid: int) -> tuple[int, float]:
    """The same, of one that is still there: the memory that it has now."""
    try:
        it = psutil.Process(pid)
        times = it.cpu_times()
        return it.memory_info().rss >> 10, times.user + times.system
    except psutil.Error:
        return 0, 0.0


def boot_error(payload: bytes) -> str:
    """Why a child could not start, from its answer."""
    try:
        error = orjson.loads(payload)
        return str(error["traceback"] or error["class"]).rstrip()
    except (ValueError, TypeError, KeyError):  # its hook has written into the pipe
        return "what it said cannot be read"
