"""Children that die one after the other with nothing running: later and later ones, and said once."""

from __future__ import annotations

import logging
import time
from typing import Any

log = logging.getLogger("prefork")
ALLOWED = 5  # deaths in a row; further ones are made to wait
LONGEST_PAUSE_S = 30.0
MOST_NEWS = 100


class CrashLoop:
    """How many have died since the last one that worked. A crash loop of a night is not to fill the log."""

    def __init__(self) -> None:
        self.times = 0
        self.since_s = 0.0  # of the first of them
        self._last, self._next_s = "", 0.0
        self._said: set[str] = set()

    @property
    def too_many(self) -> bool:
        """Whether the next one has to wait."""
        return self.times > ALLOWED

    def count(self, why: str) -> None:
        """One more has died."""
        if not self.times:
            self.since_s = time.monotonic()
        self.times += 1
        self._last = why

    def pause_s(self, why: str) -> float:
        """How long the next one has to wait; said once."""
        pause_s = min(LONGEST_PAUSE_S, 0.1 * 2.0 ** min(20, max(0, self.times - ALLOWED)))
        self._next_s = time.monotonic() + pause_s
        if self.is_news(why.lstrip("0123456789")):
            log.warning("%s; the next one starts in %.1f s, others after up to %g s. This is said once", why, pause_s,
                        LONGEST_PAUSE_S)  # fmt: skip
        return pause_s

    def is_news(self, said: str) -> bool:
        """Whether this was not yet said since children last worked."""
        if said in self._said:
            return False
        if len(self._said) < MOST_NEWS:
            self._said.add(said)
        return True

    def over(self) -> None:
        """A child works."""
        if self.too_many:
            log.info("children work again, after %d had died in a row", self.times)
        self.times = 0
        self._said.clear()

    def describe(self) -> dict[str, Any] | None:
        """For operators; None: there is none."""
        if not self.too_many:
            return None
        next_s = max(0.0, self._next_s - time.monotonic())
        return {"times": self.times, "last": self._last, "next_s": round(next_s, 3)}
