"""The verbs for producers and operators: blocking, safe from many threads and after fork, bounded in time."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from itertools import count
from typing import Any, TypeVar

import hiredis
import orjson

from prefork.broker import address, durability, facts, passing, trouble, verbs
from prefork.broker.keys import Keys, queues_key, worker_key
from prefork.broker.wire import TROUBLE, Connection, Unreached, Wire
from prefork.errors import BrokerError, EnqueueUncertain

TRY = 0.45  # of the limit: two tries fit into it when nothing answers at all
# When the caller's own time is over, where it began before this thread did.
GIVE_UP_S: ContextVar[float] = ContextVar("GIVE_UP_S", default=float("inf"))
T = TypeVar("T")
NOBODY = "rehearsal"


_keys = lru_cache(maxsize=256)(Keys)


class Disturbed(Exception):
    """The connection of `listen` broke, and nothing more will be heard on it."""


class Client:
    """A broker as producers see it. Connects at the first call; nothing of it is shared with a forked process.

    `limit_s`: what a call may take in all, with its repeats, before it is a BrokerError.
    """

    def __init__(
        self, url: str, prefix: str, limit_s: float = 5.0, durability: durability.Durability | None = None
    ) -> None:
        self.url, self.prefix, self.limit_s, self.durability = url, prefix, limit_s, durability
        self._wire: Wire | None = None
        self._checked = False
        self._address: address.Address | None = None
        self._announced: set[str] = set()
        self._failure: BrokerError | None = None  # of the latest call, if it failed
        self._lock, self._pid = threading.Lock(), os.getpid()

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
            self._announced.clear()

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
            self._lock, self._pid = threading.Lock(), os.getpid()
            if inherited:
                inherited.close_idle()

    def _check_version(self, wire: Wire) -> None:
        def info() -> dict[str, Any]:
            try:
                return _info(wire, "server")
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
        if wanted and (why := wanted.refused_by(self._bounded(lambda: _info(wire), uncertain=False))):
            raise BrokerError(f"the broker {self.shown} {why}")

    def _bounded(self, ask: Callable[[], Any], *, uncertain: bool) -> Any:
        """Ask until it is answered or the limit is over. What is asked must be safe to repeat."""
        give_up = min(time.monotonic() + self.limit_s, GIVE_UP_S.get())
        if self._failure and time.monotonic() >= give_up:
            raise self._failure
        pause_s, sent = 0.02, False  # sent: a try was, whose reply is lost
        while True:
            begun = time.monotonic()
            try:
                answer = ask()
                self._failure = None
                return answer
            except Unreached as error:
                last, reached = error.why, False
            except TROUBLE as error:
                last, reached = error, not isinstance(error, hiredis.ReplyError)
            left_s = give_up - time.monotonic()
            if passing.refused_for_now(last):
                self._connect_anew()  # after a failover the address may lead to another server
            transient = passing.may_pass(last, known=self._checked)
            sent = sent or (uncertain and transient and reached)
            if not transient or left_s < pause_s + min(time.monotonic() - begun, self.limit_s * TRY):
                password = self._address.password if self._address else None
                self._failure = said = trouble.explain(last, self.shown, password)
                raise (EnqueueUncertain(f"{said} (the task may have been accepted)") if sent else said) from None
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(pause_s * 2, 0.5)

    @contextmanager
    def _one_limit(self) -> Iterator[None]:
        """Several steps that share one limit."""
        token = GIVE_UP_S.set(min(GIVE_UP_S.get(), time.monotonic() + self.limit_s))
        try:
            yield
        finally:
            GIVE_UP_S.reset(token)

    def _connect_anew(self) -> None:
        if self._wire:
            self._wire.close_idle()

    async def in_thread(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
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
    ) -> Any:
        """Send one verb. Raises BrokerError within the limit; EnqueueUncertain if `uncertain` and the reply is lost.

        `stats`: the queue's counters, for what has to be as durable as the app asks for.
        """
        wire, tries = self.wire(), count()

        def ask() -> Any:
            now = again() if next(tries) and again else call
            try:
                answer = self._sent(wire, now.command(), stats)
            except hiredis.ReplyError as error:
                if not str(error).startswith("NOSCRIPT"):
                    raise
                answer = self._sent(wire, now.command(in_full=True), stats)
            if uncertain and not verbs.is_answer(call.verb, answer):
                self._connect_anew()
                raise ConnectionError(f"Protocol error: no answer to {call.verb}")
            return answer

        return self._bounded(ask, uncertain=uncertain)

    def _sent(self, wire: Wire, words: tuple[verbs.Argument, ...], stats: str) -> Any:
        if not (stats and self.durability):
            return wire.one(*words)
        # WAIT is about what the same connection has written, and a repeat on a new one finds nothing to write.
        touch, wait = ("HINCRBY", stats, "processed", 0), self.durability.words(round(self.limit_s * TRY * 800))
        reply, written, waited = wire.ask(words, touch, wait)
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
        return self._bounded(lambda: wire.one(*words), uncertain=False)

    def keys(self, queue: str) -> Keys:
        """The names of the keys of a queue."""
        return _keys(self.prefix, queue)

    def enqueue(self, queue: str, entries: list[verbs.Entry]) -> int:
        """Accept messages, all for one queue; how often it is repeated, each is accepted once. -> server ms"""
        if queue not in self._announced:
            begun = time.monotonic()
            with self._one_limit():
                self.read("SADD", queues_key(self.prefix), queue)
                self._announced.add(queue)
                if time.monotonic() - begun >= self.limit_s:
                    raise trouble.explain(TimeoutError(), self.shown)  # and nothing was sent
                return self.enqueue(queue, entries)
        k = _keys(self.prefix, queue)
        now_ms, _ = self.call(
            verbs.enqueue(k, entries),
            again=lambda: verbs.enqueue(k, entries, again=True),
            uncertain=True,
            stats=k.stats,
        )
        return int(now_ms)

    def cancel(self, queue: str, id: str, result_ttl_ms: int, record: dict[str, Any], *, stop: bool = False) -> str:
        """Cancel what has not started; `stop`: ask its worker if it has. -> cancelled, asked, running or finished

        `record`: its outcome; the reason is added to its `errors`.
        """
        waited, ran = (
            orjson.dumps(record | {"errors": [*record["errors"], facts.cancelled(said)]})
            for said in ("cancelled before it started", "cancelled; its worker died at that")
        )
        call = partial(verbs.cancel, self.keys(queue), id, result_ttl_ms, waited, ran if stop else None)
        answer: bytes = self.call(call(), again=partial(call, again=True))
        return answer.decode()

    def ask(self, queue: str, worker: str, request: str) -> bool:
        """Ask a worker of a queue for a `report`; it writes it to `worker_key`. -> whether it has a lease there"""
        return bool(self.call(verbs.ask(self.keys(queue), worker, request)))

    def reported(self, worker: str) -> bytes | None:
        """What a worker has reported of itself, JSON, if it has lately."""
        answered: bytes | None = self.read("GET", worker_key(self.prefix, worker))
        return answered

    def inspect(self, queue: str, id: str) -> list[Any]:
        """All that is known of a task in a queue; see inspect.lua."""
        found: list[Any] = self.call(verbs.inspect(self.keys(queue), id))
        return [found[0].decode(), *found[1:4], facts.name(found[4]), facts.whole(found[5])]

    def census(self, queue: str) -> list[Any]:
        """What a queue holds; see census.lua."""
        counted: list[Any] = self.call(verbs.census(self.keys(queue)))
        return counted

    def queues(self) -> list[str]:
        """The names of all queues that were ever used, sorted."""
        return sorted(map(facts.name, self.read("SMEMBERS", queues_key(self.prefix))))

    def rehearse(self, queues: Iterable[str], durability: durability.Durability | None = None) -> None:
        """Ask for what a worker asks for, as one that is none. Raises BrokerError for what the broker refuses it."""
        wire = self.wire()
        self._check_durability(wire, durability)
        keys = [self.keys(queue) for queue in queues]
        asked: list[tuple[verbs.Argument, ...]] = [durability.words(1)] if durability else []
        asked.append(("SCRIPT", "LOAD", verbs.script("restore").text))
        # Changes nothing, and yet a replica refuses it.
        asked += (verbs.restore(k, NOBODY, "gone").command() for k in keys)
        asked += (("MGET", k.stop_prefix) for k in keys)  # which it asks for only where something is held
        # The rights to channels are others than those to keys.
        asked += (("PUBLISH", k.done_prefix + NOBODY, "") for k in keys)
        # A server looks ten times a second whose wait is over; where there is something, nobody waits.
        there: tuple[verbs.Argument, ...] = ("ZADD", keys[0].requests(NOBODY), 0, NOBODY)
        asked.append(("BZPOPMIN", *(k.requests(NOBODY) for k in keys), "0.01"))
        self._bounded(lambda: _granted(wire.ask(there, *asked)[1:]), uncertain=False)

    def info(self) -> dict[str, Any]:
        """What the server says of itself (INFO)."""
        wire = self.wire()
        answered: dict[str, Any] = self._bounded(lambda: _info(wire), uncertain=False)
        return answered

    def time(self) -> tuple[int, int]:
        """The server's clock: seconds since the epoch, microseconds."""
        seconds, micros = self.read("TIME")
        return int(seconds), int(micros)

    def ping_ms(self) -> float:
        """Milliseconds of one round trip."""
        begun = time.monotonic()
        self.read("PING")
        return (time.monotonic() - begun) * 1000

    @contextmanager
    def listen(self, queue: str, id: str) -> Iterator[Callable[[float], Any]]:
        """Hear of one task's end: yields a function that waits up to so many seconds for it, and may return early.

        That raises Disturbed.
        """
        wire, channel = self.wire(), self.keys(queue).done_prefix + id
        connection: Connection = self._bounded(lambda: _listening(wire, channel), uncertain=False)

        def hear(seconds: float) -> Any:
            try:
                return connection.pushed(seconds)
            except TROUBLE as error:
                raise Disturbed(str(error)) from None

        try:
            yield hear
        finally:
            connection.close()


def _info(wire: Wire, *section: str) -> dict[str, Any]:
    raw = wire.one("INFO", *section)
    try:
        return facts.info(raw)
    except ValueError as error:
        raise hiredis.ProtocolError(str(error)) from None


def _granted(replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _listening(wire: Wire, channel: str) -> Connection:
    connection = wire.connect()
    try:
        connection.send(("SUBSCRIBE", channel))
        _granted([connection.reply()])
    except BaseException:
        connection.close()
        raise
    return connection
