"""What a worker is told, by signals and, by way of the broker, by operators.

- TERM, INT: stop when what runs is done. QUIT, and a second INT: stop now. `shutdown` tells how.
- HUP: become the new version of app and configuration, once it is known to be good. `reload` tells how.
- TTIN, TTOU: one child more, one less.
- USR1: say in the log what each child is doing.
- USR2: claim no more; and with the next one, claim again.
- `cancel <id>`, `report`: what `prefork cancel` and `prefork workers` ask for.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

import orjson

from prefork.broker.keys import worker_key
from prefork.worker.descriptors import make_room
from prefork.worker.link import Link
from prefork.worker.loop import Loop
from prefork.worker.notify import Notifier
from prefork.worker.pool import Pool
from prefork.worker.reload import Origin, Reload
from prefork.worker.report import Report
from prefork.worker.shutdown import Shutdown
from prefork.worker.work import Work

log = logging.getLogger("prefork")
REPORT_TTL_MS = 10_000
MOST_CHILDREN = 1000


class Commands:
    """The commands of one worker. `reloading`: it stops, to become its new version."""

    def __init__(
        self, prefix: str, loop: Loop, pool: Pool, work: Work, link: Link, shutdown: Shutdown, report: Report,
        notify: Notifier, origin: Origin,
    ) -> None:  # fmt: skip
        self._prefix, self._pool, self._work, self._link = prefix, pool, work, link
        self._shutdown, self._report, self._notify = shutdown, report, notify
        self.reload = Reload(loop, pool, origin, self._become_new)
        self.reloading = False

    def by_signal(self) -> dict[signal.Signals, Callable[[], None]]:
        """What to do for each signal."""
        return {
            signal.SIGTERM: self._stopping(lambda: self._shutdown.drain("TERM")),
            signal.SIGINT: self._stopping(self._shutdown.interrupt),
            signal.SIGQUIT: self._stopping(lambda: self._shutdown.now("QUIT")),
            signal.SIGHUP: self._hang_up,
            signal.SIGTTIN: lambda: self._resize(+1),
            signal.SIGTTOU: lambda: self._resize(-1),
            signal.SIGUSR1: self._report.say,
            signal.SIGUSR2: self._pause_or_resume,
        }

    def requested(self, request: str) -> None:
        """An operator has asked for something, by way of the broker."""
        verb, _, id = request.partition(" ")
        if verb == "cancel":
            claims = self._link.claims
            self._work.cancels.cancel(id, claims.next_serial if claims.in_flight else 0)
        elif verb == "report":
            key = worker_key(self._prefix, self._link.lease.worker)
            told = orjson.dumps(self._report.describe())
            self._link.channel.send_words(("SET", key, told, "PX", REPORT_TTL_MS), lambda reply: None)

    def _stopping(self, stop: Callable[[], None]) -> Callable[[], None]:
        def stop_for_good() -> None:
            self.reload.give_up()
            self._notify.stopping()
            if self.reloading:  # it drains already, and ends now in place of becoming new
                self.reloading = False
                log.info("stopping, in place of going on as the new version")
                if stop == self._shutdown.interrupt:
                    return  # the first INT, which lets what runs finish
            stop()

        return stop_for_good

    def _hang_up(self) -> None:
        if not self._shutdown.begun:
            self.reload.begin()

    def _become_new(self) -> None:
        if not self._shutdown.begun:
            self.reloading = True
            self._notify.reloading()
            self._shutdown.drain("HUP; the new version is good and comes next")

    def _resize(self, by: int) -> None:
        size = self._pool.size + by
        if self._shutdown.begun or not 1 <= size <= MOST_CHILDREN:
            return
        log.info("%s: %d children from now on", "TTIN" if by > 0 else "TTOU", size)
        if warning := make_room(size):
            log.warning("%s", warning)
        self._work.resize(size)
        self._report.entitle()
        self._notify.status(self._report.summary())

    def _pause_or_resume(self) -> None:
        claims = self._link.claims
        claims.paused = not claims.paused
        claims.void()
        if claims.paused:
            log.warning("USR2: paused. Nothing more is claimed until the next USR2; what was claimed goes on")
        else:
            log.warning("USR2: claiming again")
            claims.wake_all()
        self._notify.status(self._report.summary())
