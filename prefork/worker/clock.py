"""The server's clock, as the master knows it between two replies."""

from __future__ import annotations

import time


class ServerClock:
    """Every reply of a script tells the server's time; in between the monotonic clock counts on.

    What a reply tells was true at some time between its question and its arrival, which may be long on a busy machine:
    what is known already stands, as long as it is possible; so it is behind rather than ahead. Source: F. Cristian,
    "Probabilistic clock synchronization", 1989.
    """

    def __init__(self) -> None:
        self._ahead_ms = time.time() * 1000 - time.monotonic() * 1000
        self._told = False

    def told(self, server_ms: int, asked_s: float) -> None:
        """A reply has just said so; `asked_s`: when it was asked, by the monotonic clock."""
        least_ms, most_ms = server_ms - time.monotonic() * 1000, server_ms - asked_s * 1000
        self._ahead_ms = min(max(self._ahead_ms, least_ms), most_ms) if self._told else least_ms
        self._told = True

    def now_ms(self) -> int:
        """Milliseconds since the epoch, by the server's clock."""
        return int(time.monotonic() * 1000 + self._ahead_ms)
