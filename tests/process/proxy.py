"""A network that fails, between a worker and its server: passes everything on, until it is told otherwise.

    pass      as it comes
    hold      nothing passes, nothing is lost: what waits is delivered later, as TCP does after a partition
    drop      nothing passes, and what was sent is lost for good: connections are half-open, new ones are never answered
    refuse    the server says the same error to every command, and carries none out

Beside these: `delay_s` before each chunk, `chunk` bytes at a time (trickle), `mangle` of replies (corrupt), `lose` of
one reply, `cut` of all connections (by reset), and `target`, the server to which new connections go.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hiredis

from tests.broker.wires import Listener

Mangle = Callable[[bytes], bytes]


class _Link:
    """One connection through the proxy, and what is under way on it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.asked = hiredis.Reader()
        self.answered = hiredis.Reader(replyError=str)
        self.due = 0  # replies of the server
        self.lost = False  # something of it was dropped: it never works again, as a half-open connection
        self.doomed = False

    def reset(self) -> None:
        """Break both ends off, with a reset, not an orderly end."""
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)


class Network(Listener):
    """In front of servers on unix sockets. `replies_only`: a mode holds for what servers say, requests get through."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.chunk, self.delay_s = 1 << 16, 0.0
        self.mangle: Mangle | None = None
        self.lost = 0
        self._mode, self._error, self.replies_only = "pass", b"", False
        self._changed = threading.Condition()
        self._mark, self._keep, self._times = b"", 0, 0
        self._then: Callable[[], None] = lambda: None
        super().__init__()

    # -- what it is told ----------------------------------------------------------------------------------------

    def set(self, mode: str, *, error: bytes = b"", replies_only: bool = False) -> None:
        """Be so from now on. `error`: of `refuse`, as `-LOADING …`."""
        with self._changed:
            self._mode, self._error, self.replies_only = mode, error, replies_only
            self._changed.notify_all()

    def heal(self) -> None:
        """Pass everything on again. Connections of which anything was lost stay dead."""
        self.delay_s, self.chunk, self.mangle, self._times = 0.0, 1 << 16, None, 0
        self.set("pass")

    def lose(self, mark: bytes, times: int = 1, *, keep: int = 0, then: Callable[[], None] = lambda: None) -> None:
        """When a command has the mark in it, let the server carry it out, and reset in place of the reply (or after
        `keep` bytes of it); `then` is called before."""
        self._mark, self._times, self._keep, self._then = mark, times, keep, then

    def cut(self) -> None:
        """Reset all connections."""
        for end in list(self.open):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.set("pass")
        super().close()

    # -- what it does -------------------------------------------------------------------------------------------

    def talk(self, connection: socket.socket) -> None:
        with connection, socket.socket(socket.AF_UNIX) as server:
            link = _Link(connection, server)
            if self._mode == "drop":
                link.lost = True  # its SYN never arrived
            elif self._mode == "hold":
                self._await_passage(link)
            try:
                server.connect(str(self.target))
            except OSError:
                link.reset()
                return
            back = threading.Thread(target=self._back, args=(link,), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := connection.recv(self.chunk):
                    self._ask(link, data)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join(5)

    def _ask(self, link: _Link, data: bytes) -> None:
        if not self.replies_only and not self._passes(link):
            return
        commands = _complete(link.asked, data)
        if self._mode == "refuse":
            while link.due > 0:  # replies come in order
                time.sleep(0.001)
            link.client.sendall(self._error * commands)
            return
        if self._times and not link.doomed and self._mark in data:
            self._times -= 1
            link.doomed = True
        link.due += commands
        link.server.sendall(data)

    def _back(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(self.chunk):
                answers = _complete(link.answered, data)
                link.due -= answers  # without a call in between, in which `_ask` may add to it
                if not self._passes(link):
                    continue
                if link.doomed:
                    self.lost += 1
                    self._then()
                    link.client.sendall(data[: self._keep])
                    return link.reset()
                if self.delay_s:
                    time.sleep(self.delay_s)
                link.client.sendall(self.mangle(data) if self.mangle else data)
        with contextlib.suppress(OSError):
            if not link.lost:  # of what is behind the hole nobody hears, an end neither
                link.client.shutdown(socket.SHUT_RDWR)
        return None

    def _passes(self, link: _Link) -> bool:
        if self._mode == "drop":
            link.lost = True
        elif self._mode == "hold":
            self._await_passage(link)
        return not link.lost

    def _await_passage(self, link: _Link) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._mode != "hold")
        link.lost = link.lost or self._mode == "drop"


def _complete(reader: hiredis.Reader, data: bytes) -> int:
    """How many commands, or replies, are whole with these bytes."""
    reader.feed(data)
    count = 0
    with contextlib.suppress(hiredis.ProtocolError):
        while reader.gets() is not False:
            count += 1
    return count
