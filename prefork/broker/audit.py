"""The proof, on a live queue and without stopping it, that each message is in exactly one place, and can go on.

1. All ids are read, a page at a time, while the queue works on: what does not fit together is a *doubt*, no more.
2. Doubts that a second look explains are dropped: most were messages on their way.
3. The few that are left are looked at by a script, one by one, all places at one moment. What it finds is a fault, and
   the script that repairs it looks again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prefork.broker import facts, verbs
from prefork.broker.client import Client
from prefork.broker.finding import Finding, fault
from prefork.broker.listing import CANCELLED, values
from prefork.broker.passage import Seen, batches, fits, kind_of, listed, pages
from prefork.errors import BadMessage
from prefork.message import State, decode

MOST_MESSAGES = 500_000  # of a queue, to be looked at one by one
MOST_DOUBTS = 10_000  # of a queue, to be looked at by a script of their own


class Audit:
    """Of one queue. `holders`: the workers that hold anything there, with a lease or without."""

    def __init__(self, client: Client, queue: str, holders: Iterable[str]) -> None:
        self._client, self._queue, self._k = client, queue, client.keys(queue)
        leased = set(map(facts.name, client.read("ZRANGE", self._k.leases, 0, -1)))
        self._holders = sorted(leased.union(holders))
        self._unleased = sorted(set(holders) - leased)
        self.looked_at = 0  # messages

    def findings(self) -> Iterator[Finding]:
        """All that is wrong."""
        if self._client.read("HLEN", self._k.messages) > MOST_MESSAGES:
            return
        seen, odd = self._look()
        self.looked_at = len(seen.messages)
        yield from self._placed(seen)
        yield from self._readable(odd)
        yield from self._histories(seen.messages)

    # -- messages -----------------------------------------------------------------------------------------------

    def _look(self) -> tuple[Seen, list[bytes]]:
        """Messages first: those that come later are in their places by the time that these are looked at."""
        k, seen, odd = self._k, Seen(), []
        for ids, damaged in pages(self._client, k.messages, "messages"):
            seen.messages.update(ids)
            odd += damaged
        for key in (*map(k.active, self._holders), k.ranked, k.scheduled, k.dead):
            there: set[bytes] = set()  # a page may repeat what was in another one
            for ids, _ in pages(self._client, key, "ids"):
                there.update(ids)
            seen.places.update(there)
        seen.places.update(listed(self._client, k.pending))
        return seen, odd

    def _placed(self, seen: Seen) -> Iterator[Finding]:
        doubts = seen.doubts()
        for _ in range(2):
            if doubts:
                pending = Counter(listed(self._client, self._k.pending))
                doubts = {id for id, has, places in self._where(doubts) if not fits(has, places + pending[id])}
        faults: dict[str, list[bytes]] = {}
        for id in sorted(doubts)[:MOST_DOUBTS]:
            if kind := kind_of(*self._client.call(verbs.place(self._k, self._unleased, id))):
                faults.setdefault(kind, []).append(id)
        for kind, ids in faults.items():
            yield fault(self._queue, kind, ids, self._place, more=len(doubts) > MOST_DOUBTS)

    def _where(self, ids: Iterable[bytes]) -> Iterator[tuple[bytes, bool, int]]:
        for some in batches(sorted(ids)):
            told = self._client.call(verbs.where(self._k, self._unleased, some))
            yield from zip(some, map(bool, told[::2]), told[1::2], strict=True)

    def _place(self, id: bytes) -> bool:
        return bool(kind_of(*self._client.call(verbs.place(self._k, self._unleased, id, mend=True))))

    def _readable(self, odd: list[bytes]) -> Iterator[Finding]:
        raws: dict[bytes, bytes] = {}
        for id, raw in zip(odd, values(self._client, self._k.messages, odd), strict=True):
            if raw is not None and raw != CANCELLED and not self._can_be_read(id, raw) and len(raws) < MOST_DOUBTS:
                is_, places = self._client.call(verbs.place(self._k, self._unleased, id))
                # What a worker holds, it will make a dead letter itself.
                if is_ == b"message" and places and places[0] in (b"pending", b"ranked", b"scheduled"):
                    raws[id] = raw

        def bury(id: bytes) -> bool:
            error = {"class": "prefork.BadMessage", "message": self._why_not(id, raws[id]), "traceback": ""}
            return bool(self._client.call(verbs.bury(self._k, id, raws[id], State(errors=[error]).encode())))

        if raws:
            yield fault(self._queue, "unreadable", list(raws), bury)

    def _can_be_read(self, id: bytes, raw: bytes) -> bool:
        return not self._why_not(id, raw)

    def _why_not(self, id: bytes, raw: bytes) -> str:
        try:
            args, kwargs = facts.load(decode(id, self._queue, raw).body)
            return "" if isinstance(args, list) and isinstance(kwargs, dict) else "its arguments are not [[…], {…}]"
        except (BadMessage, ValueError, TypeError) as error:
            return str(error)

    def _histories(self, messages: set[bytes]) -> Iterator[Finding]:
        stray, bad = [], {}
        for ids, damaged in pages(self._client, self._k.state, "states"):
            for some in batches([id for id in ids if id not in messages]):
                stray += self._client.call(verbs.stray(self._k, some))
            for id, raw in zip(damaged, values(self._client, self._k.state, damaged), strict=True):
                if raw is not None and State.decode(raw) == State() and raw != b"{}":
                    bad[id] = raw
        if stray:
            yield fault(self._queue, "stray_state", stray, lambda id: bool(
                self._client.call(verbs.stray(self._k, [id], mend=True))))  # fmt: skip
        if bad:
            yield fault(self._queue, "bad_state", [id for id in bad if id not in set(stray)], lambda id: bool(
                self._client.call(verbs.swap(self._k.state, id, bad[id], None))))  # fmt: skip
