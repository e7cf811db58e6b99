"""The keys of a prefix: whether each is one of ours, of the right type, and expires if it should."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefork.broker import facts, verbs
from prefork.broker.client import Client
from prefork.broker.finding import Finding, named

PAGE = 1000  # keys that one script looks at
# What a worker reports of itself is under its identity (lease.py), of which no other program makes keys.
WORKER = re.compile(r"worker:[^{}]+:[0-9a-f]{8}:[1-9][0-9]*:[^:{}]*:[0-9]+")
MOST_LOOKED_AT = 5_000_000  # keys, of whomever
MOST_UNKNOWN = 1000
KEPT_MS = 30 * 86_400_000  # what was put aside
DAY_MS, WEEK_MS = 86_400_000, 604_800_000
# Of a queue: the name that a key has behind its queue -> its type, and when it should expire at the latest (0: never).
FIXED = {
    "m": ("hash", 0), "state": ("hash", 0), "pending": ("list", 0), "ranked": ("zset", 0), "scheduled": ("zset", 0),
    "dead": ("zset", 0), "leases": ("zset", 0), "stats": ("hash", 0), "wake": ("zset", 0), "paused": ("string", 0),
    "idle": ("zset", 0), "takeovers": ("hash", WEEK_MS),
}  # fmt: skip
NAMED = {
    "active": ("zset", 0), "requests": ("zset", 60_000), "stop": ("string", DAY_MS), "r": ("string", DAY_MS),
    "aside": ("", KEPT_MS),
}  # fmt: skip


@dataclass
class Keyspace:
    """What there is under a prefix."""

    queues: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)  # those that the set of queues names
    holders: dict[str, list[str]] = field(default_factory=dict)  # queue -> workers that hold something there
    broken: set[str] = field(default_factory=set)  # queues with a key of another type
    findings: list[Finding] = field(default_factory=list)


def look(client: Client) -> Keyspace:
    """Look at all keys of the prefix, a page at a time."""
    found, unknown = Keyspace(), []
    queues_key = f"{client.prefix}:queues"
    types: dict[str, str] = {}
    for raw, kind, left_ms in _keys(client):
        key = facts.name(raw)
        types[key] = kind
        if key == queues_key:
            _check(client, found, "", key, kind, left_ms, ("set", 0))
        elif WORKER.fullmatch(key.removeprefix(f"{client.prefix}:")):
            _check(client, found, "", key, kind, left_ms, ("string", 10_000))
        else:
            queue, name = _parts(client, key)
            first, _, rest = name.partition(":")
            shape = NAMED.get(first) if rest else FIXED.get(first)
            if not shape:
                unknown.append(raw)
                continue
            if first not in ("aside", "leases", "requests", "stop", "r"):  # a worker begins with those
                found.queues.add(queue)
            _check(client, found, queue, key, kind, left_ms, shape)
            if first == "active" and kind == "zset":
                found.holders.setdefault(queue, []).append(rest)
    if types.get(queues_key) in (None, "set"):
        found.listed = set(client.queues())
    _unlisted(client, found, queues_key)
    if unknown:
        found.findings.append(Finding(
            "warning",
            f"{len(unknown)} keys under the prefix {client.prefix!r} are none of prefork's: {named(unknown)}",
            "left alone, since they may be another program's: delete them, or give it another prefix", "unknown_key",
        ))  # fmt: skip
    return found


def _keys(client: Client) -> Iterator[tuple[bytes, str, int]]:
    seen, looked, cursor = set(), 0, b"0"
    while looked < MOST_LOOKED_AT:
        cursor, n, told = client.call(verbs.keys(client.prefix, cursor, PAGE))
        looked += max(n, PAGE)
        for key, kind, left_ms in zip(told[::3], told[1::3], told[2::3], strict=True):
            if key not in seen:
                seen.add(key)
                yield key, kind.decode(), left_ms
        if cursor == b"0":
            return


def _parts(client: Client, key: str) -> tuple[str, str]:
    """The queue of a key, and the rest of its name; "" for a key that has no queue."""
    tag, found, name = key[len(client.prefix) + 1 :].partition("}:")
    return (tag[1:], name) if found and tag.startswith("{") else ("", "")


def _check(
    client: Client, found: Keyspace, queue: str, key: str, kind: str, left_ms: int, shape: tuple[str, int]
) -> None:
    wanted, ttl_ms = shape
    where = f"queue {queue}: " if queue else ""
    if wanted and kind != wanted:
        found.broken.add(queue)
        k = client.keys(queue)
        to = f"{k.aside_prefix}{key.rpartition('}:')[2]}:{time.time_ns()}" if queue else f"{key}.{time.time_ns()}"

        def put_aside() -> str:
            if key == k.paused:  # whatever it is, it has kept the queue from running
                client.read("SET", key, "1")
                return f"queue {queue} was paused by a {kind}; it is paused properly now"
            if not queue:
                to_key = f"{client.prefix}:{{}}:aside:{to.rpartition(':')[2]}"
                client.call(verbs.aside(key, to_key, wanted, KEPT_MS))
                return f"{key} put aside for 30 days, as {to_key}"
            client.call(verbs.aside(key, to, wanted, KEPT_MS))
            return f"{where}{key} put aside for 30 days, as {to}"

        found.findings.append(Finding(
            "error", f"{where}{key} is a {kind}, and should be a {wanted}: nothing works with it",
            "prefork doctor --repair puts it aside; then what it named gets a place again", "wrong_type", queue,
            put_aside,
        ))  # fmt: skip
    elif ttl_ms and left_ms == -1:

        def bound() -> str:
            client.call(verbs.bound(key, ttl_ms))
            return f"{where}{key} expires in {ttl_ms / 1000:,.0f} s now"

        found.findings.append(Finding(
            "warning", f"{where}{key} would never expire, and should", "prefork doctor --repair lets it", "no_expiry",
            queue, bound,
        ))  # fmt: skip


def _unlisted(client: Client, found: Keyspace, queues_key: str) -> None:
    missing = sorted(found.queues - found.listed - {""})
    if not missing:
        return

    def name_them() -> str:
        client.read("SADD", queues_key, *missing)
        return f"named in the set of queues: {', '.join(missing)}"

    found.findings.append(Finding(
        "error", f"{len(missing)} queues are not in the set of queues, so that no command shows them: "
        f"{', '.join(missing[:5])}", "prefork doctor --repair names them there", "unlisted_queue", mend=name_them,
    ))  # fmt: skip
