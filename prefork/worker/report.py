"""What a worker tells of itself: to the status socket, `prefork workers`, `ps`, systemd, and, on USR1, to its log."""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import UTC, datetime
from typing import Any

from setproctitle import setproctitle

from prefork.app import Prefork
from prefork.config import Settings
from prefork.worker.claims import Claims
from prefork.worker.governor import resident_bytes
from prefork.worker.lease import Lease
from prefork.worker.pool import Pool
from prefork.worker.process import Process, State, used
from prefork.worker.shutdown import Shutdown

log = logging.getLogger("prefork")


class Report:
    """Looks only when it is asked."""

    def __init__(
        self, app: Prefork, settings: Settings, pool: Pool, claims: Claims, lease: Lease, shutdown: Shutdown
    ) -> None:
        self._app, self._settings = app, settings
        self._pool, self._claims, self._lease, self._shutdown = pool, claims, lease, shutdown
        self._version = ""
        self._started_at, self._started_s = datetime.now(UTC), time.monotonic()

    def describe(self) -> dict[str, Any]:
        """The whole worker. `_s`: seconds; `_bytes`: resident memory; `ready`: it would run a task now."""
        booted = any(child.state is not State.BOOTING for child in self._pool.children)
        return {
            "worker": self._lease.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": self._told_version(),
            "app": self._settings.app,
            "queues": list(self._settings.queues.names),
            "started_at": self._started_at.isoformat(timespec="milliseconds"),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "phase": self._shutdown.phase.name.lower(),
            "paused": self._claims.paused,
            "broker": "connected" if self._claims.channel.ready else "away",
            "ready": booted and self._claims.open and self._claims.channel.ready,
            "concurrency": self._pool.size,
            "rss_bytes": resident_bytes(os.getpid()),
            "crash_loop": self._pool.crashes.describe(),
            "children": [_of_child(child) for child in self._pool.children],
        }

    def _told_version(self) -> str:
        if not self._version:
            try:
                from importlib.metadata import version  # it takes longer than all the rest, and few are ever asked

                self._version = version("prefork")
            except Exception:  # what is installed is being replaced, or is gone
                return "unknown"
        return self._version

    def summary(self) -> str:
        """In a few words, for `systemctl status`."""
        queues = ", ".join(self._settings.queues.names)
        return f"{'paused, ' if self._claims.paused else ''}{self._pool.size} children, queues {queues}"

    def entitle(self) -> None:
        """Name the process, for `ps`."""
        setproctitle(f"prefork: master of {self._app.name}, {self._pool.size} children")

    def say(self) -> None:
        """Log what every child is doing, with its Python stack if it runs a task."""
        told = self.describe()
        log.info("worker %s: %s%s, up for %.0f s, broker %s, %d of %d children", told["worker"], told["phase"],
                 ", paused" if told["paused"] else "", told["uptime_s"], told["broker"], len(told["children"]),
                 told["concurrency"])  # fmt: skip
        for child in list(self._pool.children):
            if child.head is None:
                log.info("child %d (pid %d): %s, %d MB", child.number, child.pid, child.state.name.lower(),
                         resident_bytes(child.pid) >> 20)  # fmt: skip
            else:
                self._say_stack(child)

    def _say_stack(self, child: Process) -> None:
        of = _of_child(child)
        _, cpu_s = used(child.pid)

        def say(stack: str) -> None:
            log.info("child %d (pid %d): runs %s id=%s attempt=%d for %.1f s, CPU of its whole life %.1f s, %d MB, "
                     "%d behind it\n%s", child.number, child.pid, of["task"], of["id"], of["attempt"],
                     of["running_s"], cpu_s, of["rss_bytes"] >> 20, of["waiting"],
                     stack or "it has ended meanwhile")  # fmt: skip

        self._pool.ask_stack(child, say)


def _of_child(child: Process) -> dict[str, Any]:
    told: dict[str, Any] = {
        "number": child.number,
        "pid": child.pid,
        "state": child.state.name.lower(),
        "rss_bytes": resident_bytes(child.pid),
        "task": None,
        "id": None,
        "queue": None,
        "attempt": None,
        "running_s": None,
        "waiting": 0,
    }
    if order := child.head:
        message = order.message
        told |= {
            "task": message.header.task,
            "id": message.id,
            "queue": message.queue,
            "attempt": order.attempt,
            "running_s": round(time.monotonic() - child.slot.head_since_s, 3),
            "waiting": len(child.end.unanswered) - 1,
        }
    return told
