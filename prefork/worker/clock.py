"""The server's clock, as the master knows it between two replies."""

from __future__ import annotations

import time


class ServerClock:
    """Every reply of a script tells the server's time; in between the monotonic clock counts on."""

    def __init__(self) -> None:
        self._ahead_ms = time.time() * 1000 - time.monotonic() * 1000

    def told(self, server_ms: int) -> None:
        """A reply has just said so."""
        self._ahead_ms = server_ms - time.monotonic() * 1000

    def now_ms(self) -> int:
        """Milliseconds since the epoch, by the server's clock."""
        return int(time.monotonic() * 1000 + self._ahead_ms)
