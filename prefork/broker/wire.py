"""Blocking connections: each carries one request at a time, and is kept for the next one.

1. Connect, with TLS where the URL says so, and greet: password, database, name. All of it within one limit.
2. A request is one write; then its replies are read.
3. What breaks is closed. Whoever asked hears of it, and whether anything can have been sent.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from typing import Any

import hiredis

from prefork.broker import lookup, verbs
from prefork.broker.address import Address

Words = tuple[verbs.Argument, ...]
READ_BYTES = 1 << 16
# Of a server that has said something to the connection, not to the command; nothing else will be.
TURNED_AWAY = ("DENIED", "ERR max number of clients")
NOT_SENT = object()
LEAST_S = 0.05
NEVER = float("inf")


class Unreached(OSError):
    """No connection could be made, so that nothing was sent. `why`: what the socket or the server has said."""

    def __init__(self, why: OSError | hiredis.HiredisError) -> None:
        super().__init__(str(why))
        self.why = why


# What any request may raise when the connection breaks, a reply is late, or the server says no.
TROUBLE = (OSError, hiredis.HiredisError)


class Connection:
    """One connection. Each wait for the server ends after `limit_s` with a TimeoutError, or when `until` says so."""

    def __init__(self, where: Address, name: str, limit_s: float) -> None:
        """Connect. Raises Unreached."""
        self._limit_s = self._set_s = limit_s
        self._reader = hiredis.Reader()
        end_s = time.monotonic() + limit_s
        try:
            self._socket = _connected(where, end_s)
        except (OSError, ValueError) as error:
            raise Unreached(error if isinstance(error, OSError) else OSError(str(error))) from None
        self.poll = select.poll()
        self.poll.register(self._socket, select.POLLIN)
        try:
            self._greet(where.greeting(name), end_s)
        except TROUBLE as error:
            self.close()
            raise Unreached(error) from None

    def _greet(self, greeting: list[tuple[str | int, ...]], end_s: float) -> None:
        self._socket.settimeout(_left_s(end_s))
        self.send(*greeting)
        for words in greeting:
            self._socket.settimeout(_left_s(end_s))
            said = self.reply()
            # A user who may not name a connection can work all the same.
            if isinstance(said, hiredis.ReplyError) and (words[0] != "CLIENT" or str(said).startswith(TURNED_AWAY)):
                raise said
            if not isinstance(said, hiredis.ReplyError) and said != b"OK":
                raise hiredis.ProtocolError(f"Protocol error: no answer to {words[0]}")

    def limit(self, limit_s: float) -> None:
        """How long to wait from now on."""
        self._limit_s = self._set_s = limit_s
        self._socket.settimeout(limit_s)

    def until(self, end_s: float) -> None:
        """The next wait ends by then, if that is before its limit; there is always time for a server that is near."""
        wait_s = min(self._limit_s, max(LEAST_S, end_s - time.monotonic()))
        if wait_s != self._set_s:  # or each request would take two calls to the kernel more
            self._socket.settimeout(wait_s)
            self._set_s = wait_s

    def send(self, *commands: Words) -> None:
        """Send commands in one write. Raises OSError; hiredis.ReplyError if the server has said why it closed."""
        packed = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]  # of any length
        try:
            self._socket.sendall(packed)
        except TimeoutError:
            raise
        except OSError as error:
            try:
                said = self.reply()
            except TROUBLE as last:
                # TLS lets a server say no only when the client takes the connection for made.
                raise (last if getattr(last, "library", "") == "SSL" else error) from None
            raise said if isinstance(said, hiredis.ReplyError) else error from None

    def exchange(self, packed: bytes) -> Any:
        """Send one packed command. -> its reply, be it an error"""
        self._socket.sendall(packed)
        return self.reply()

    def reply(self) -> Any:
        """The next reply; an error is returned, not raised. Raises OSError, hiredis.ProtocolError."""
        while (reply := self._reader.gets()) is False:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            self._reader.feed(data)
        return reply

    def pushed(self, seconds: float) -> Any:
        """What the server says unasked, within so many seconds; None if that is nothing."""
        if (said := self._reader.gets()) is not False:
            return said
        return self.reply() if self.poll.poll(seconds * 1000) else None

    def has_ended(self) -> bool:
        """Whether its server has closed it meanwhile: nobody owes it anything that could be read."""
        return bool(self.poll.poll(0))

    def close(self) -> None:
        """End it. In a forked process: only here."""
        self._socket.close()

    def abort(self) -> None:
        """End it, and let nothing that was sent and is still here arrive later."""
        abort(self._socket)
        self._socket.close()


class Wire:
    """The connections of one process to a broker. Safe from many threads: each request has one to itself."""

    def __init__(self, where: Address, name: str, limit_s: float) -> None:
        self._where, self._name, self._limit_s = where, name, limit_s
        self._idle: list[Connection] = []

    def connect(self, end_s: float = NEVER) -> Connection:
        """A connection of the caller's own. `end_s`: by then, by the monotonic clock. Raises Unreached."""
        connection = Connection(self._where, self._name, min(self._limit_s, max(LEAST_S, end_s - time.monotonic())))
        connection.limit(self._limit_s)
        return connection

    def ask(self, *commands: Words, end_s: float = NEVER) -> list[Any]:
        """Send commands in one write. -> their replies; an error among them is in its place, not raised

        `end_s`: when it has to be over, by the monotonic clock. Raises what is in TROUBLE when the connection breaks,
        or a reply is late.
        """
        connection = self._taken(end_s)
        try:
            connection.until(end_s)
            connection.send(*commands)
            found = []
            for _ in commands:
                connection.until(end_s)
                found.append(connection.reply())
            connection.until(NEVER)
        except BaseException:
            connection.abort()
            raise
        self._idle.append(connection)
        return found

    def one(self, *words: verbs.Argument, end_s: float = NEVER) -> Any:
        """The reply to one command. Raises what is in TROUBLE, an error of the server's too."""
        (reply,) = self.ask(words, end_s=end_s)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def exchange(self, packed: bytes) -> Any:
        """Send one packed command. -> its reply, be it an error; NOT_SENT if no connection is there

        Raises what is in TROUBLE when the connection breaks, or the reply is late.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            return NOT_SENT
        if connection.poll.poll(0):  # as `has_ended`
            connection.close()
            return NOT_SENT
        try:
            reply = connection.exchange(packed)
        except BaseException:
            connection.abort()
            raise
        self._idle.append(connection)
        return reply

    def _taken(self, end_s: float) -> Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self.connect(end_s)
            if not connection.has_ended():
                return connection
            connection.close()

    def close_idle(self) -> None:
        """End the connections that carry nothing now; the next request makes a new one."""
        idle, self._idle = self._idle, []  # other threads take from it meanwhile, or close it too
        for connection in idle:
            connection.close()


def _left_s(end_s: float) -> float:
    if (left_s := end_s - time.monotonic()) <= 0:
        raise TimeoutError("timed out connecting")
    return left_s


def _connected(where: Address, end_s: float) -> socket.socket:
    """A name may have several addresses, of which one answers: try them in turn."""
    if where.path:
        return _connected_to(where, lookup.Found(socket.AF_UNIX, socket.SOCK_STREAM, 0, where.path), _left_s(end_s))
    if lookup.is_address(where.host):
        found = lookup.addresses(where.host, where.port)
    else:
        found = lookup.within(_left_s(end_s), lambda: lookup.addresses(where.host, where.port))
    last: OSError = OSError("its name has no address")
    for n, it in enumerate(found):
        try:
            return _connected_to(where, it, _left_s(end_s) / (len(found) - n))
        except OSError as error:
            last = error
    raise last


def _connected_to(where: Address, found: lookup.Found, limit_s: float) -> socket.socket:
    it = socket.socket(found.family, found.kind, found.protocol)
    try:
        it.settimeout(limit_s)
        it.connect(found.target)
        if found.family != socket.AF_UNIX:
            it.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            it.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context := where.tls():
            return context.wrap_socket(it, server_hostname=where.host)
    except BaseException:
        it.close()
        raise
    return it


def abort(connected: socket.socket) -> None:
    """Let its close take back what was sent and is still here: it is not to arrive when an outage is over."""
    with contextlib.suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
