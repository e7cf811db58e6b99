"""Trouble with the broker is said twice: when it begins, and, with its length, when it ends.

It may have several parts (no connection, outcomes refused, the lease refused …): the first one speaks, and when the
last one is over, so is the trouble. But what is wrong with a queue may stay so for days, while the others go on: after
a minute it is a thing of its own, and what begins then is said.
"""

from __future__ import annotations

import logging
import time

log = logging.getLogger("prefork")
TELLS_LITTLE_S = 1.0  # how long a cause that tells little is held back: the next attempt may know better
LASTING_S = 60.0
CONNECTIONS = {"connection", "second connection"}


class Outage:
    """The trouble of one worker with its broker."""

    def __init__(self) -> None:
        self._parts: set[str] = set()
        self._lasting: set[str] = set()
        self._since_s = 0.0
        self._said: set[str] = set()
        self._unsaid = ""

    def begins(self, part: str, what: str, *, wait: bool = False, lasts: bool = False) -> None:
        """It is there, perhaps still. `wait`: this tells little, and perhaps it is over at once; `lasts`: somebody has
        to do something, so that it is said also if the trouble began as another one."""
        if part in self._lasting:
            return
        lasted = time.monotonic() - self._since_s > LASTING_S and not self._parts & CONNECTIONS
        if lasted and part not in self._parts:
            self._lasting |= self._parts
            self._parts.clear()
        if not self._parts:
            self._since_s, self._unsaid = time.monotonic(), ""
            self._said.clear()
        self._parts.add(part)
        if wait and not self._said and time.monotonic() < self._since_s + TELLS_LITTLE_S:
            self._unsaid = self._unsaid or what
        elif not self._said or (lasts and what not in self._said):
            self._said.add(what)
            log.error("%s; trying again, what runs goes on", what)

    def ends(self, part: str) -> None:
        """This part is well, perhaps again."""
        if part in self._lasting:
            self._lasting.discard(part)
            log.warning("the trouble with %s is over", part)
        if part not in self._parts:
            return
        self._parts.discard(part)
        if not self._parts:
            before = "" if self._said else f"{self._unsaid}; "
            log.warning("%sthe broker is back after %.1f s", before, time.monotonic() - self._since_s)
