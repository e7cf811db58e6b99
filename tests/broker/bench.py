"""The scripts of one queue, run one by one on a server, and what they have left there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from prefork.broker import verbs
from prefork.broker.keys import Keys

PAYLOAD = b'{"task":"t"}\n[[],{}]'
DAY_MS = 86_400_000


@dataclass
class Claimed:
    """What `claim` returns."""

    now: int
    next_due: int
    left: int
    ids: list[str]
    messages: list[bytes]
    states: list[bytes | None]


class Bench:
    """One queue on a server."""

    def __init__(self, client: Any, queue: str = "q") -> None:
        self.client, self.keys = client, Keys("t", queue)

    def run(self, call: verbs.Call) -> Any:
        try:
            return self.client.execute_command(*call.command())
        except redis.exceptions.NoScriptError:
            return self.client.execute_command(*call.command(in_full=True))

    # -- the verbs ----------------------------------------------------------------------------------------------

    def enqueue(self, entries: Iterable[verbs.Entry]) -> list[int]:
        """-> [server ms, how many were new]"""
        reply: list[int] = self.run(verbs.enqueue(self.keys, entries))
        return reply

    def put(self, *ids: str, priority: int = 0, at: str = "", payload: bytes = PAYLOAD) -> int:
        """Enqueue messages. -> how many were new"""
        return self.enqueue(verbs.Entry(self.keys.queue, id, priority, at, payload) for id in ids)[1]

    def lease(self, *workers: str, ms: int = 60_000) -> None:
        for worker in workers:
            self.run(verbs.beat(self.keys, worker, ms, first=True))

    def claim(self, worker: str, n: int) -> Claimed:
        now, next_due, left, ids, messages, states = self.run(verbs.claim(self.keys, worker, n))
        return Claimed(now, next_due, left, [id.decode() for id in ids], messages, states)

    def settle(
        self, worker: str, *records: tuple[Any, ...], plain: Iterable[str] = (), dead_max: int = 10_000,
        dead_ttl_ms: int = 180 * DAY_MS,
    ) -> list[int]:  # fmt: skip
        """-> [server ms, how many left the active set]"""
        words = [word for record in records for word in record]
        reply: list[int] = self.run(verbs.settle(self.keys, worker, dead_max, dead_ttl_ms, list(plain), words))
        return reply

    def restore(self, worker: str, mode: str, *kept: str) -> int:
        moved: int = self.run(verbs.restore(self.keys, worker, mode, kept, 1_000_000))
        return moved

    def cancel(self, id: str, ttl_ms: int = 0) -> str:
        said: bytes = self.run(verbs.cancel(self.keys, id, ttl_ms, b'{"status":"FAILED"}'))
        return said.decode()

    def inspect(self, id: str) -> list[Any]:
        found: list[Any] = self.run(verbs.inspect(self.keys, id))
        return found

    # -- what is there ------------------------------------------------------------------------------------------

    @property
    def pending(self) -> list[str]:
        return [id.decode() for id in self.client.lrange(self.keys.pending, 0, -1)]

    @property
    def ranked(self) -> list[str]:
        return [id.decode() for id in self.client.zrange(self.keys.ranked, 0, -1)]

    @property
    def scheduled(self) -> dict[str, int]:
        return {id.decode(): int(due) for id, due in self.client.zrange(self.keys.scheduled, 0, -1, withscores=True)}

    @property
    def dead(self) -> list[str]:
        return [id.decode() for id in self.client.zrange(self.keys.dead, 0, -1)]

    @property
    def messages(self) -> set[str]:
        """The ids of those that are there with their body; of a cancelled one the id may stay for a while."""
        return {id.decode() for id, body in self.client.hgetall(self.keys.messages).items() if body.startswith(b"1 ")}

    def active(self, worker: str) -> list[str]:
        return [id.decode() for id in self.client.zrange(self.keys.active(worker), 0, -1)]

    def state(self, id: str) -> bytes | None:
        found: bytes | None = self.client.hget(self.keys.state, id)
        return found

    def result(self, id: str) -> bytes | None:
        found: bytes | None = self.client.get(self.keys.result_prefix + id)
        return found

    @property
    def stats(self) -> dict[str, int]:
        return {name.decode(): int(n) for name, n in self.client.hgetall(self.keys.stats).items()}

    @property
    def awake(self) -> bool:
        """Whether an idle master would be woken."""
        return bool(self.client.exists(self.keys.wake))

    def sleep(self) -> None:
        """Take the marker away, as an idle master does when it wakes."""
        self.client.delete(self.keys.wake)

    def make_due(self, *ids: str) -> None:
        """Let delayed messages be due now, in this order, without waiting for it."""
        self.client.zadd(self.keys.scheduled, {id: 1000 + n for n, id in enumerate(ids)}, xx=True)

    def everything(self) -> dict[str, Any]:
        """All keys with what they hold."""
        readers = {
            b"hash": self.client.hgetall,
            b"list": lambda key: self.client.lrange(key, 0, -1),
            b"zset": lambda key: self.client.zrange(key, 0, -1, withscores=True),
            b"set": self.client.smembers,
            b"string": self.client.get,
        }
        return {key.decode(): readers[self.client.type(key)](key) for key in sorted(self.client.keys("*"))}

    def places(self) -> dict[str, list[str]]:
        """Where each id is: all of its places, so more than one for a duplicate."""
        found: dict[str, list[str]] = {}
        lists = {"pending": self.pending, "ranked": self.ranked, "scheduled": list(self.scheduled), "dead": self.dead}
        for key in self.client.keys(self.keys.active_prefix + "*"):
            worker = key.decode().removeprefix(self.keys.active_prefix)
            lists[f"active:{worker}"] = self.active(worker)
        for place, ids in lists.items():
            for id in ids:
                found.setdefault(id, []).append(place)
        return found
