"""`prefork cancel`: what waits is cancelled at once; what runs is told to stop, and waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from prefork.broker import admin, facts, survey
from prefork.broker.client import Client
from prefork.cli.output import plain
from prefork.errors import ResultUnavailable

DEFAULT_PATIENCE_S = 10.0  # a task has five seconds until its child is killed
LOOK_EVERY_S = 0.05
ASKED, KEEPS_NONE = "asked", "over; it keeps no result"
ENDED = ("cancelled", KEEPS_NONE)
Told = dict[str, str]  # id, outcome, and the worker that was asked


def stop(client: Client, ids: Iterable[str], patience_s: float) -> list[Told]:
    """Cancel tasks, and wait so long for those that run."""
    told = [_ask(client, id) for id in dict.fromkeys(ids)]  # all of them, before any is waited for
    waiting = [it for it in told if it["outcome"] == ASKED] if patience_s else []
    if waiting and sys.stderr.isatty():
        for it in waiting:
            print(plain(f"{it['id']}: asked {whom(it['worker'])} to stop it; waiting"), file=sys.stderr)
    end_s = time.monotonic() + patience_s
    while waiting and time.monotonic() < end_s:
        time.sleep(LOOK_EVERY_S)
        for it in waiting:
            it |= _ask(client, it["id"], it)
        waiting = [it for it in waiting if it["outcome"] == ASKED]
    for it in waiting:
        it["outcome"] = "asked to stop, and still running"
    return told


def whom(worker: str) -> str:
    """A worker, as people look for it."""
    host, pid = survey.whose(worker)
    return f"pid {pid} on {host}"


def _ask(client: Client, id: str, before: Told | None = None) -> Told:
    """Have a task end, wherever it is now: one that failed just then may wait for its retry."""
    try:
        seen = survey.find(client, id)
    except ResultUnavailable:
        return {"id": id, "outcome": KEEPS_NONE if before else "unknown"}
    if before and seen.place == "active" and seen.worker == before["worker"]:
        return before
    outcome = "finished" if seen.place in ("dead", "finished") else admin.cancel(client, id, seen)
    if outcome == ASKED:
        return {"id": id, "outcome": outcome, "worker": seen.worker}
    return {"id": id, "outcome": _ended(seen) if outcome == "finished" else outcome}


def _ended(seen: survey.Sight) -> str:
    """How it has ended; of a dead letter whose result has expired its state tells."""
    record = {"status": "FAILED"} if seen.record is None else facts.record(seen.record)
    errors = facts.errors(seen.state.errors if seen.record is None else record.get("errors"))
    cancelled = bool(errors) and errors[-1].get("class") == "prefork.Cancelled"
    return "cancelled" if cancelled else f"finished ({record.get('status', 'its result is damaged')})"
