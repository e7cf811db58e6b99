"""Every error that a user of prefork can meet. Each message says what is wrong, where, and the remedy."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

TEN_YEARS_S = 3650 * 86_400


class PreforkError(Exception):
    """The base of all errors of prefork, so that one `except` catches them."""


class ConfigError(PreforkError):
    """A configuration that cannot be used: `file:line: what is wrong; remedy`."""

    def __init__(self, path: str | Path, line: int | None, text: str) -> None:
        self.path, self.line, self.text = str(path), line, text
        super().__init__(f"{path}:{line}: {text}" if line else f"{path}: {text}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.line, self.text)


class AppError(PreforkError):
    """An app that cannot be imported, or whose tasks cannot be registered."""


class PidfileTaken(PreforkError):
    """Another worker, which is alive, holds the pidfile."""


class PidfileUnusable(PreforkError):
    """A pidfile that can't be written, or that is something else."""


class NoPrivilege(PreforkError):
    """A `user` that this process may not become."""


class BrokerError(PreforkError):
    """A broker that cannot be used: a wrong URL, refused, too old, no permission, out of reach.

    Its address is named without the password.
    """


class EnqueueUncertain(BrokerError):
    """The broker went away while it was being asked: the task may have been accepted, or not."""


class InvalidOption(PreforkError, ValueError):
    """A task option or an option of `using` with a value that makes no sense."""


class InvalidArguments(PreforkError, TypeError):
    """Arguments that do not fit the signature of the task."""


class NotJSON(PreforkError, TypeError):
    """An argument or a result that JSON cannot carry; names which one, and its type."""


class PayloadTooLarge(PreforkError, ValueError):
    """A message or a result beyond the size limit; names both sizes, in bytes."""


class BadMessage(PreforkError, ValueError):
    """A message in the broker that cannot be decoded. It is kept as it is, as a dead letter."""


class BadSignature(BadMessage):
    """A message that is not signed, or not as it should be, for a worker with `signing_keys`: a dead letter."""


class UnknownTask(PreforkError, LookupError):
    """A message for a task name that this worker has not registered."""


class UnknownQueue(PreforkError, LookupError):
    """A queue that was never used, in a command of an operator."""


class TaskFailed(PreforkError):
    """Raised by `TaskResult.wait` for a task that failed for good. `traceback` is the task's own, as text."""

    def __init__(self, task_name: str, task_id: str, exception_class_path: str, message: str, traceback: str) -> None:
        self.task_name, self.task_id = task_name, task_id
        self.exception_class_path, self.message, self.traceback = exception_class_path, message, traceback
        head = f"{task_name} {task_id} failed: {exception_class_path}: {message}"
        super().__init__(f"{head}\n{traceback}".rstrip())

    def __reduce__(self) -> tuple[object, ...]:
        fields = (self.task_name, self.task_id, self.exception_class_path, self.message, self.traceback)
        return type(self), fields


class WaitTimeout(PreforkError, TimeoutError):
    """Raised by `TaskResult.wait(timeout)` when the task has not finished by then."""


class ResultUnavailable(PreforkError, LookupError):
    """Nothing is known of this task: it keeps no result, its result has expired, or it never was."""


class Expired(PreforkError):
    """Recorded as the error of a task that had not started by its `expires`."""


class TaskTimeout(PreforkError):
    """Recorded as the error of an attempt that was killed at its `timeout`."""


class ChildDied(PreforkError):
    """Recorded as the error of an attempt whose child died: a signal, a segfault, `os._exit`, out of memory."""


class Retry(PreforkError):
    """Raise in a task to ask for another run.

    `delay`: seconds or a timedelta until then (default: the task's `retry_delay`); `counted`: whether it uses up one of
    the task's `max_retries`. With none left, a counted Retry makes a dead letter. Raises InvalidOption.
    """

    def __init__(self, reason: str = "", *, delay: float | timedelta | None = None, counted: bool = True) -> None:
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds <= TEN_YEARS_S):
            raise InvalidOption(f"Retry(delay={delay!r}): give seconds or a timedelta, from 0 to 10 years")
        if not isinstance(counted, bool):
            raise InvalidOption(f"Retry(counted={counted!r}): give True or False")
        self.reason, self.delay_s, self.counted = reason, seconds, counted
        super().__init__(reason or "the task asked for another run")


class Dead(PreforkError):
    """Raise in a task to make it a dead letter now, whatever retries it has left."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "the task asked to be a dead letter")


class SoftTimeout(BaseException):
    """Raised inside a task at its `soft_timeout`. Not an `Exception`, so that `except Exception` lets it pass."""


class Cancelled(BaseException):
    """Raised inside a running task that an operator cancels; recorded as the error of each task that was cancelled.

    Not an `Exception`, so that `except Exception` lets it pass. In an `async def` task, asyncio's CancelledError is
    raised in its place.
    """
