"""The verbs for producers and operators: blocking, safe from many threads and after fork, bounded in time."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar

import orjson
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from prefork.broker import address, durability, facts, lookup, passing, trouble, verbs
from prefork.broker.keys import Keys, queues_key, worker_key
from prefork.broker.wire import Wire
from prefork.errors import BrokerError, EnqueueUncertain

Disturbed = redis.RedisError  # what `listen` raises when its connection breaks
TRY = 0.45  # of the limit
# When the caller's own time is over, where it began before this thread did.
GIVE_UP_S: ContextVar[float] = ContextVar("GIVE_UP_S", default=float("inf"))
T = TypeVar("T")
NOBODY = "rehearsal"


_keys = lru_cache(maxsize=256)(Keys)


class Client:
    """A broker as producers see it. Connects at the first call; nothing of it is shared with a forked process.

    `limit_s`: what a call may take in all, with its repeats, before it is a BrokerError.
    """

    def __init__(
        self, url: str, prefix: str, limit_s: float = 5.0, durability: durability.Durability | None = None
    ) -> None:
        self.url, self.prefix, self.limit_s, self.durability = url, prefix, limit_s, durability
        self._redis: redis.Redis | None = None
        self._wire: Wire | None = None
        self._checked = False
        self._address: address.Address | None = None
        self._announced: set[str] = set()
        self._failure: BrokerError | None = None  # of the latest call, if it failed
        self._clock_ms = 0, 0  # the server's clock as it was last told, and our own at that time
        self._lock, self._pid = threading.Lock(), os.getpid()

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self._address.shown if self._address else address.shown(self.url)

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        self._notice_fork()
        with self._lock:
            if self._redis:
                self._redis.connection_pool.disconnect()  # its own close leaves a pool that it was given alone
            self._redis, self._wire, self._checked = None, None, False
            self._announced.clear()

    def connection(self) -> redis.Redis:
        """The redis-py client beneath. Raises BrokerError for a broker that can't be used, or is too old."""
        self._notice_fork()
        with self._lock:
            if self._redis is None:
                self._redis, self._checked = self._open(), False
                self._wire = Wire(self._redis.connection_pool)
            client = self._redis
        if not self._checked:  # not under the lock, so that each thread waits for its own limit only
            self._look_up()
            self._check_version(client)
            self._check_durability(client, self.durability)
            self._checked = True
        return client

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():  # the lock may have been held by a thread that is not here
            self._lock, self._redis, self._pid = threading.Lock(), None, os.getpid()

    def _open(self) -> redis.Redis:
        self._address = where = address.resolve(self.url)
        # Two tries fit into the limit when nothing answers at all.
        options: dict[str, Any] = {
            "socket_timeout": self.limit_s * TRY,
            "socket_connect_timeout": self.limit_s * TRY,
            "retry": Retry(NoBackoff(), 0),
            "client_name": "prefork-producer",
            "protocol": 2,
            **where.options,
        }
        return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=where.connection_class, **options))

    def _look_up(self) -> None:
        """redis-py would look the name up too, but for as long as the name servers take."""
        where = self._address
        if where and not where.path:
            error = lookup.within(self.limit_s, lambda: lookup.addresses(where.host, where.port))
            if error:
                raise trouble.explain(error, where.shown)

    def _check_version(self, client: redis.Redis) -> None:
        def info() -> dict[str, Any]:
            try:
                return client.info("server")
            except redis.exceptions.NoPermissionError:
                if client.connection_pool.connection_kwargs.pop("client_name", None):
                    client.connection_pool.reset()
                    return info()  # perhaps it was the name that it may not have
                return {"redis_version": "99.0"}  # a user who may not ask; the scripts will tell

        said = self._bounded(info, uncertain=False)
        self._clock_ms = int(said.get("server_time_usec", 0)) // 1000, time.monotonic_ns() // 1_000_000
        name, version = verbs.version_of(said)
        if version < verbs.OLDEST_SERVER:
            oldest = ".".join(map(str, verbs.OLDEST_SERVER))
            raise BrokerError(f"the broker {self.shown} is {name}; prefork needs Redis {oldest} or newer, or Valkey")

    def _check_durability(self, client: redis.Redis, wanted: durability.Durability | None) -> None:
        if wanted and (why := wanted.refused_by(self._bounded(client.info, uncertain=False))):
            raise BrokerError(f"the broker {self.shown} {why}")

    def _bounded(self, ask: Any, *, uncertain: bool) -> Any:
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
            except (redis.RedisError, OSError) as error:
                last = error
            left_s = give_up - time.monotonic()
            if refused := passing.refused_for_now(last):
                self._connect_anew()  # after a failover the address may lead to another server
            transient = refused or passing.may_pass(last, known=self._checked)
            sent = sent or (uncertain and transient and not refused and not passing.never_carried_out(last))
            if not transient or left_s < pause_s + min(time.monotonic() - begun, self.limit_s * TRY):
                self._failure = said = trouble.explain(last, self.shown, self._password)
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
        if self._redis and self._wire:
            self._wire.close_idle()
            self._redis.connection_pool.disconnect(inuse_connections=False)

    async def in_thread(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call in a thread, so that the event loop goes on; the limit counts from now, not from the thread's turn."""
        token = GIVE_UP_S.set(time.monotonic() + self.limit_s)
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        finally:
            GIVE_UP_S.reset(token)

    @property
    def _password(self) -> str | None:
        return self._address.options.get("password") if self._address else None

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
        self.connection()
        wire, tries = self._wire, count()

        def ask() -> Any:
            now = again() if next(tries) and again else call
            try:
                answer = self._sent(wire, now.command(), stats)
            except redis.exceptions.NoScriptError:
                answer = self._sent(wire, now.command(in_full=True), stats)
            if uncertain and not verbs.is_answer(call.verb, answer):
                self._connect_anew()
                raise redis.ConnectionError(f"Protocol error: no answer to {call.verb}")
            return answer

        return self._bounded(ask, uncertain=uncertain)

    def _sent(self, wire: Wire | None, words: tuple[verbs.Argument, ...], stats: str) -> Any:
        assert wire
        if not (stats and self.durability):
            (reply,) = wire.ask(words)
            if isinstance(reply, Exception):
                raise reply
            return reply
        # WAIT is about what the same connection has written, and a repeat on a new one finds nothing to write.
        touch, wait = ("HINCRBY", stats, "processed", 0), self.durability.words(round(self.limit_s * TRY * 800))
        reply, written, waited = wire.ask(words, touch, wait)
        for answer in (reply, waited):
            if isinstance(answer, Exception):
                raise answer
        if isinstance(written, Exception):
            raise EnqueueUncertain(f"the broker {self.shown} has accepted the task, and then refused more ({written})")
        if missing := self.durability.missing(waited):
            raise EnqueueUncertain(f"the broker {self.shown} has accepted the task, but it {missing}")
        return reply

    def read(self, command: str, *args: Any, **options: Any) -> Any:
        """One of redis-py's own commands, which is safe to repeat. Raises BrokerError within the limit."""
        return self._bounded(lambda: getattr(self.connection(), command)(*args, **options), uncertain=False)

    def keys(self, queue: str) -> Keys:
        """The names of the keys of a queue."""
        return _keys(self.prefix, queue)

    def enqueue(self, queue: str, entries: list[verbs.Entry]) -> int:
        """Accept messages, all for one queue; how often it is repeated, each is accepted once. -> server ms"""
        if queue not in self._announced:
            begun = time.monotonic()
            with self._one_limit():
                self._bounded(lambda: self.connection().sadd(queues_key(self.prefix), queue), uncertain=False)
                self._announced.add(queue)
                if time.monotonic() - begun >= self.limit_s:
                    raise trouble.explain(TimeoutError(), self.shown)  # and nothing was sent
                return self._enqueue(queue, entries)
        return self._enqueue(queue, entries)

    def _enqueue(self, queue: str, entries: list[verbs.Entry]) -> int:
        k = self.keys(queue)
        server_ms, read_ms = self._clock_ms
        now_ms, _ = self.call(
            verbs.enqueue(k, entries, now_ms=server_ms and server_ms + time.monotonic_ns() // 1_000_000 - read_ms),
            again=lambda: verbs.enqueue(k, entries, again=True),
            uncertain=True,
            stats=k.stats,
        )
        self._clock_ms = now_ms, time.monotonic_ns() // 1_000_000
        return int(now_ms)

    def cancel(self, queue: str, id: str, result_ttl_ms: int, record: dict[str, Any], *, stop: bool = False) -> str:
        """Cancel what has not started; `stop`: ask its worker if it has. -> cancelled, asked, running or finished

        `record`: its outcome; the reason is added to its `errors`.
        """
        waited, ran = (
            orjson.dumps(record | {"errors": [*record["errors"], facts.cancelled(said)]})
            for said in ("cancelled before it started", "cancelled; its worker died at that")
        )
        answer: bytes = self.call(verbs.cancel(self.keys(queue), id, result_ttl_ms, waited, ran if stop else None))
        return answer.decode()

    def ask(self, queue: str, worker: str, request: str) -> bool:
        """Ask a worker of a queue for a `report`; it writes it to `worker_key`. -> whether it has a lease there"""
        return bool(self.call(verbs.ask(self.keys(queue), worker, request)))

    def reported(self, worker: str) -> bytes | None:
        """What a worker has reported of itself, JSON, if it has lately."""
        key = worker_key(self.prefix, worker)
        answered: bytes | None = self._bounded(lambda: self.connection().get(key), uncertain=False)
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
        names = self._bounded(lambda: self.connection().smembers(queues_key(self.prefix)), uncertain=False)
        return sorted(map(facts.name, names))

    def rehearse(self, queues: Iterable[str], durability: durability.Durability | None = None) -> None:
        """Ask for what a worker asks for, as one that is none. Raises BrokerError for what the broker refuses it."""
        client = self.connection()
        self._check_durability(client, durability)
        if durability:
            self._bounded(lambda: client.execute_command(*durability.words(1)), uncertain=False)  # type: ignore[no-untyped-call]
        self._bounded(lambda: client.script_load(verbs.script("restore").text), uncertain=False)
        keys = [self.keys(queue) for queue in queues]
        for k in keys:
            self.call(verbs.restore(k, NOBODY, "gone"))  # changes nothing, and yet a replica refuses it
        self._bounded(lambda: client.bzpopmin([k.requests(NOBODY) for k in keys], 0.01), uncertain=False)
        for k in keys:  # the rights to channels are others than those to keys
            self._bounded(lambda k=k: client.publish(k.done_prefix + NOBODY, ""), uncertain=False)

    def info(self) -> dict[str, Any]:
        """What the server says of itself (INFO)."""
        answered: dict[str, Any] = self._bounded(lambda: self.connection().info(), uncertain=False)
        return answered

    def time(self) -> tuple[int, int]:
        """The server's clock: seconds since the epoch, microseconds."""
        answered: tuple[int, int] = self._bounded(lambda: self.connection().time(), uncertain=False)
        return answered

    def ping_ms(self) -> float:
        """Milliseconds of one round trip."""
        begun = time.monotonic()
        self._bounded(lambda: self.connection().ping(), uncertain=False)
        return (time.monotonic() - begun) * 1000

    @contextmanager
    def listen(self, queue: str, id: str) -> Iterator[Any]:
        """Hear of one task's end: yields a function that waits up to so many seconds for it, and may return early."""
        hub = self.connection().pubsub()  # type: ignore[no-untyped-call]
        try:
            self._bounded(lambda: hub.subscribe(self.keys(queue).done_prefix + id), uncertain=False)
            yield lambda seconds: hub.get_message(ignore_subscribe_messages=True, timeout=seconds)
        finally:
            hub.close()
