"""Memory: no child may grow until the kernel has to choose whom to kill.

Looked at while tasks run, and only if a limit is set:

- beyond `max_memory_per_child` a child is replaced when it has ended its task (work.py);
- beyond twice that it is killed, with evidence, in the middle of it;
- beyond `max_memory`, for the whole worker, the largest child goes: replaced if it has nothing to do, killed else.

A child whose tasks are too short to be found at one of them is replaced when it has ended what it is at.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from prefork.worker.frames import Order
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Process, State

log = logging.getLogger("prefork")
EVERY_S = 0.25
HARD = 2
LEAVES_S = 2.0
PSS = re.compile(rb"^Pss: +([0-9]+) kB", re.MULTILINE)


class Governor:
    """Looks at the memory of one worker. `per_child`, `total`: bytes, or None for no limit."""

    def __init__(
        self, loop: Loop, pool: Pool, per_child: int | None, total: int | None, give_back: Callable[[list[Order]], None]
    ) -> None:
        self._loop, self._pool, self._give_back = loop, pool, give_back
        self._hard = per_child * HARD if per_child else None
        self._total = total
        self._armed = False
        self._asked: set[Process] = set()  # for their stacks
        self._leaving: dict[Process, float] = {}  # what was replaced -> how long to wait for its memory

    def arm(self) -> None:
        """A task runs."""
        if (self._hard or self._total) and not self._armed:
            self._armed = True
            self._loop.call_later(EVERY_S, self._look)

    def _look(self) -> None:
        self._armed = False
        busy = [child for child in self._pool.children if child.head and not child.killed_for]
        if not busy:
            return
        self.arm()
        now_s = time.monotonic()
        self._leaving = {it: until_s for it, until_s in self._leaving.items() if now_s < until_s}
        if any(child.killed_for or child in self._leaving for child in self._pool.children):
            return  # what it has will be free in a moment, and nobody else is to go for it
        if self._hard:
            for child in busy:
                size = resident_bytes(child.pid)
                if size > self._hard:
                    self._end(child, f"memory of {_mb(size)}, more than twice max_memory_per_child")
        if self._total:
            sizes = {child.pid: own_bytes(child.pid) for child in self._pool.children}
            together = own_bytes(os.getpid()) + sum(sizes.values())
            if together > self._total:
                idle = [child for child in self._pool.children if not child.head and child.state is State.READY]
                largest = max(busy + idle, key=lambda child: sizes[child.pid])
                said = f"the worker's memory of {_mb(together)}, more than max_memory"
                said = f"{said}; this child had the most, {_mb(sizes[largest.pid])}"
                if largest in busy:
                    self._end(largest, said)
                else:
                    self._replace(largest, said)

    def _end(self, child: Process, why: str) -> None:
        order = child.head
        if child in self._asked:
            return
        self._asked.add(child)

        def kill(stack: str) -> None:
            self._asked.discard(child)
            self._pool.read(child)  # it may have answered meanwhile
            if child not in self._pool.children:
                return  # its pid may be another's
            if child.head is order:
                child.stack = stack
                self._pool.kill(child, why)
            elif not child.killed_for:
                self._replace(child, why)

        self._pool.ask_stack(child, kill)

    def _replace(self, child: Process, why: str) -> None:
        if child.state is State.READY:
            log.info("child %d (pid %d) is replaced: %s", child.number, child.pid, why)
        self._give_back(self._pool.take_back(child))
        self._pool.finish(child)
        if not child.head:
            self._leaving[child] = time.monotonic() + LEAVES_S


def resident_bytes(pid: int) -> int:
    """What `ps` shows: with what is shared."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def own_bytes(pid: int) -> int:
    """A process's share of what it uses (PSS), where the kernel tells."""
    with contextlib.suppress(OSError):
        if found := PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes()):
            return int(found[1]) << 10
    return resident_bytes(pid)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
