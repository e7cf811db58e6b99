"""The verbs that the broker knows: one Lua script each, and how its arguments are laid out.

Producers send them over a blocking connection (`client`), the master over its event loop (`channel`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from prefork.broker.keys import Keys

Argument = str | bytes | int
SCRIPTS = Path(__file__).parent / "scripts"
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
    text = (SCRIPTS / f"{name}.lua").read_bytes()
    return Script(name, text, sha1(text, usedforsecurity=False).hexdigest())


@dataclass(slots=True)  # a frozen one takes twice as long to make
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


class Entry(NamedTuple):
    """A message to be enqueued. `at`: "" for now, "+ms" from now, or "ms" since the epoch, by the server's clock."""

    queue: str
    id: str
    priority: int
    at: str
    payload: bytes  # header, newline, body


def enqueue(k: Keys, entries: Iterable[Entry], *, again: bool = False) -> Call:
    """Accept messages, all for this queue. -> [server ms, how many were new]"""
    words: list[Argument] = [k.result_prefix if again else "", k.active_prefix, k.inbox_prefix]
    for entry in entries:
        words += entry[1:]
    keys = (k.messages, k.pending, k.ranked, k.scheduled, k.wake, k.idle, k.paused)
    return Call("enqueue", keys, tuple(words))


def claim(k: Keys, worker: str, n: int, number: int = 0, room: int = 0) -> Call:
    """Take up to n messages. -> [server ms, next due ms or -1, left, [ids], [messages], [states]]

    `number`: of this claim; `room`: if it finds fewer than so many, `enqueue` may hand the worker one later.
    """
    keys = (k.leases, k.active(worker), k.messages, k.state, k.pending, k.ranked, k.scheduled, k.wake, k.paused, k.idle)
    return Call("claim", keys, (worker, n, number, room))


def settle(
    k: Keys, worker: str, dead_max: int, dead_ttl_ms: int, plain: Sequence[str], records: Iterable[Argument]
) -> Call:
    """Settle a batch: `plain` ids are done and keep no result; records as settle.lua says. -> [server ms, settled]"""
    keys = (
        k.leases, k.active(worker), k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.stats, k.wake,
    )  # fmt: skip
    head = (worker, k.result_prefix, k.done_prefix, k.stop_prefix, dead_max, dead_ttl_ms, len(plain))
    return Call("settle", keys, (*head, *plain, *records))


def restore(
    k: Keys, worker: str, mode: str, kept: Iterable[str | bytes] = (), max_takeovers: int = MAX_TAKEOVERS
) -> Call:
    """Put back what a worker holds. `mode`: left, gone, expired, unmoved or keep. -> see restore.lua"""
    keys = (
        k.leases, k.active(worker), k.messages, k.pending, k.ranked, k.wake, k.takeovers, k.state, k.dead, k.stats,
        k.idle,
    )  # fmt: skip
    head = (worker, mode, max_takeovers, k.done_prefix, k.result_prefix, k.stop_prefix)
    return Call("restore", keys, (*head, *kept))


def beat(k: Keys, worker: str, lease_ms: int, *, first: bool) -> Call:
    """Take or renew a lease. -> [server ms, next due ms or -1, 0 if nothing waits, how many it holds, worker, its
    lease's end ms, …]
    """
    keys = (k.leases, k.pending, k.ranked, k.scheduled, k.paused, k.active(worker))
    return Call("beat", keys, (worker, lease_ms, "01"[first]))


def cancel(
    k: Keys, id: str, result_ttl_ms: int, record: bytes, stopped: bytes | None = None, *, again: bool = False
) -> Call:  # fmt: skip
    """Cancel what has not been claimed, with that record. -> cancelled, asked, running, finished

    `stopped`: ask the worker that runs it to stop it; what its record is to be if that worker dies.
    """
    keys = (k.messages, k.state, k.leases, k.scheduled, k.ranked, k.dead, k.stats, k.pending)
    head = (id, k.active_prefix, k.result_prefix + id, k.done_prefix + id, result_ttl_ms, record)
    asked = ("", "", "") if stopped is None else (k.requests_prefix, k.stop_prefix + id, stopped)
    return Call("cancel", keys, (*head, *asked, "again" if again else ""))


def ask(k: Keys, worker: str, request: str) -> Call:
    """Ask a living worker for something. -> 1, or 0 if it has no lease"""
    return Call("ask", (k.leases, k.requests(worker)), (worker, request))


def revive(k: Keys, ids: Iterable[str | bytes]) -> Call:
    """Let dead letters run again. -> [how many of the ids it has looked at, how many of these were dead]"""
    keys = (k.messages, k.state, k.pending, k.ranked, k.dead, k.wake, k.takeovers)
    return Call("revive", keys, (k.result_prefix, k.stop_prefix, *ids))


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


def keys(prefix: str, cursor: bytes, n: int) -> Call:
    """Look at some keys of a prefix. -> [next cursor, how many, [key, type, ms until it expires or -1, …]]"""
    pattern = "".join(f"\\{c}" if c in "*?[]\\^" else c for c in prefix)
    return Call("keys", (), (cursor, f"{pattern}:*", n, f"{prefix}:"))


def scan(key: str, cursor: bytes, n: int, kind: str) -> Call:
    """Look at some of what a key holds. `kind`: see scan.lua. -> [next cursor, bytes, [ids], [damaged ones]]"""
    return Call("scan", (key,), (cursor, n, kind))


def where(k: Keys, unleased: Sequence[str], ids: Iterable[bytes]) -> Call:
    """In how many places but pending ids are. -> [1 if it has a message, places, …]"""
    keys = (k.messages, k.ranked, k.scheduled, k.dead, k.leases)
    return Call("where", keys, (k.active_prefix, len(unleased), *unleased, *ids))


def place(k: Keys, unleased: Sequence[str], id: bytes, *, mend: bool = False) -> Call:
    """All places of an id; `mend`: bring it into exactly one. -> [b"message", b"cancelled" or b"none", [places]]"""
    keys = (k.messages, k.pending, k.ranked, k.scheduled, k.dead, k.leases, k.wake)
    return Call("place", keys, (id, "mend" if mend else "look", k.active_prefix, *unleased))


def bury(k: Keys, id: bytes, message: bytes, state: bytes) -> Call:
    """Make a dead letter of a message that waits and can't be read. -> 1 if it is one now"""
    keys = (k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.leases)
    return Call("bury", keys, (id, message, state))


def promote(k: Keys, overdue_ms: int, latest_ms: int, n: int) -> Call:
    """Promote what has been due for so long, or is due after all time. -> how many"""
    keys = (k.messages, k.pending, k.ranked, k.scheduled, k.wake, k.leases)
    return Call("promote", keys, (overdue_ms, latest_ms, n))


def stray(k: Keys, ids: Iterable[bytes], *, mend: bool = False) -> Call:
    """Which histories are of no message; `mend`: forget them. -> [ids]"""
    return Call("stray", (k.messages, k.state), ("mend" if mend else "look", *ids))


def swap(hash_key: str, field: bytes | str, old: bytes, new: bytes | None) -> Call:
    """Change a field of a hash, if it still has its old value; None: drop it. -> 1 if it did"""
    return Call("swap", (hash_key,), (field, old, "drop" if new is None else "set", new or b""))


def aside(key: str, to: str, kind: str, ms: int) -> Call:
    """Rename a key that is not of this type, and let it expire. -> 1 if it was another"""
    return Call("aside", (key, to), (kind, ms))


def bound(key: str, ms: int) -> Call:
    """Let a key expire that never would. -> 1 if it would not have"""
    return Call("bound", (key,), (ms,))


def inspect(k: Keys, id: str) -> Call:
    """All that is known of a task. -> [place, message, state, result record, worker, score]"""
    return Call(
        "inspect", (k.messages, k.state, k.leases, k.scheduled, k.dead, k.result_prefix + id), (id, k.active_prefix)
    )


def census(k: Keys) -> Call:
    """Count what a queue holds. -> see census.lua"""
    keys = (k.messages, k.state, k.pending, k.ranked, k.scheduled, k.dead, k.leases, k.stats, k.paused)
    return Call("census", keys, (k.active_prefix,))


def is_answer(verb: str, reply: object) -> bool:
    """Whether a reply is one that this script gives: what stands between may damage or mix up replies."""
    if verb == "restore":
        return isinstance(reply, int) or (isinstance(reply, list) and len(reply) == 2 and _are(int, reply))
    if not isinstance(reply, list):
        return False
    if verb == "claim":
        lists = len(reply) == 6 and _are(int, reply[:3]) and _are(list, reply[3:])
        # Of a thousand messages it is too dear to look at each; what is no message is a dead letter later.
        return lists and len(reply[3]) == len(reply[4]) and len(reply[5]) in (0, len(reply[3]))
    if verb == "beat":
        even = len(reply) >= 4 and len(reply) % 2 == 0
        return even and _are(int, reply[:4] + reply[5::2]) and _are(bytes, reply[4::2])
    return verb not in ("settle", "enqueue") or (len(reply) == 2 and _are(int, reply))


def _are(kind: type, values: list[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


def version_of(info: dict[str, object]) -> tuple[str, tuple[int, ...]]:
    """Name and version of a server from its INFO: what it calls itself, and the Redis version that it is equal to."""
    redis_version = str(info.get("redis_version", "0"))
    name = f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {redis_version}"
    return name, tuple(int(part) for part in redis_version.split(".")[:2] if part.isdigit())
