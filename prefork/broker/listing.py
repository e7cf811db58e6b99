"""What is in one place of a queue, a page at a time, as plain data. Reads only, and not more than is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prefork.broker import verbs
from prefork.broker.client import Client
from prefork.broker.facts import iso, name, pairs
from prefork.broker.keys import CLAIMED_PER_MS
from prefork.broker.survey import census, of_message
from prefork.message import State

PAGE = 200  # messages in one command
CANCELLED = b"0 cancelled"
Found = list[tuple[bytes, dict[str, Any]]]


def page(client: Client, queue: str, place: str, offset: int, limit: int) -> list[dict[str, Any]]:
    """Some of what is in one place of a queue, what is next in line first; of dead letters the newest."""
    ids = {"pending": _pending, "scheduled": _scheduled, "active": _active, "dead": _dead}[place](
        client, queue, offset, limit
    )
    rows: list[dict[str, Any]] = []
    k = client.keys(queue)
    for at in range(0, len(ids), PAGE):
        some = ids[at : at + PAGE]
        names = [id for id, _ in some]
        found = zip(some, values(client, k.messages, names), values(client, k.state, names), strict=True)
        for (id, known), raw, state in found:
            if raw is not None and raw != CANCELLED:  # else it has gone on meanwhile
                text = name(id)
                head = {"id": text, "queue": queue, "place": place}
                rows.append(head | known | of_message(text, queue, raw, State.decode(state)))
    return rows


def values(client: Client, key: str, fields: Sequence[str | bytes]) -> Iterator[bytes | None]:
    """Of a hash, one for each field; however large they are, no command for them takes long."""
    at = 0
    while at < len(fields):
        found: list[bytes | None] = client.call(verbs.peek(key, fields[at : at + PAGE]))
        yield from found
        at += len(found)


def _pending(client: Client, queue: str, offset: int, limit: int) -> Found:
    """Higher priorities, then those of none, then lower ones."""
    k = client.keys(queue)
    found: Found = []
    for key, low, high in ((k.ranked, "-inf", "(0"), (k.pending, "", ""), (k.ranked, "(0", "+inf")):
        if not low:
            size = client.read("LLEN", k.pending)
            ids = client.read("LRANGE", k.pending, offset, offset + limit - len(found) - 1)
        else:
            size = client.read("ZCOUNT", key, low, high)
            ids = client.read("ZRANGEBYSCORE", key, low, high, "LIMIT", offset, limit - len(found))
        found += [(id, {}) for id in ids]
        offset = max(0, offset - size)
        if len(found) >= limit:
            break
    return found


def _scheduled(client: Client, queue: str, offset: int, limit: int) -> Found:
    key = client.keys(queue).scheduled
    found = client.read("ZRANGE", key, offset, offset + limit - 1, "WITHSCORES")
    return [(id, {"due_at": iso(ms)}) for id, ms in pairs(found)]


def _dead(client: Client, queue: str, offset: int, limit: int) -> Found:
    key = client.keys(queue).dead
    found = client.read("ZREVRANGE", key, offset, offset + limit - 1, "WITHSCORES")
    return [(id, {"died_at": iso(ms)}) for id, ms in pairs(found)]


def _active(client: Client, queue: str, offset: int, limit: int) -> Found:
    found: Found = []
    for worker in census(client, queue).leases:
        key = client.keys(queue).active(worker)
        for id, claimed in pairs(client.read("ZRANGE", key, 0, offset + limit - 1, "WITHSCORES")):
            found.append((id, {"worker": worker, "claimed_at": iso(claimed / CLAIMED_PER_MS)}))
    return found[offset : offset + limit]
