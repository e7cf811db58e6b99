"""The verbs that the broker knows: one Lua script each, and how its arguments are laid out.

Producers send them over a blocking connection (`client`), the master over its event loop (`channel`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files

from prefork.broker.keys import Keys

Argument = str | bytes | int
OLDEST_SERVER = (6, 2)
MAX_TAKEOVERS = 10


@dataclass(frozen=True)
class Script:
    """A script with the name under which a server that has loaded it knows it."""

    name: str
    text: bytes
    sha: str


@cache
def script(name: str) -> Script:
    """The script of that verb."""
    text = (files("prefork.broker") / "scripts" / f"{name}.lua").read_bytes()
    return Script(name, text, sha1(text, usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Call:
    """A verb with its keys and arguments, ready to be sent."""

    verb: str
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...] = ()

    def command(self, *, in_full: bool = False) -> tuple[Argument, ...]:
        """The words of the command; `in_full` for a server that has not loaded the script."""
        it = script(self.verb)
        head: tuple[Argument, ...] = ("EVAL", it.text) if in_full else ("EVALSHA", it.sha)
        return (*head, len(self.keys), *self.keys, *self.arguments)


@dataclass(frozen=True, slots=True)
class Entry:
    """A message to be enqueued. `at`: "" for now, "+ms" from now, or "ms" since the epoch, by the server's clock."""

    queue: str
    id: str
    priority: int
    at: str
    payload: bytes  # header, newline, body

    def arguments(self) -> tuple[Argument, ...]:
        """As `enqueue` and `settle` take it."""
        return self.id, self.priority, self.at, self.payload


def enqueue(k: Keys, entries: Iterable[Entry], *, again: bool = False) -> Call:
    """Accept messages, all for this queue. -> [server ms, how many were new]"""
    keys = (k.messages, k.pending, k.ranked, k.scheduled, k.wake)
    head = k.result_prefix if again else ""
    return Call("enqueue", keys, (head, *(word for entry in entries for word in entry.arguments())))


def claim(k: Keys, worker: str, n: int) -> Call:
    """Take up to n messages. -> [server ms, next due ms or -1, left, [ids], [messages], [states]]"""
    keys = (k.leases, k.active(worker), k.messages, k.state, k.pending, k.ranked, k.scheduled, k.wake, k.paused)
    return Call("claim", keys, (worker, n))


def settle(
    k: Keys, worker: str, dead_max: int, dead_ttl_ms: int, plain: Sequence[str], records: Iterable[Argument]
) -> Call:
    """Settle a batch: `plain` ids are done and keep no result; records as settle.lua says. -> [server ms, settled]"""
    keys = (
        k.leases, k.active(worker), k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.stats, k.wake,
    )  # fmt: skip
    head = (worker, k.result_prefix, k.done_prefix, dead_max, dead_ttl_ms, len(plain))
    return Call("settle", keys, (*head, *plain, *records))


def restore(
    k: Keys, worker: str, mode: str, kept: Iterable[str | bytes] = (), max_takeovers: int = MAX_TAKEOVERS
) -> Call:
    """Put back what a worker holds. `mode`: left, gone, expired or keep. -> see restore.lua"""
    keys = (k.leases, k.active(worker), k.messages, k.pending, k.ranked, k.wake, k.takeovers, k.state, k.dead)
    return Call("restore", keys, (worker, mode, max_takeovers, k.done_prefix, *kept))


def beat(k: Keys, worker: str, lease_ms: int, *, first: bool) -> Call:
    """Take or renew a lease. -> [server ms, next due ms or -1, waiting, worker, lease's end ms, worker, end …]"""
    return Call("beat", (k.leases, k.pending, k.ranked, k.scheduled, k.paused), (worker, lease_ms, "01"[first]))


def cancel(k: Keys, id: str, result_ttl_ms: int, record: bytes, *, stop: bool = False) -> Call:
    """Cancel what has not been claimed; `stop`: ask the worker that runs it. -> cancelled, asked, running, finished"""
    keys = (k.messages, k.state, k.leases, k.scheduled, k.ranked, k.dead, k.stats, k.pending)
    head = (id, k.active_prefix, k.result_prefix + id, k.done_prefix + id, result_ttl_ms, record)
    return Call("cancel", keys, (*head, k.requests_prefix if stop else ""))


def ask(k: Keys, worker: str, request: str) -> Call:
    """Ask a living worker for something. -> 1, or 0 if it has no lease"""
    return Call("ask", (k.leases, k.requests(worker)), (worker, request))


def revive(k: Keys, states: Iterable[tuple[str, bytes]]) -> Call:
    """Let dead letters run again, with these states. -> how many"""
    keys = (k.messages, k.state, k.pending, k.ranked, k.dead, k.wake, k.takeovers)
    return Call("revive", keys, (k.result_prefix, *(word for id, state in states for word in (id, state))))


def delete(k: Keys, id: str) -> Call:
    """Delete a message that nobody runs. -> b"deleted", b"running" or b"" """
    keys = (
        k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.leases, k.result_prefix + id, k.stats,
    )  # fmt: skip
    return Call("delete", keys, (id, k.active_prefix))


def purge(k: Keys, place: str, n: int) -> Call:
    """Delete up to n messages of one place: pending, ranked, scheduled or dead. -> how many were there"""
    places = {"pending": k.pending, "ranked": k.ranked, "scheduled": k.scheduled, "dead": k.dead}
    return Call("purge", (k.messages, k.state, k.stats, k.leases, places[place]), (n, k.result_prefix))


def pause(k: Keys, *, on: bool) -> Call:
    """Pause a queue, or let it go on. -> 1 if that changed anything"""
    return Call("pause", (k.paused, k.wake), ("01"[on],))


def peek(hash_key: str, fields: Iterable[str | bytes]) -> Call:
    """Some values of a hash. -> those of the first fields, as many as are not too large together"""
    return Call("peek", (hash_key,), tuple(fields))


def sample(k: Keys, n: int, workers: int) -> Call:
    """Look at up to n ids of each place. -> [how many, [ids without a message], [ids in two places]]"""
    keys = (k.messages, k.pending, k.ranked, k.scheduled, k.dead, k.leases)
    return Call("sample", keys, (k.active_prefix, n, workers))


def inspect(k: Keys, id: str) -> Call:
    """All that is known of a task. -> [place, message, state, result record, worker, score]"""
    return Call(
        "inspect", (k.messages, k.state, k.leases, k.scheduled, k.dead, k.result_prefix + id), (id, k.active_prefix)
    )


def census(k: Keys) -> Call:
    """Count what a queue holds. -> see census.lua"""
    keys = (k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.leases, k.stats, k.paused)
    return Call("census", keys, (k.active_prefix,))


def version_of(info: dict[str, object]) -> tuple[str, tuple[int, ...]]:
    """Name and version of a server from its INFO: what it calls itself, and the Redis version that it is equal to."""
    redis_version = str(info.get("redis_version", "0"))
    name = f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {redis_version}"
    return name, tuple(int(part) for part in redis_version.split(".")[:2] if part.isdigit())
