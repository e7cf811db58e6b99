"""What systemd, or whoever else set NOTIFY_SOCKET, is told of the worker's state.

Source of the protocol: sd_notify(3). Without that variable nothing is told to anybody. Nothing here raises or waits: a
supervisor that does not listen must not hold up the work.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import MutableMapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """`watchdog_interval_s`: how often `watchdog` is to be called, half of what is allowed; None for not at all."""

    def __init__(self, address: str, watchdog_interval_s: float | None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_interval_s = watchdog_interval_s

    @classmethod
    def from_environment(cls) -> Notifier:
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say."""
        address, usec = os.environ.get("NOTIFY_SOCKET", ""), os.environ.get("WATCHDOG_USEC", "")
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        number = int(usec) if re.fullmatch("[0-9]{1,15}", usec) else 0
        interval_s = number / 2e6 if address and ours and number else None
        return cls(address, interval_s)

    def ready(self, status: str) -> None:
        """It works, or works again after a reload."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """What it does has changed."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """It drains, to go on as a new version."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=draining for a new version")

    def stopping(self) -> None:
        """It drains, to end."""
        self._send("STOPPING=1\nSTATUS=draining")

    def watchdog(self) -> None:
        """It is alive."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as it:
            it.setblocking(False)
            it.sendto(message.encode(), self._address)


def forget(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a child: what its tasks start is not to speak for the worker."""
    for name in VARIABLES:
        environment.pop(name, None)
