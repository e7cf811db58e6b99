"""The verbs for the master's event loop: one connection that never blocks, and comes back by itself.

1. Connect without waiting, with TLS where the URL says so; greet (password, database, name); load the scripts.
2. `up` is called. From now on `send` queues a command; `flush` writes what is queued, once a turn of the loop.
3. Replies come in order; each is given to the callback of its command.
4. When the connection breaks, or a reply is overdue, every unanswered command is given a `Lost`, `down` is called, and
   after a pause (with jitter, at most a second) it begins again at 1.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import hiredis

from prefork.broker import address, lookup, trouble, verbs
from prefork.errors import BrokerError

Callback = Callable[[Any], None]
CONNECT_LIMIT_S = 5.0
REPLY_LIMIT_S = 10.0
READ_BYTES = 1 << 16  # malloc maps and unmaps what is larger, each time
QUIET_LIMIT_S = 5.0  # what is large may take longer than its limit, as long as anything moves
NEXT_LIMIT_S = 0.2  # for the reply behind it
LONGEST_PAUSE_S = 1.0
GOOD_AFTER_S = 1.0  # a connection that broke sooner is no reason to try again sooner
LOADED_VERBS = ("claim", "settle", "restore", "beat", "enqueue")


class Lost(Exception):
    """The connection broke before the reply came: the command may have been carried out, or not."""


class Timer(Protocol):
    """What `Clock.call_later` returns."""

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


@dataclass(slots=True)
class Sent:
    """A command whose reply is due."""

    call: verbs.Call | None
    callback: Callback
    overdue_s: float


class Channel:
    """One connection of the master to the broker. `up` and `down` tell its owner of the connection's fate."""

    def __init__(
        self, loop: EventLoop, url: str, name: str, up: Callable[[], None], down: Callable[[str], None],
        pushed: Callable[[list[Any]], None] | None = None,
    ) -> None:  # fmt: skip
        self._loop, self._url, self._name, self._up, self._down = loop, url, name, up, down
        self._pushed = pushed  # gets what the server says unasked, if it can: `hears_pushes`
        self._socket: socket.socket | None = None
        self._expected: deque[Sent] = deque()
        self._out = bytearray()
        self._reader = hiredis.Reader()
        self._pause_s = 0.0
        self._ready_since_s = self._moved_s = 0.0
        self._attempt = 0
        self._lookup: lookup.Lookup | None = None
        self._writing = False
        self._timer: Timer | None = None
        self._watch: Timer | None = None
        self._watch_s = 0.0
        self._closed = False
        self.ready = self.hears_pushes = False

    # -- connect ------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Begin to connect."""
        self._drop()
        try:
            self._address = address.resolve(self._url)
            self._open(self._address)
        except Exception as error:  # whatever it was: say so, and try again
            self._break(error)

    def _open(self, where: address.Address) -> None:
        self._timer = self._loop.call_later(CONNECT_LIMIT_S, lambda: self._break(TimeoutError("connecting")))
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
            self._break(error)

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
        self._loop.forget(self._socket.fileno())
        if code := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self._break(OSError(code, os.strerror(code)))
        try:
            if context := self._address.tls():
                name = self._address.host
                self._socket = context.wrap_socket(self._socket, server_hostname=name, do_handshake_on_connect=False)
                return self._shake_hands()
        except (OSError, ValueError) as error:
            return self._break(error)
        return self._greet()

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
            self._break(error)
        else:
            self._greet()

    def _greet(self) -> None:
        assert self._socket
        self._reader = hiredis.Reader(notEnoughData=NOT_YET)
        self._loop.on_read(self._socket.fileno(), self._readable)
        limit_s = time.monotonic() + REPLY_LIMIT_S
        for words in self._address.greeting(self._name):
            # A user who may not name a connection can work all the same.
            self._queue(words, Sent(None, self._named if words[0] == "CLIENT" else self._greeted, limit_s))
        self.hears_pushes = False
        if self._pushed:
            self._queue(("HELLO", 3), Sent(None, self._speaks, limit_s))
        for verb in LOADED_VERBS if not self._pushed else ():
            self._queue(("SCRIPT", "LOAD", verbs.script(verb).text), Sent(None, self._greeted, limit_s))
        self._queue(("PING",), Sent(None, self._welcome, limit_s))
        self.flush()

    def _greeted(self, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError):
            self._break(reply)

    def _speaks(self, reply: Any) -> None:
        self.hears_pushes = isinstance(reply, dict)  # a proxy in between may not let it through

    def _named(self, reply: Any) -> None:
        if "max number of clients" in str(reply) or str(reply).startswith("DENIED"):
            self._greeted(reply)  # it was said to the connection, and nothing else will be

    def _welcome(self, reply: Any) -> None:
        if isinstance(reply, Lost):
            return None
        if isinstance(reply, Exception):
            return self._break(reply)
        self._cancel_timer()
        self._ready_since_s = time.monotonic()
        self._attempt -= 1  # this address is good
        self.ready = True
        return self._up()

    # -- send and receive ---------------------------------------------------------------------------------------

    def send(self, call: verbs.Call, callback: Callback, limit_s: float = REPLY_LIMIT_S) -> None:
        """Queue a verb. `callback` gets its reply, a hiredis.ReplyError, or Lost."""
        self._send(call.command(), Sent(call, callback, time.monotonic() + limit_s))

    def send_words(self, words: tuple[verbs.Argument, ...], callback: Callback, limit_s: float = REPLY_LIMIT_S) -> None:
        """Queue a plain command."""
        self._send(words, Sent(None, callback, time.monotonic() + limit_s))

    def _send(self, words: tuple[verbs.Argument, ...], sent: Sent) -> None:
        # Not before the greeting: it would be carried out without the password, or in another database.
        if self.ready:
            self._queue(words, sent)
        else:
            sent.callback(Lost("not connected"))

    def _queue(self, words: tuple[verbs.Argument, ...], sent: Sent) -> None:
        self._out += hiredis.pack_command(words)  # type: ignore[arg-type]  # its tuple may be of any length
        self._expected.append(sent)
        if self._watch and sent.overdue_s < self._watch_s:
            self._watch.cancel()
            self._watch = None
        if self._watch is None:
            self._watch_s = sent.overdue_s
            self._watch = self._loop.call_later(max(0.05, sent.overdue_s - time.monotonic()), self._look_overdue)

    def flush(self) -> None:
        """Write what is queued, as much as the socket takes; the rest follows when it has room."""
        if self._socket is None or not self._out or self._writing:
            return
        self._write()

    def _write(self) -> None:
        assert self._socket
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
                self._moved_s = time.monotonic()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            here = self._socket
            self._readable()  # the server may have said why it closed
            return self._break(error) if self._socket is here else None
        if bool(self._out) != self._writing:
            self._writing = bool(self._out)
            self._loop.on_write(self._socket.fileno(), self._write if self._writing else None)
        return None

    def _readable(self) -> None:
        here = self._socket
        end: OSError | None = None
        assert here
        try:
            while data := here.recv(READ_BYTES):
                self._moved_s = time.monotonic()
                self._reader.feed(data)
                if len(data) < 1 << 14:
                    break
            else:
                end = ConnectionError("the server closed the connection")
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            end = error
        self._answer(here)  # first what came whole before the end
        if end and self._socket is here:
            self._break(end)

    def _answer(self, here: socket.socket) -> None:
        try:
            while self._socket is here and (reply := self._reader.gets()) is not NOT_YET:
                if isinstance(reply, hiredis.PushNotification) and reply[0] != b"subscribe" and self._pushed:
                    self._pushed(reply)
                    continue
                if not self._expected:
                    return self._break(
                        reply if isinstance(reply, Exception) else ConnectionError("Protocol error: unasked reply")
                    )
                sent = self._expected.popleft()
                if sent.call and isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                    self._queue(sent.call.command(in_full=True), sent)
                    self.flush()
                elif sent.call and not isinstance(reply, Exception) and not verbs.is_answer(sent.call.verb, reply):
                    self._expected.appendleft(sent)
                    return self._break(ConnectionError(f"Protocol error: no answer to {sent.call.verb}"))
                else:
                    sent.callback(reply)
                    if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("READONLY"):
                        # After a failover the address may lead to another server, while this one lives on.
                        return self._break(reply) if self._socket is here else None
        except hiredis.ProtocolError as error:
            return self._break(ConnectionError(f"Protocol error: {error}"))
        return None

    # -- break and come back ------------------------------------------------------------------------------------

    def _look_overdue(self) -> None:
        self._watch = None
        if not self._expected:
            return
        # Replies come in order, so that the first one is what all wait for.
        moving = bool(self._out) or self._reader.has_data()
        overdue_s = max(self._expected[0].overdue_s, self._moved_s + (QUIET_LIMIT_S if moving else NEXT_LIMIT_S))
        left_s = overdue_s - time.monotonic()
        if left_s <= 0:
            self._break(TimeoutError("timed out waiting for a reply"))
        else:
            self._watch_s = overdue_s
            self._watch = self._loop.call_later(left_s + 0.01, self._look_overdue)

    def _break(self, error: BaseException) -> None:
        if self._closed:
            return
        if self.ready and time.monotonic() > self._ready_since_s + GOOD_AFTER_S:
            self._pause_s = 0.0
        self._drop()
        lost, self._expected = self._expected, deque()
        for sent in lost:
            sent.callback(Lost(str(error)))
        shown = address.shown(self._url)
        said = str(error) if isinstance(error, BrokerError) else str(trouble.explain(error, shown))
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2 or 0.02)
        if not self._closed:
            self._cancel_timer()
            self._timer = self._loop.call_later(self._pause_s * random.uniform(0.5, 1), self.connect)
        self._down(said)

    def _drop(self) -> None:
        self._cancel_timer()
        self._end_lookup()
        self.ready = False
        self._out.clear()
        self._writing = False
        if self._socket:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _end_lookup(self) -> None:
        if self._lookup:
            self._loop.forget(self._lookup.fd)
            self._lookup.close()
            self._lookup = None

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def restart(self) -> None:
        """End the connection, with what the server still does for it, and begin a new one."""
        self._break(ConnectionError("asked to"))

    def close(self) -> None:
        """End the connection, and do not come back."""
        self._closed = True
        self._drop()
        self._expected.clear()

    def abandon(self) -> None:
        """In a forked child: close its copy of the socket, without a word to the server."""
        if self._socket:
            self._socket.close()
        if self._lookup:
            self._lookup.abandon()


NOT_YET = object()
