"""How a channel comes to its connection, without waiting for anything.

1. Resolve the URL; look the host's name up, where it is one. Of several addresses each try takes the next.
2. Connect; shake hands, where the URL says TLS. `connected` gets the socket and the address.
3. The channel greets, and says that the connection is `good`. All of this has CONNECT_LIMIT_S.
4. What goes wrong goes to `failed`; `again` begins at 1 after a pause: longer each time, with jitter, at most a second.
"""

from __future__ import annotations

import math
import os
import random
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol

from prefork.broker import address, lookup

CONNECT_LIMIT_S = 5.0
LONGEST_PAUSE_S = 1.0
GOOD_AFTER_S = 1.0  # a connection that broke sooner is no reason to try again sooner


class Timer(Protocol):
    """What `EventLoop.call_later` returns."""

    def cancel(self) -> None:
        """Forget the call."""


class EventLoop(Protocol):
    """What a channel needs of the loop that it lives on."""

    def on_read(self, fd: int, callback: Callable[[], None]) -> None:
        """Call whenever there is something to read."""

    def on_write(self, fd: int, callback: Callable[[], None] | None) -> None:
        """Call whenever there is room to write; None to stop it."""

    def forget(self, fd: int) -> None:
        """Take a descriptor out."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call once, later."""


class Dial:
    """The way to one broker. `failed` is called once for each try that fails, also if it is too late to be `good`."""

    def __init__(
        self, loop: EventLoop, url: str, connected: Callable[[socket.socket, address.Address], None],
        failed: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._loop, self._url, self._done, self._failed = loop, url, connected, failed
        self._socket: socket.socket | None = None  # until it is connected
        self._lookup: lookup.Lookup | None = None
        self._timer: Timer | None = None  # of the limit, or of the pause
        self._attempt = 0
        self._pause_s = 0.0
        self._good_since_s = math.inf

    def begin(self) -> None:
        """Begin to connect, now."""
        self.stop()
        try:
            self._address = address.resolve(self._url)
            self._open(self._address)
        except Exception as error:  # whatever it was: say so, and try again
            self._fail(error)

    def good(self) -> None:
        """The server has answered on this connection."""
        self._cancel_timer()
        self._attempt -= 1  # this address is good
        self._good_since_s = time.monotonic()

    def again(self) -> None:
        """Begin once more, after a pause."""
        if time.monotonic() > self._good_since_s + GOOD_AFTER_S:
            self._pause_s = 0.0
        self._good_since_s = math.inf
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2 or 0.02)
        self._cancel_timer()
        self._timer = self._loop.call_later(self._pause_s * random.uniform(0.5, 1), self.begin)

    def stop(self) -> None:
        """End what is under way. A socket that `connected` was given is no longer ours."""
        self._cancel_timer()
        self._end_lookup()
        if self._socket:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def abandon(self) -> None:
        """In a forked child: close its copies, without a word to the server."""
        if self._socket:
            self._socket.close()
        if self._lookup:
            self._lookup.abandon()

    # -- step by step -------------------------------------------------------------------------------------------

    def _open(self, where: address.Address) -> None:
        self._timer = self._loop.call_later(CONNECT_LIMIT_S, lambda: self._fail(TimeoutError("connecting")))
        if where.path:
            # Of a unix socket, "try again" means that its queue is full; nothing is under way.
            self._connect_to(socket.AF_UNIX, socket.SOCK_STREAM, 0, where.path)
            return
        if lookup.is_address(where.host):
            self._choose(lookup.addresses(where.host, where.port))
        else:
            self._lookup = it = lookup.Lookup(where.host, where.port)
            self._loop.on_read(it.fd, self._looked_up)

    def _looked_up(self) -> None:
        assert self._lookup
        try:
            found = self._lookup.result()
            self._end_lookup()
            self._choose(found)
        except OSError as error:
            self._fail(error)

    def _choose(self, found: list[lookup.Found]) -> None:
        """A name may have several addresses, of which one answers: try them in turn."""
        at = self._attempt % len(found)
        self._attempt += 1
        self._connect_to(*found[at])

    def _connect_to(self, family: int, kind: int, protocol: int, target: Any) -> None:
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setblocking(False)
        if family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            self._socket.connect(target)
        except BlockingIOError:
            if family == socket.AF_UNIX:
                raise
            self._loop.on_write(self._socket.fileno(), self._connected)
        else:
            self._connected()

    def _connected(self) -> None:
        assert self._socket
        bare = self._socket
        self._loop.forget(bare.fileno())
        if code := bare.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self._fail(OSError(code, os.strerror(code)))
        try:
            if context := self._address.tls():
                self._socket = None  # the descriptor goes to what wraps it, and is closed with that if it can't be
                name = self._address.host
                self._socket = context.wrap_socket(bare, server_hostname=name, do_handshake_on_connect=False)
                return self._shake_hands()
        except (OSError, ValueError) as error:
            return self._fail(error)
        return self._hand_over()

    def _shake_hands(self) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        fd = self._socket.fileno()
        self._loop.forget(fd)
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self._loop.on_read(fd, self._shake_hands)
        except ssl.SSLWantWriteError:
            self._loop.on_write(fd, self._shake_hands)
        except OSError as error:
            self._fail(error)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        assert self._socket
        it, self._socket = self._socket, None
        self._done(it, self._address)

    def _fail(self, error: BaseException) -> None:
        self.stop()
        self._failed(error)

    def _end_lookup(self) -> None:
        if self._lookup:
            self._loop.forget(self._lookup.fd)
            self._lookup.close()
            self._lookup = None

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
