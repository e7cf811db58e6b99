"""The other workers of this host: the kernel says at once when the process of one has ended (Linux; elsewhere, and in
sandboxes without pidfds, the next beat finds it)."""

from __future__ import annotations

import os
from collections.abc import Callable

from prefork.worker.loop import Loop

NONE, ENDED = -1, -2  # in place of a descriptor: there is none to be had; its process has ended


class Neighbours:
    """Watches the processes of workers; `ended` is called when one has ended."""

    def __init__(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._loop, self._ended = loop, ended
        self._watched: dict[str, int] = {}  # worker -> descriptor of its process, or one of the two above

    def watch(self, workers: dict[str, int]) -> None:
        """Watch these from now on, and no others. `workers`: name -> pid"""
        for worker in self._watched.keys() - workers.keys():
            self._forget(worker)
        for worker, pid in workers.items():
            if worker not in self._watched:
                self._watched[worker] = self._open(worker, pid)

    def _open(self, worker: str, pid: int) -> int:
        if not hasattr(os, "pidfd_open"):
            return NONE
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # no such process, no such call, no descriptor left
            return NONE
        self._loop.on_read(fd, lambda: self._has_ended(worker))
        return fd

    def _has_ended(self, worker: str) -> None:
        self._forget(worker)
        self._watched[worker] = ENDED  # until it is taken over
        self._ended()

    def has_ended(self, worker: str) -> bool:
        """Whether the kernel has said so."""
        return self._watched.get(worker) == ENDED

    def _forget(self, worker: str) -> None:
        fd = self._watched.pop(worker)
        if fd >= 0:
            self._loop.forget(fd)
            os.close(fd)

    def abandon(self) -> None:
        """In a forked child: close its copies."""
        for fd in self._watched.values():
            if fd >= 0:
                os.close(fd)
