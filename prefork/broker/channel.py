"""The verbs for the master's event loop: one connection that never blocks, and comes back by itself.

1. Connect without waiting (`dial`); greet (password, database, name); load the scripts.
2. `up` is called. From now on `send` queues a command; `flush` writes what is queued, once a turn of the loop.
3. Replies come in order; each is given to the callback of its command.
4. When the connection breaks, or a reply is overdue, every unanswered command is given a `Lost`, `down` is called, and
   after a pause (a second at most) it begins again at 1.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hiredis

from prefork.broker import address, passing, trouble, verbs
from prefork.broker.dial import Dial, EventLoop, Timer
from prefork.broker.wire import abort
from prefork.errors import BrokerError

Callback = Callable[[Any], None]
REPLY_LIMIT_S = 10.0
READ_BYTES = 1 << 16  # malloc maps and unmaps what is larger, each time
QUIET_LIMIT_S = 5.0  # what is large may take longer than its limit, as long as anything moves
NEXT_LIMIT_S = 0.2  # for the reply behind it
LOADED_VERBS = ("claim", "settle", "restore", "beat", "enqueue")


class Lost(Exception):
    """The connection broke before the reply came: the command may have been carried out, or not."""


@dataclass(slots=True)
class Sent:
    """A command whose reply is due."""

    call: verbs.Call | None
    callback: Callback
    overdue_s: float


class Channel:
    """One connection of the master to the broker. `up` and `down` tell its owner of the connection's fate."""

    def __init__(
        self, loop: EventLoop, url: str, name: str, up: Callable[[], None], down: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._loop, self._url, self._name, self._up, self._down = loop, url, name, up, down
        # Gets what the server says unasked, if it can: `hears_pushes`. To be set before it connects.
        self.pushed: Callable[[list[Any]], None] | None = None
        self._dial = Dial(loop, url, self._greet, self._break)
        self._socket: socket.socket | None = None
        self._expected: deque[Sent] = deque()
        self._out = bytearray()
        self._reader = hiredis.Reader()
        self._moved_s = 0.0
        self._writing = False
        self._watch: Timer | None = None
        self._watch_s = 0.0
        self._closed = False
        self.ready = self.hears_pushes = False

    # -- connect and greet --------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Begin to connect."""
        self._drop()
        self._dial.begin()

    def _greet(self, connected: socket.socket, where: address.Address) -> None:
        self._socket = connected
        self._reader = hiredis.Reader(notEnoughData=NOT_YET)
        self._loop.on_read(self._socket.fileno(), self._readable)
        limit_s = time.monotonic() + REPLY_LIMIT_S
        for words in where.greeting(self._name):
            # A user who may not name a connection can work all the same.
            self._queue(words, Sent(None, self._named if words[0] == "CLIENT" else self._greeted, limit_s))
        self.hears_pushes = False
        if self.pushed:
            self._queue(("HELLO", 3), Sent(None, self._speaks, limit_s))
        for verb in LOADED_VERBS if not self.pushed else ():
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
        self._dial.good()
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
                if isinstance(reply, hiredis.PushNotification) and reply[0] != b"subscribe" and self.pushed:
                    self.pushed(reply)
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
                    if passing.is_replica(reply):
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
        if self._socket:
            abort(self._socket)
        self._drop()
        lost, self._expected = self._expected, deque()
        for sent in lost:
            sent.callback(Lost(str(error)))
        shown = address.shown(self._url)
        said = str(error) if isinstance(error, BrokerError) else str(trouble.explain(error, shown))
        if not self._closed:
            self._dial.again()
        self._down(said)

    def _drop(self) -> None:
        self._dial.stop()
        self.ready = False
        self._out.clear()
        self._writing = False
        if self._socket:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

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
        self._dial.abandon()


NOT_YET = object()
