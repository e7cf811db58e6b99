"""What a child tells the master of a task that failed: the error, and whether, when and at whose cost to try again."""

from __future__ import annotations

import logging
import os
import traceback
import types
from typing import Any

import orjson

from prefork.errors import Dead, Retry
from prefork.message import MAX_ERROR_TEXT
from prefork.retry import default_retry_delay, retry_delay_s
from prefork.task import Task

log = logging.getLogger("prefork")
NOT_THE_TASKS = (os.path.dirname(__file__) + os.sep, os.path.join(os.path.dirname(os.__file__), "asyncio") + os.sep)


def verdict(task: Task[..., Any], retried: int, error: BaseException) -> bytes:
    """What the master needs to decide what becomes of this attempt, which was retried so often before."""
    options = task.options
    said: dict[str, Any] = {"error": told(error)}
    if isinstance(error, (Dead, *options.dont_retry_on)):
        said["dead"] = True
    elif isinstance(error, Retry):
        said |= {"delay_s": error.delay_s, "counted": error.counted, "asked": True}
    elif options.retry_on != (Exception,) and not isinstance(error, options.retry_on):
        said["dead"] = True
    if not said.get("dead") and said.get("delay_s") is None:
        try:
            said["delay_s"] = retry_delay_s(options.retry_delay, retried)
        except BaseException as fault:
            log.warning("retry_delay of %s failed (%r); the default holds", task.name, fault)
            said["delay_s"] = default_retry_delay(retried)
    return orjson.dumps(said)


def dead(error: BaseException) -> bytes:
    """The same of an error after which no other attempt can help."""
    return orjson.dumps({"error": told(error), "dead": True})


def told(error: BaseException) -> dict[str, str]:
    """Class, message and traceback, as text that JSON can carry."""
    kind = type(error)
    try:
        text = str(error)
    except BaseException:
        text = "<its text cannot be made>"
    try:
        trace = "".join(traceback.format_exception(kind, error, _own_frames(error)))
    except BaseException:
        trace = ""
    return {
        "class": clean(f"{kind.__module__}.{kind.__qualname__}".replace("prefork.errors.", "prefork."), 300),
        "message": clean(text, 2000),
        "traceback": clean(trace, MAX_ERROR_TEXT),
    }


def _own_frames(error: BaseException) -> types.TracebackType | None:
    """The traceback without the frames at its beginning that are ours, or asyncio's for us."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename.startswith(NOT_THE_TASKS):
        trace = trace.tb_next
    return trace


def clean(text: str, limit: int) -> str:
    """Text that JSON can carry, its middle left out if it is too long."""
    if len(text) > limit:
        text = f"{text[: limit // 3]}\n… {len(text) - limit:,} characters left out …\n{text[-(limit - limit // 3) :]}"
    return text.encode("utf-8", "replace").decode()
