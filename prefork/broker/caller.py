"""Asking a broker and waiting for its answer: blocking, safe from many threads and after fork, bounded in time.

1. The first call connects, and looks whether the broker can be used.
2. A call is tried until it is answered or its limit is over; what is asked is safe to repeat.
3. When the limit is over it is a BrokerError; EnqueueUncertain, if it may have been carried out and that matters.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, TypeVar

import hiredis

from prefork.broker import address, durability, facts, passing, trouble, verbs
from prefork.broker.wire import NEVER, TROUBLE, Unreached, Wire
from prefork.errors import BrokerError, EnqueueUncertain

TRY = 0.45  # of the limit: two tries fit into it when nothing answers at all
LEAST_TRY_S = 0.25  # one that has less would only say that it came too late
# When the caller's own time is over, where it began before this thread did.
GIVE_UP_S: ContextVar[float] = ContextVar("GIVE_UP_S", default=NEVER)
T = TypeVar("T")


class Caller:
    """A broker as it is called. Connects at the first call; nothing of it is shared with a forked process.

    `limit_s`: what a call may take in all, with its repeats, before it is a BrokerError.
    """

    def __init__(
        self, url: str, prefix: str, limit_s: float = 5.0, durability: durability.Durability | None = None
    ) -> None:
        self.url, self.prefix, self.limit_s, self.durability = url, prefix, limit_s, durability
        self._wire: Wire | None = None
        self._checked = False
        self._address: address.Address | None = None
        self._failure: BrokerError | None = None  # of the latest call, if it failed
        self._lock, self._pid = threading.RLock(), os.getpid()  # a handler of a signal may enqueue

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self._address.shown if self._address else address.shown(self.url)

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        self._notice_fork()
        with self._lock:
            if self._wire:
                self._wire.close_idle()
            self._wire, self._checked = None, False

    def wire(self) -> Wire:
        """The connections beneath. Raises BrokerError for a broker that can't be used, or is too old."""
        # The pid first: in a forked process another thread may be about to notice.
        if self._pid != os.getpid() or (wire := self._wire) is None or not self._checked:
            wire = self._open()
        return wire

    def _open(self) -> Wire:
        self._notice_fork()
        with self._lock:
            if self._wire is None:
                self._address, self._checked = address.resolve(self.url), False
                self._wire = Wire(self._address, "prefork-producer", self.limit_s * TRY)
            wire = self._wire
        if not self._checked:  # not under the lock, so that each thread waits for its own limit only
            self._check_version(wire)
            self._check_durability(wire, self.durability)
            self._checked = True
        return wire

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():  # the lock may have been held by a thread that is not here
            inherited, self._wire = self._wire, None
            self._lock, self._pid = threading.RLock(), os.getpid()
            if inherited:
                inherited.close_idle()

    def _check_version(self, wire: Wire) -> None:
        def info(end_s: float) -> dict[str, Any]:
            try:
                return info_of(wire, "server", end_s=end_s)
            except hiredis.ReplyError as error:
                if not str(error).startswith("NOPERM"):
                    raise
                return {"redis_version": "99.0"}  # a user who may not ask; the scripts will tell

        said = self._bounded(info, uncertain=False)
        name, version = verbs.version_of(said)
        if version < verbs.OLDEST_SERVER:
            oldest = ".".join(map(str, verbs.OLDEST_SERVER))
            raise BrokerError(f"the broker {self.shown} is {name}; prefork needs Redis {oldest} or newer, or Valkey")

    def _check_durability(self, wire: Wire, wanted: durability.Durability | None) -> None:
        def info(end_s: float) -> dict[str, Any]:
            return info_of(wire, end_s=end_s)

        if wanted and (why := wanted.refused_by(self._bounded(info, uncertain=False))):
            raise BrokerError(f"the broker {self.shown} {why}")

    def _bounded(
        self, ask: Callable[[float], Any], *, uncertain: bool, since_s: float | None = None, sent: bool = False
    ) -> Any:  # fmt: skip
        """Ask until it is answered or the limit is over. What is asked must be safe to repeat, and is told when to end.

        `since_s`: when it began, if that was before; `sent`: a try was, whose reply is lost.
        """
        give_up = min((time.monotonic() if since_s is None else since_s) + self.limit_s, GIVE_UP_S.get())
        if self._failure and not sent and time.monotonic() >= give_up:
            raise self._failure
        pause_s = 0.02
        told: Exception | None = None  # what was wrong before the last try, other than that it took too long
        while True:
            begun = time.monotonic()
            try:
                answer = ask(give_up)
                self._failure = None
                return answer
            except Unreached as error:
                last, reached = error.why, False
            except TROUBLE as error:
                last, reached = error, not isinstance(error, hiredis.ReplyError)
            left_s = give_up - time.monotonic()
            if reached or passing.refused_for_now(last):
                # After a failover the address may lead to another server. And what has cut one connection, perhaps in
                # silence, has cut those that were idle too: to try them one by one would take longer than the limit.
                self._connect_anew()
            transient = passing.may_pass(last, known=self._checked)
            sent = sent or (uncertain and transient and reached)
            needed_s = min(max(time.monotonic() - begun, LEAST_TRY_S), self.limit_s * TRY)
            if not transient or left_s < pause_s + needed_s:
                was_cut_off = isinstance(last, TimeoutError) and left_s <= 0
                said = self._failed(told if told and was_cut_off else last)
                raise (EnqueueUncertain(f"{said} (the task may have been accepted)") if sent else said) from None
            told = told if isinstance(last, TimeoutError) else last
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(pause_s * 2, 0.5)

    def _failed(self, error: Exception) -> BrokerError:
        self._failure = trouble.explain(error, self.shown, self._address.password if self._address else None)
        return self._failure

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Several steps that share one limit, beside that of each call."""
        token = GIVE_UP_S.set(min(GIVE_UP_S.get(), time.monotonic() + seconds))
        try:
            yield
        finally:
            GIVE_UP_S.reset(token)

    def _connect_anew(self) -> None:
        if self._wire:
            self._wire.close_idle()

    async def in_thread(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call in a thread, so that the event loop goes on; the limit counts from now, not from the thread's turn."""
        import asyncio  # whoever awaits this has it

        token = GIVE_UP_S.set(time.monotonic() + self.limit_s)
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        finally:
            GIVE_UP_S.reset(token)

    def call(
        self,
        call: verbs.Call,
        *,
        again: Callable[[], verbs.Call] | None = None,
        uncertain: bool = False,
        stats: str = "",
        since_s: float | None = None,
        sent: bool = False,
    ) -> Any:
        """Send one verb. Raises BrokerError within the limit; EnqueueUncertain if `uncertain` and the reply is lost.

        `stats`: the queue's counters, for what has to be as durable as the app asks for. `since_s`, `sent`: of a try
        before this.
        """
        wire, tries = self.wire(), count(int(sent))

        def ask(end_s: float) -> Any:
            now = again() if next(tries) and again else call
            try:
                answer = self._sent(wire, now.command(), stats, end_s)
            except hiredis.ReplyError as error:
                if not str(error).startswith("NOSCRIPT"):
                    raise
                answer = self._sent(wire, now.command(in_full=True), stats, end_s)
            if uncertain and not verbs.is_answer(call.verb, answer):
                self._connect_anew()
                raise ConnectionError(f"Protocol error: no answer to {call.verb}")
            return answer

        return self._bounded(ask, uncertain=uncertain, since_s=since_s, sent=sent)

    def _sent(self, wire: Wire, words: tuple[verbs.Argument, ...], stats: str, end_s: float) -> Any:
        if not (stats and self.durability):
            return wire.one(*words, end_s=end_s)
        # WAIT is about what the same connection has written, and a repeat on a new one finds nothing to write.
        touch, wait = ("HINCRBY", stats, "processed", 0), self.durability.words(round(self.limit_s * TRY * 800))
        reply, written, waited = wire.ask(words, touch, wait, end_s=end_s)
        if isinstance(reply, Exception):
            raise reply
        if passing.broken_off(waited) or not (isinstance(waited, Exception) or self.durability.is_answer(waited)):
            self._connect_anew()  # a failover, which may come in the middle of the wait
            raise ConnectionError(f"the wait was broken off: {waited}")
        if refused := next((it for it in (written, waited) if isinstance(it, Exception)), None):
            raise EnqueueUncertain(f"the broker {self.shown} has accepted the task, and then refused more ({refused})")
        if missing := self.durability.missing(waited):
            raise EnqueueUncertain(f"the broker {self.shown} has accepted the task, but it {missing}")
        return reply

    def read(self, *words: verbs.Argument) -> Any:
        """One plain command, which is safe to repeat. Raises BrokerError within the limit."""
        wire = self.wire()
        return self._bounded(lambda end_s: wire.one(*words, end_s=end_s), uncertain=False)


def info_of(wire: Wire, *section: str, end_s: float = NEVER) -> dict[str, Any]:
    """What the server says of itself. Raises what is in TROUBLE."""
    raw = wire.one("INFO", *section, end_s=end_s)
    try:
        return facts.info(raw)
    except ValueError as error:
        raise hiredis.ProtocolError(str(error)) from None
