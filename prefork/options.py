"""What can be said of a task, and what makes no sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from prefork.errors import InvalidOption
from prefork.message import LATEST_MS
from prefork.retry import RetryDelay

QUEUE_NAME = re.compile(r"[^\s{}:,]{1,100}")
PREFIX = re.compile(r"[^\s{}]{1,100}")
DAY_S = 86_400.0
TEN_YEARS_S = 3650 * DAY_S

Duration = float | timedelta
Moment = float | timedelta | datetime


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """A task's options, checked, times in seconds. The worker's own registration of the task is what holds."""

    queue_name: str = "default"
    priority: int = 0
    max_retries: int = 25
    retry_delay: RetryDelay | None = None
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    dont_retry_on: tuple[type[BaseException], ...] = ()
    timeout_s: float | None = None
    soft_timeout_s: float | None = None
    expires_s: float | None = None
    result_ttl_s: float = DAY_S
    takes_context: bool = False


def queue_name(value: Any) -> str:
    """A queue's name: 1 to 100 characters, no space, comma, colon or brace. Raises InvalidOption."""
    if not isinstance(value, str) or not QUEUE_NAME.fullmatch(value) or not value.isprintable():
        raise InvalidOption(f"queue_name={value!r}: a queue's name has 1 to 100 characters, no space , : {{ or }}")
    return str.__str__(value)  # a member of an Enum is formatted as something else


def prefix(value: Any) -> str:
    """What the names of all keys start with: 1 to 100 characters, no space or brace. Raises InvalidOption."""
    if not isinstance(value, str) or not PREFIX.fullmatch(value) or not value.isprintable():
        raise InvalidOption(f"prefix={value!r}: a prefix has 1 to 100 characters, no space {{ or }}")
    return str.__str__(value)


def priority(value: Any) -> int:
    """A priority, -100 to 100; higher goes first. Raises InvalidOption."""
    if not isinstance(value, int) or isinstance(value, bool) or not -100 <= value <= 100:
        raise InvalidOption(f"priority={value!r}: a priority is an integer from -100 to 100; higher goes first")
    return int(value)


def max_retries(value: Any) -> int:
    """A number of retries, 0 to 1000. Raises InvalidOption."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1000:
        raise InvalidOption(f"max_retries={value!r}: give an integer from 0 to 1000")
    return int(value)


def seconds(name: str, value: Any, *, least: float = 0.001) -> float:
    """A duration in seconds, from a number or a timedelta. Raises InvalidOption."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not least <= number <= TEN_YEARS_S:
        raise InvalidOption(f"{name}={value!r}: give seconds or a timedelta, from {least:g} s to 10 years")
    return float(number)


def maybe_seconds(name: str, value: Any) -> float | None:
    """As `seconds`; None stays None."""
    return None if value is None else seconds(name, value)


def moment(name: str, value: Any, *, least: float) -> tuple[float | None, int | None]:
    """A point in time: (seconds from now, None), or (None, ms since the epoch) for a datetime. Raises InvalidOption."""
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise InvalidOption(f"{name}={value!r}: the datetime is naive; give it a timezone, or pass a timedelta")
        return None, min(LATEST_MS, max(0, round(value.timestamp() * 1000)))
    return seconds(name, value, least=least), None


def exceptions(name: str, value: Any) -> tuple[type[BaseException], ...]:
    """A tuple of exception classes, from one or several. Raises InvalidOption."""
    given = tuple(value) if isinstance(value, tuple | list | set | frozenset) else (value,)
    for kind in given:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise InvalidOption(f"{name}: {kind!r} is not an exception class")
    return given


def timeouts(timeout_s: float | None, soft_timeout_s: float | None) -> None:
    """Raises InvalidOption for a soft timeout that could never come before the hard one."""
    if timeout_s is not None and soft_timeout_s is not None and soft_timeout_s >= timeout_s:
        raise InvalidOption(f"soft_timeout={soft_timeout_s:g} must be shorter than timeout={timeout_s:g}")


def retry_delay(value: Any) -> RetryDelay | None:
    """A retry policy: seconds, a timedelta, a function of the retry count, or None. Raises InvalidOption."""
    if value is None or callable(value):
        policy: Callable[[int], float] | None = value
        return policy
    return seconds("retry_delay", value, least=0)
