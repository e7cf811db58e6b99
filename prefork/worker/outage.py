"""Trouble that lasts is said twice: when it begins, and, with its length, when it ends."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("prefork")


class Outage:
    """One kind of trouble. `ended`: what to say when it is over."""

    def __init__(self, ended: str) -> None:
        self._ended = ended
        self._since_s: float | None = None

    def begins(self, what: str) -> None:
        """It is there, perhaps still."""
        if self._since_s is None:
            self._since_s = time.monotonic()
            log.error("%s", what)

    def ends(self) -> None:
        """All is well, perhaps again."""
        if self._since_s is not None:
            log.warning("%s after %.1f s", self._ended, time.monotonic() - self._since_s)
            self._since_s = None
