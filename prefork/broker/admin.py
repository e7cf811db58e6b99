"""What an operator can do to messages and queues. Each step is bounded, so that the server is never held up."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefork.broker import facts, verbs
from prefork.broker.client import Client
from prefork.broker.survey import Sight
from prefork.errors import BadMessage, UnknownQueue
from prefork.message import decode

BATCH = 100  # messages in one script
PAGE = 1000  # ids in one reply
RESULT_TTL_MS = 86_400_000  # of what is cancelled here, where nobody knows the task's own
PLACES = {"pending": ("pending", "ranked"), "scheduled": ("scheduled",), "dead": ("dead",)}


def known_queue(client: Client, name: str) -> str:
    """The name itself. Raises UnknownQueue for one that was never used, with one that is spelt alike."""
    names = client.queues()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names[:20]) or 'none'}"
        raise UnknownQueue(f"there is no queue {name!r} under the prefix {client.prefix!r}; {hint}")
    return name


def retry(client: Client, queue: str, ids: Iterable[str | bytes]) -> int:
    """Let dead letters run again, all retries and crashes forgiven, their errors kept. -> how many of them were dead"""
    revived, left, k = 0, list(ids), client.keys(queue)
    while left:
        looked, some = client.call(verbs.revive(k, left[:BATCH]))
        revived += some
        del left[:looked]
    return revived


def retry_dead(client: Client, queue: str) -> int:
    """Let all that are dead letters now run again. -> how many"""
    k = client.keys(queue)
    seconds, micros = client.time()
    until_ms = seconds * 1000 + micros // 1000  # those that die again meanwhile are left
    revived = stuck = 0
    while ids := client.read("ZRANGEBYSCORE", k.dead, "-inf", until_ms, "LIMIT", stuck, PAGE):
        some = retry(client, queue, ids)
        stuck += len(ids) - some
        revived += some
    return revived


def cancel(client: Client, id: str, seen: Sight) -> str:
    """Cancel what has not started, or ask the worker that runs it to stop it. -> cancelled, asked or finished"""
    try:
        message = decode(id.encode(), seen.queue, seen.raw or b"")
        task, enqueued_ms = message.header.task, message.enqueued_ms
    except BadMessage:
        task, enqueued_ms = "", 0
    seconds, micros = client.time()
    record = {
        "status": "FAILED", "task": task, "attempts": seen.state.attempts, "enqueued_ms": enqueued_ms,
        "started_ms": seen.state.started_ms, "finished_ms": seconds * 1000 + micros // 1000,
        "errors": facts.errors(seen.state.errors),
    }  # fmt: skip
    return client.cancel(seen.queue, id, RESULT_TTL_MS, record, stop=True)


def delete(client: Client, queue: str, id: str) -> str:
    """Delete a message that nobody runs, and its result. -> deleted, running, or "" if nothing is known of it"""
    said: bytes = client.call(verbs.delete(client.keys(queue), id))
    return said.decode()


def purge(client: Client, queue: str, places: Iterable[str]) -> int:
    """Delete all that is in these places now: pending, scheduled, dead. -> how many messages"""
    gone, k = 0, client.keys(queue)
    for place in (part for name in places for part in PLACES[name]):
        # As many as there are now, or a producer that is faster than this would keep it busy for ever.
        left = client.read("LLEN", k.pending) if place == "pending" else client.read("ZCARD", getattr(k, place))
        while left > 0 and (some := int(client.call(verbs.purge(k, place, min(left, BATCH))))):
            gone, left = gone + some, left - some
    return gone


def pause(client: Client, queue: str, *, on: bool) -> bool:
    """Let nothing be claimed from a queue, or let it go on. -> whether that changed anything"""
    return bool(client.call(verbs.pause(client.keys(queue), on=on)))
