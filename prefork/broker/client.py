"""The verbs for producers and operators, each a call that is bounded in time (`caller`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import hiredis
import orjson

from prefork.broker import durability, facts, passing, trouble, verbs
from prefork.broker.caller import GIVE_UP_S, Caller, info_of
from prefork.broker.keys import Keys, queues_key, worker_key
from prefork.broker.wire import NEVER, NOT_SENT, TROUBLE, Connection, Wire
from prefork.message import LARGE_BYTES

NOBODY = "rehearsal"
_keys = lru_cache(maxsize=256)(Keys)


class Disturbed(Exception):
    """The connection of `listen` broke, and nothing more will be heard on it."""


class Client(Caller):
    """A broker as producers and operators see it."""

    def __init__(
        self, url: str, prefix: str, limit_s: float = 5.0, durability: durability.Durability | None = None
    ) -> None:
        super().__init__(url, prefix, limit_s, durability)
        self._heads: dict[str, bytes] = {}  # of the queues that are known to be in the set of all; see `_head`

    def keys(self, queue: str) -> Keys:
        """The names of the keys of a queue."""
        return _keys(self.prefix, queue)

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        super().close()
        self._heads.clear()

    def enqueue(self, queue: str, entries: list[verbs.Entry]) -> int:
        """Accept messages, all for one queue; how often it is repeated, each is accepted once. -> server ms

        A single one takes few steps, since who enqueues now and then meets cold caches. What is not as usual goes on by
        `_accept`, and so does what may not have got through.
        """
        begun_s, sent = time.monotonic(), False
        head = self._heads.get(queue)
        if head is None:
            return self._first(queue, entries, begun_s)
        usual = len(entries) == 1 and len(entries[0].payload) < LARGE_BYTES and not (self.durability or self._failure)
        usual = usual and GIVE_UP_S.get() == NEVER  # else its limit is not that of the connection
        # The pid first, as in `wire`.
        if usual and self._pid == os.getpid() and (wire := self._wire) is not None and self._checked:
            packed: bytes = hiredis.pack_command(entries[0][1:])  # type: ignore[arg-type]  # of any length
            try:
                reply = wire.exchange(head + packed[len(b"*4\r\n") :])
            except TROUBLE:
                reply, sent = NOT_SENT, True
                self._connect_anew()  # see `_bounded`
            if verbs.is_answer("enqueue", reply):
                return int(reply[0])
            if isinstance(reply, hiredis.ReplyError):
                if not str(reply).startswith("NOSCRIPT") and not passing.may_pass(reply, known=True):
                    raise self._failed(reply)
            elif reply is not NOT_SENT:
                sent = True
                self._connect_anew()  # that was damaged on its way
        return self._accept(queue, entries, begun_s, sent=sent)

    def _first(self, queue: str, entries: list[verbs.Entry], begun_s: float) -> int:
        with self.within(self.limit_s):
            self.read("SADD", queues_key(self.prefix), queue)
            self._heads[queue] = _head(self.keys(queue))
            if time.monotonic() - begun_s >= self.limit_s:
                raise trouble.explain(TimeoutError(), self.shown)  # and nothing was sent
            return self._accept(queue, entries, begun_s)

    def _accept(self, queue: str, entries: list[verbs.Entry], since_s: float, *, sent: bool = False) -> int:
        k = _keys(self.prefix, queue)
        now_ms, _ = self.call(
            verbs.enqueue(k, entries),
            again=lambda: verbs.enqueue(k, entries, again=True),
            uncertain=True,
            stats=k.stats,
            since_s=since_s,
            sent=sent,
        )
        return int(now_ms)

    def cancel(self, queue: str, id: str, result_ttl_ms: int, record: dict[str, Any], *, stop: bool = False) -> str:
        """Cancel what has not started; `stop`: ask its worker if it has. -> cancelled, asked, running or finished

        `record`: its outcome; the reason is added to its `errors`.
        """
        waited, ran = (
            orjson.dumps(record | {"errors": [*record["errors"], facts.cancelled(said)]})
            for said in ("cancelled before it started", "cancelled while it ran")
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
        for k in keys:  # what it asks for only where there is something; here of a key that never is
            asked += [("MGET", k.stop_prefix), ("LRANGE", k.stop_prefix, 0, 0), ("LTRIM", k.stop_prefix, 0, -1)]
        # The rights to channels are others than those to keys.
        asked += (("PUBLISH", k.done_prefix + NOBODY, "") for k in keys)
        # A server looks ten times a second whose wait is over; where there is something, nobody waits.
        there: tuple[verbs.Argument, ...] = ("ZADD", keys[0].requests(NOBODY), 0, NOBODY)
        asked.append(("BZPOPMIN", *(k.requests(NOBODY) for k in keys), "0.01"))
        self._bounded(lambda end_s: _granted(wire.ask(there, *asked, end_s=end_s)[1:]), uncertain=False)

    def info(self) -> dict[str, Any]:
        """What the server says of itself (INFO)."""
        wire = self.wire()
        answered: dict[str, Any] = self._bounded(lambda end_s: info_of(wire, end_s=end_s), uncertain=False)
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
        connection: Connection = self._bounded(lambda end_s: _listening(wire, channel, end_s), uncertain=False)

        def hear(seconds: float) -> Any:
            try:
                return connection.pushed(seconds)
            except TROUBLE as error:
                raise Disturbed(str(error)) from None

        try:
            yield hear
        finally:
            connection.close()


def _head(k: Keys) -> bytes:
    """The command that accepts one message, packed as far as the message."""
    words = verbs.enqueue(k, ()).command()
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # of any length
    return b"*%d" % (len(words) + len(verbs.Entry._fields) - 1) + packed[packed.index(b"\r\n") :]


def _granted(replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _listening(wire: Wire, channel: str, end_s: float) -> Connection:
    connection = wire.connect(end_s)
    try:
        connection.until(end_s)
        connection.send(("SUBSCRIBE", channel))
        _granted([connection.reply()])
        connection.until(NEVER)
    except BaseException:
        connection.close()
        raise
    return connection
