"""What an operator can know of the queues and of one task, as plain data."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from prefork.broker.client import Client
from prefork.errors import BadMessage, ResultUnavailable
from prefork.message import State, decode


@dataclass(frozen=True, slots=True)
class QueueReport:
    """One queue. `latency_s`: how long the next in line has been waiting; 0 when nothing waits.

    `processed`: attempts that came to an end; `failed`: those of them that failed. Both since the queue began.
    """

    name: str
    pending: int
    scheduled: int
    active: int
    dead: int
    paused: bool
    processed: int
    failed: int
    latency_s: float


@dataclass(frozen=True, slots=True)
class Census:
    """What census.lua has counted, at one moment. `leases`: worker -> when its lease ends, ms."""

    report: QueueReport
    now_ms: int
    messages: int
    leases: dict[str, int]


def census(client: Client, queue: str) -> Census:
    """Count what a queue holds."""
    now_ms, pending, scheduled, active, dead, paused, messages, stats, leases, *first = client.census(queue)
    counters = {name.decode(): int(count) for name, count in zip(stats[::2], stats[1::2], strict=True)}
    waited_ms = now_ms - _ready_ms(queue, *first, now_ms=now_ms) if first else 0
    report = QueueReport(
        queue, pending, scheduled, active, dead, bool(paused), counters.get("processed", 0), counters.get("failed", 0),
        round(max(0, waited_ms) / 1000, 3),
    )  # fmt: skip
    ends = {name.decode(): int(float(end)) for name, end in zip(leases[::2], leases[1::2], strict=True)}
    return Census(report, now_ms, messages, ends)


def queues(client: Client) -> list[dict[str, Any]]:
    """All queues that were ever used, as `prefork queues --json` prints them."""
    return [asdict(census(client, name).report) for name in client.queues()]


def workers(client: Client, limit_s: float = 1.0) -> list[dict[str, Any]]:
    """What every worker says of itself, asked now; in the place of one that is silent, what its lease says.

    `answered`: whether it did within `limit_s` seconds; one that holds a lease and is silent stands still, or is gone.
    """
    ends: dict[str, int] = {}
    listens: dict[str, list[str]] = {}
    now_ms = 0
    for queue in client.queues():
        counted = census(client, queue)
        now_ms = counted.now_ms
        for name, ends_ms in counted.leases.items():
            ends[name] = max(ends.get(name, 0), ends_ms)
            listens.setdefault(name, []).append(queue)
    asked = [name for name in ends if client.ask(listens[name][0], name, "report")]
    reports = _reports(client, asked, time.monotonic() + limit_s)
    told = []
    for name in sorted(ends):
        parts = name.rsplit(":", 4)
        pid = int(parts[2]) if len(parts) == 5 and parts[2].isdecimal() else 0
        silent = {"worker": name, "host": parts[0], "pid": pid, "queues": listens[name]}
        known = reports.get(name, silent) | {"answered": name in reports}
        held = sum(client.read("zcard", client.keys(q).active(name)) for q in listens[name])
        told.append(known | {"holds": held, "lease_s": round((ends[name] - now_ms) / 1000, 3)})
    return told


def _reports(client: Client, names: list[str], until_s: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    while True:
        for name in names:
            if name not in found and (raw := client.reported(name)):
                found[name] = orjson.loads(raw)
        if len(found) == len(names) or time.monotonic() > until_s:
            return found
        time.sleep(0.02)


def queue_of(client: Client, id: str) -> str | None:
    """The queue that a task is in, or was in; None when nothing is known of it."""
    return next((queue for queue in client.queues() if client.inspect(queue, id)[0]), None)


def task(client: Client, id: str) -> dict[str, Any]:
    """Everything that is known of one task. Raises ResultUnavailable when nothing is."""
    for queue in client.queues():
        place, raw, state, record, worker, score_ms = client.inspect(queue, id)
        if place:
            break
    else:
        raise ResultUnavailable(f"nothing is known of task {id}: its result has expired, or it never was")
    known: dict[str, Any] = {"id": id, "queue": queue, "place": place}
    if worker:
        known["worker"] = worker
    if score_ms:
        known[{"scheduled": "due_at", "active": "claimed_at", "dead": "died_at"}[place]] = iso(score_ms)
    if raw is not None:
        known |= of_message(id, queue, raw, State.decode(state))
    if record is not None:
        known |= _with_times(orjson.loads(record))
    return known


def of_message(id: str, queue: str, raw: bytes, state: State) -> dict[str, Any]:
    """What a message and its state tell, with times in ISO 8601; of one that can't be read, what there is."""
    happened = _with_times({name: value for name, value in asdict(state).items() if value and name != "due_ms"})
    try:
        message = decode(id.encode(), queue, raw)
        args, kwargs = orjson.loads(message.body)
    except (BadMessage, ValueError, TypeError) as error:
        return {"unreadable": str(error), "raw": raw[:2000].decode("utf-8", "replace"), **happened}
    options = {name: value for name, value in asdict(message.header).items() if value is not None and name != "task"}
    told = {"task": message.header.task, "args": args, "kwargs": kwargs, "priority": message.priority}
    return {**told, "enqueued_at": iso(message.enqueued_ms), "options": options, **happened}


def _with_times(known: dict[str, Any]) -> dict[str, Any]:
    """The same, with `…_ms` since the epoch as `…_at` in ISO 8601."""
    return {
        (name.removesuffix("_ms") + "_at" if name.endswith("_ms") else name): (
            iso(value) if name.endswith("_ms") else value
        )
        for name, value in known.items()
    }


def _ready_ms(queue: str, id: bytes, raw: bytes | None, state: bytes | None, *, now_ms: int) -> int:
    """Since when a message has been waiting to be claimed."""
    try:
        message = decode(id, queue, raw or b"")
    except BadMessage:
        return now_ms
    header = message.header
    asked_ms = header.due_ms or message.enqueued_ms + round((header.delay_s or 0) * 1000)
    return max(message.enqueued_ms, asked_ms, State.decode(state).due_ms)


def iso(ms: int | float | None) -> str | None:
    """ISO 8601, of milliseconds since the epoch."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds") if ms else None
