"""What the broker holds may be anything, whoever wrote it. Here it is made what it should be, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import orjson

from prefork.message import LATEST_MS

TEXTS_OF_AN_ERROR = ("class", "message", "traceback", "stack")
# What a report has to have for anybody to rely on it; it may have more.
REPORT = {
    "host": str, "pid": int, "version": str, "app": str, "queues": list, "started_at": str, "uptime_s": int | float,
    "phase": str, "paused": bool, "broker": str, "ready": bool, "concurrency": int, "rss_bytes": int, "children": list,
}  # fmt: skip
CHILD = {
    "number": int, "pid": int, "state": str, "rss_bytes": int | None, "task": str | None, "id": str | None,
    "queue": str | None, "attempt": int | None, "running_s": int | float | None, "waiting": int,
}  # fmt: skip
CRASH_LOOP = {"times": int, "last": str, "next_s": int | float}


def name(raw: bytes) -> str:
    """A name of ours; of one that is no text, something that can be shown."""
    return raw.decode("utf-8", "backslashreplace")


def whole(value: Any) -> int:
    """A number as a whole one; 0 for what is none. A score that is out of all bounds is at their end."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0
    return 0 if math.isnan(number) else int(min(max(number, -LATEST_MS), LATEST_MS))


def scored(flat: Iterable[Any]) -> dict[str, int]:
    """name, score, name, score … as a dict."""
    words = iter(flat)
    return {name(raw): whole(score) for raw, score in zip(words, words, strict=False)}


def pairs(flat: Iterable[Any]) -> list[tuple[bytes, float]]:
    """name, score, name, score … as they are, two by two."""
    words = iter(flat)
    return [(raw, float(score)) for raw, score in zip(words, words, strict=True)]


def info(raw: Any) -> dict[str, Any]:
    """What INFO says, whole numbers as such. Raises ValueError for what is no such text."""
    if not isinstance(raw, bytes):
        raise ValueError("Protocol error: no answer to INFO")
    lines = (line.partition(":") for line in raw.decode(errors="replace").splitlines() if not line.startswith("#"))
    return {name: int(value) if value.isdecimal() else value for name, colon, value in lines if colon}


def iso(ms: Any) -> str | None:
    """ISO 8601, of milliseconds since the epoch; None for what is no such time."""
    if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 < ms <= LATEST_MS:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def with_times(known: dict[str, Any]) -> dict[str, Any]:
    """The same, with `…_ms` since the epoch as `…_at` in ISO 8601."""
    return {
        (key.removesuffix("_ms") + "_at" if key.endswith("_ms") else key): (
            iso(value) if key.endswith("_ms") else value
        )
        for key, value in known.items()
    }


def errors(value: Any) -> list[dict[str, Any]]:
    """Errors of attempts: plain values only, and texts where there have to be texts."""
    kept = (error for error in (value if isinstance(value, list) else ()) if isinstance(error, dict))
    return [
        {key: it for key, it in error.items() if isinstance(it, str if key in TEXTS_OF_AN_ERROR else int | float | str)}
        for error in kept
    ]


def cancelled(said: str) -> dict[str, str]:
    """The error of a task that was cancelled."""
    return {"class": "prefork.Cancelled", "message": said, "traceback": ""}


def progress(value: Any) -> list[Any]:
    """What a task has said of how far it is: done, total, text."""
    done, total, text = value
    return [whole_or_part(done), None if total is None else whole_or_part(total), text if isinstance(text, str) else ""]


def whole_or_part(value: Any) -> int | float:
    """A number; 0 for what is none."""
    return value if isinstance(value, int | float) else 0


def load(raw: bytes | memoryview) -> Any:
    """JSON that can also be written again. Raises ValueError, and nothing else."""
    try:
        value = orjson.loads(raw)
        orjson.dumps(value)  # it writes less deep than it reads
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return value


def unreadable(raw: bytes, why: object) -> dict[str, Any]:
    """What there is to say of something that can't be decoded."""
    return {"unreadable": str(why), "raw": raw[:2000].decode("utf-8", "replace")}


def record(raw: bytes) -> dict[str, Any]:
    """The outcome of a task that has finished, with times in ISO 8601."""
    try:
        known = load(raw)
        if not isinstance(known, dict) or not isinstance(known.get("status"), str):
            raise ValueError("it is no outcome of a task")
    except ValueError as error:
        return unreadable(raw, f"its result is damaged: {error}")
    told = with_times(known)
    return told | {"errors": errors(told["errors"])} if "errors" in told else told


def report(raw: bytes) -> dict[str, Any] | None:
    """What a worker has told of itself; None if that is not what a worker tells."""
    try:
        told = load(raw)
    except ValueError:
        return None
    if not _has(told, REPORT) or not all(_has(child, CHILD) for child in told["children"]):
        return None
    if not _has(told.get("crash_loop"), CRASH_LOOP):
        told["crash_loop"] = None  # as of a worker of an older version
    return told if all(isinstance(queue, str) for queue in told["queues"]) else None


def _has(told: Any, shape: dict[str, Any]) -> bool:
    return isinstance(told, dict) and all(key in told and isinstance(told[key], kind) for key, kind in shape.items())
