"""What an operator can do to messages and queues. Each step is bounded, so that the server is never held up."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefork.broker import verbs
from prefork.broker.client import Client
from prefork.errors import UnknownQueue
from prefork.message import State

BATCH = 100
PLACES = {"pending": ("pending", "ranked"), "scheduled": ("scheduled",), "dead": ("dead",)}


def known_queue(client: Client, name: str) -> str:
    """The name itself. Raises UnknownQueue for one that was never used, with one that is spelt alike."""
    names = client.queues()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names[:20]) or 'none'}"
        raise UnknownQueue(f"there is no queue {name!r} under the prefix {client.prefix!r}; {hint}")
    return name


def retry(client: Client, queue: str, ids: Iterable[str]) -> int:
    """Let dead letters run again, all retries and crashes forgiven, their errors kept. -> how many of them were dead"""
    revived, batch = 0, []
    for id in ids:
        batch.append(id)
        if len(batch) == BATCH:
            revived += _revive(client, queue, batch)
            batch = []
    return revived + (_revive(client, queue, batch) if batch else 0)


def _revive(client: Client, queue: str, ids: list[str]) -> int:
    k = client.keys(queue)
    states = []
    for id, raw in zip(ids, client.read("hmget", k.state, ids), strict=True):
        state = State.decode(raw)
        state.retried = state.crashes = state.unknown = state.due_ms = 0
        states.append((id, state.encode()))
    return int(client.call(verbs.revive(k, states)))


def retry_dead(client: Client, queue: str) -> int:
    """Let all that are dead letters now run again. -> how many"""
    k = client.keys(queue)
    seconds, micros = client.time()
    until_ms = seconds * 1000 + micros // 1000  # those that die again meanwhile are left
    revived = stuck = 0
    while ids := client.read("zrangebyscore", k.dead, "-inf", until_ms, start=stuck, num=BATCH):
        some = _revive(client, queue, [id.decode("utf-8", "surrogateescape") for id in ids])
        stuck += len(ids) - some
        revived += some
    return revived


def delete(client: Client, queue: str, id: str) -> str:
    """Delete a message that nobody runs, and its result. -> deleted, running, or "" if nothing is known of it"""
    said: bytes = client.call(verbs.delete(client.keys(queue), id))
    return said.decode()


def purge(client: Client, queue: str, places: Iterable[str]) -> int:
    """Delete all that is in these places: pending, scheduled, dead. -> how many messages"""
    gone = 0
    for place in (part for name in places for part in PLACES[name]):
        while some := int(client.call(verbs.purge(client.keys(queue), place, BATCH))):
            gone += some
    return gone


def pause(client: Client, queue: str, *, on: bool) -> bool:
    """Let nothing be claimed from a queue, or let it go on. -> whether that changed anything"""
    return bool(client.call(verbs.pause(client.keys(queue), on=on)))
