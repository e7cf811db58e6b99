"""What an operator can know of the queues and of one task, as plain data."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from prefork.broker import facts, verbs
from prefork.broker.client import Client
from prefork.broker.facts import iso
from prefork.errors import BadMessage, ResultUnavailable
from prefork.message import STATE_FIELDS, State, decode

MOMENTS = {"pending": "enqueued_at", "scheduled": "due_at", "active": "claimed_at", "dead": "died_at"}


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
    counters = facts.scored(stats)
    waited_ms = now_ms - _ready_ms(queue, *first, now_ms=now_ms) if first else 0
    report = QueueReport(
        queue, pending, scheduled, active, dead, bool(paused), counters.get("processed", 0), counters.get("failed", 0),
        round(max(0, waited_ms) / 1000, 3),
    )  # fmt: skip
    return Census(report, now_ms, messages, facts.scored(leases))


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
        host, pid = whose(name)
        silent = {"host": host, "pid": pid, "queues": listens[name]}
        known = reports.get(name, silent) | {"worker": name, "answered": name in reports}
        held = sum(client.read("ZCARD", client.keys(q).active(name)) for q in listens[name])
        told.append(known | {"holds": held, "lease_s": round((ends[name] - now_ms) / 1000, 3)})
    return told


def crash_loop(known: dict[str, Any]) -> str:
    """In words, that the children of a worker die one after the other with nothing running."""
    return (
        f"children crash at start: {known['times']} times, next try in {known['next_s']:.1f} s, last: {known['last']}"
    )


def whose(worker: str) -> tuple[str, int]:
    """Host and pid of a worker, by its name; pid 0 for a name that is none of ours."""
    parts = worker.rsplit(":", 4)
    ours = len(parts) == 5 and parts[2].isascii() and parts[2].isdecimal()
    return parts[0], int(parts[2]) if ours and len(parts[2]) < 12 else 0


def _reports(client: Client, names: list[str], until_s: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    while True:
        for name in names:
            if name not in found and (told := facts.report(client.reported(name) or b"")):
                found[name] = told
        if len(found) == len(names) or time.monotonic() > until_s:
            return found
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Sight:
    """One task, as inspect.lua has found it. `score_ms`: when it is due, was claimed, or died, by its place."""

    queue: str
    place: str
    raw: bytes | None
    state: State
    record: bytes | None
    worker: str
    score_ms: int


def look(client: Client, queue: str, id: str) -> Sight | None:
    """Look for a task in one queue. None: nothing is known of it there."""
    place, raw, state, record, worker, score = client.call(verbs.inspect(client.keys(queue), id))
    if not place:
        return None
    return Sight(queue, place.decode(), raw, State.decode(state), record, facts.name(worker), facts.whole(score))


def find(client: Client, id: str) -> Sight:
    """Look for a task in all queues. Raises ResultUnavailable when nothing is known of it."""
    for queue in client.queues():
        if seen := look(client, queue, id):
            return seen
    raise ResultUnavailable(f"nothing is known of task {id}: its result has expired, or it never was")


def queue_of(client: Client, id: str) -> str | None:
    """The queue that a task is in, or was in; None when nothing is known of it."""
    return next((queue for queue in client.queues() if look(client, queue, id)), None)


def task(client: Client, id: str) -> dict[str, Any]:
    """Everything that is known of one task. Raises ResultUnavailable when nothing is."""
    seen = find(client, id)
    known: dict[str, Any] = {"id": id, "queue": seen.queue, "place": seen.place}
    if seen.worker:
        known["worker"] = seen.worker
    if seen.score_ms and seen.place in MOMENTS:
        known[MOMENTS[seen.place]] = iso(seen.score_ms)
    if seen.raw is not None:
        known |= of_message(id, seen.queue, seen.raw, seen.state)
    return known | (facts.record(seen.record) if seen.record is not None else {})


def of_message(id: str, queue: str, raw: bytes, state: State) -> dict[str, Any]:
    """What a message and its state tell, with times in ISO 8601; of one that can't be read, what there is."""
    past = {name: value for name in STATE_FIELDS if name != "due_ms" and (value := getattr(state, name))}
    happened = facts.with_times(past)
    if "errors" in happened:
        happened["errors"] = facts.errors(happened["errors"])
    if "progress" in happened:
        happened["progress"] = facts.progress(happened["progress"])
    try:
        message = decode(id.encode(), queue, raw)
        args, kwargs = facts.load(message.body)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError("its arguments are not [[…], {…}]")
    except (BadMessage, ValueError, TypeError) as error:
        return facts.unreadable(raw, error) | happened
    options = {name: value for name, value in asdict(message.header).items() if value is not None and name != "task"}
    told = {"task": message.header.task, "args": args, "kwargs": kwargs, "priority": message.priority}
    return {**told, "enqueued_at": iso(message.enqueued_ms), "options": options, **happened}


def _ready_ms(queue: str, id: bytes, raw: bytes | None, state: bytes | None, *, now_ms: int) -> int:
    """Since when a message has been waiting to be claimed."""
    try:
        message = decode(id, queue, raw or b"")
    except BadMessage:
        return now_ms
    header = message.header
    asked_ms = header.due_ms or message.enqueued_ms + round((header.delay_s or 0) * 1000)
    return max(message.enqueued_ms, asked_ms, State.decode(state).due_ms)
