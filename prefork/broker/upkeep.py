"""What else has to be right with a queue, that its work goes on: owners, what is due, counters, the pause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prefork.broker import facts, verbs
from prefork.broker.client import Client
from prefork.broker.finding import Finding, fault
from prefork.broker.listing import values
from prefork.broker.passage import BATCH, pages
from prefork.message import LATEST_MS

OVERDUE_MS = 10_000
LONGEST_LEASE_MS = 3_600_000


class Upkeep:
    """Of one queue. `holders`: the workers that hold anything there, with a lease or without."""

    def __init__(self, client: Client, queue: str, holders: Iterable[str]) -> None:
        self._client, self._queue, self._k = client, queue, client.keys(queue)
        leased = set(map(facts.name, client.read("ZRANGE", self._k.leases, 0, -1)))
        self._unleased = sorted(set(holders) - leased)

    def findings(self) -> Iterator[Finding]:
        """All that is wrong."""
        yield from self._owners()
        yield from self._overdue()
        yield from self._counters()
        yield from self._paused()

    def _owners(self) -> Iterator[Finding]:
        leases = dict(facts.pairs(self._client.read("ZRANGE", self._k.leases, 0, -1, "WITHSCORES")))
        seconds, _ = self._client.time()
        for worker in self._unleased:
            # First what it holds, then its lease: it can't have got one since, and lost it again.
            held = self._client.read("ZCARD", self._k.active(worker))
            if held and self._client.read("ZSCORE", self._k.leases, worker) is None:
                held = self._client.read("ZCARD", self._k.active(worker))
            if held:
                yield self._put_back(worker, "holds {} messages without a lease, so that nobody runs them", held)
        for raw, ends_ms in leases.items():
            worker = facts.name(raw)
            if ends_ms > seconds * 1000 + 2 * LONGEST_LEASE_MS:

                def shorten(raw: bytes = raw, worker: str = worker) -> str:
                    until = (self._client.time()[0] * 1000) + 60_000
                    self._client.read("ZADD", self._k.leases, "XX", "LT", until, raw)
                    return f"queue {self._queue}: the lease of {worker} ends in 60 s, unless it lives and renews it"

                yield Finding(
                    "error",
                    f"queue {self._queue}: the lease of {worker} ends in more than two hours: no worker asks for that",
                    "prefork doctor --repair lets it end in 60 s", "endless_lease", self._queue, shorten,
                )  # fmt: skip

    def _put_back(self, worker: str, what: str, held: int) -> Finding:
        def restore() -> str:
            moved = self._client.call(verbs.restore(self._k, worker, "expired"))
            n = moved[0] if isinstance(moved, list) else max(0, int(moved))
            return f"queue {self._queue}: {n} messages that {worker} held put back to the front of the queue"

        return Finding(
            "error", f"queue {self._queue}: {worker} {what.format(held)}",
            "prefork doctor --repair puts them back into the queue", "no_owner", self._queue, restore,
        )  # fmt: skip

    def _overdue(self) -> Iterator[Finding]:
        k, client = self._k, self._client
        late = f"({client.time()[0] * 1000 - OVERDUE_MS}"
        late_n = client.read("ZCOUNT", k.scheduled, "-inf", late)
        n = late_n + client.read("ZCOUNT", k.scheduled, f"({LATEST_MS}", "+inf")
        if not n:
            return

        def promote() -> str:
            moved = 0
            while some := int(client.call(verbs.promote(k, OVERDUE_MS, LATEST_MS, BATCH))):
                moved += some
            return f"queue {self._queue}: {moved} scheduled messages put into the queue"

        when = f"have been due for more than {OVERDUE_MS // 1000} s" if late_n else "are due at no time that will come"
        yield Finding(
            "warning", f"queue {self._queue}: {n} scheduled messages {when}",
            "start a worker on this queue; or prefork doctor --repair puts them into it",
            "overdue", self._queue, promote,
        )  # fmt: skip

    def _counters(self) -> Iterator[Finding]:
        k, client = self._k, self._client
        for key, kind in ((k.stats, "bad_counter"), (k.takeovers, "bad_takeovers")):
            odd = [id for _, damaged in pages(client, key, "counts") for id in damaged]
            if odd:
                was = dict(zip(odd, values(client, key, odd), strict=True))

                def drop(id: bytes, key: str = key, was: dict[bytes, bytes | None] = was) -> bool:
                    return bool(client.call(verbs.swap(key, id, was[id] or b"", None)))

                yield fault(self._queue, kind, odd, drop)
        processed, failed = (_count(raw) for raw in client.read("HMGET", k.stats, "processed", "failed"))
        if processed is None or failed is None or failed <= processed:
            return

        def add_up() -> str:
            client.call(verbs.swap(k.stats, "failed", b"%d" % failed, b"%d" % processed))
            return f"queue {self._queue}: the counter `failed` is {processed} now, as `processed`"

        yield Finding(
            "warning", f"queue {self._queue}: {failed} attempts have failed, and only {processed} were made",
            "prefork doctor --repair brings the counters into line", "counters_off", self._queue, add_up,
        )  # fmt: skip

    def _paused(self) -> Iterator[Finding]:
        value = self._client.read("GET", self._k.paused)
        if value in (None, b"1"):
            return

        def pause() -> str:
            self._client.read("SET", self._k.paused, "1", "XX")
            return f"queue {self._queue} is paused properly now"

        yield Finding(
            "warning", f"queue {self._queue} is paused, not by prefork: its flag is {value[:40]!r}",
            f"prefork resume {self._queue}; or prefork doctor --repair makes it a proper pause", "odd_pause",
            self._queue, pause,
        )  # fmt: skip


def _count(raw: bytes | None) -> int | None:
    return int(raw or 0) if (raw or b"0").isdigit() else None
