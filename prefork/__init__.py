"""prefork: background tasks for Python teams on Redis or Valkey. Nothing lost, nothing stuck, and fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefork.app import Prefork
    from prefork.context import Context
    from prefork.errors import (
        AppError,
        BadMessage,
        BadSignature,
        BrokerError,
        Cancelled,
        ChildDied,
        ConfigError,
        Dead,
        EnqueueUncertain,
        Expired,
        InvalidArguments,
        InvalidOption,
        NoPrivilege,
        NotJSON,
        PayloadTooLarge,
        PidfileTaken,
        PidfileUnusable,
        PreforkError,
        ResultUnavailable,
        Retry,
        SoftTimeout,
        TaskFailed,
        TaskTimeout,
        UnknownQueue,
        UnknownTask,
        WaitTimeout,
    )
    from prefork.invocation import Invocation
    from prefork.result import TaskError, TaskResult, TaskStatus
    from prefork.results import TaskResults
    from prefork.retry import default_retry_delay
    from prefork.task import AsyncTask, Task

__all__ = [
    "AppError", "AsyncTask", "BadMessage", "BadSignature", "BrokerError", "Cancelled", "ChildDied", "ConfigError",
    "Context", "Dead", "EnqueueUncertain", "Expired", "InvalidArguments", "InvalidOption", "Invocation", "NoPrivilege",
    "NotJSON", "PayloadTooLarge", "PidfileTaken", "PidfileUnusable", "Prefork", "PreforkError", "ResultUnavailable",
    "Retry", "SoftTimeout", "Task", "TaskError", "TaskFailed", "TaskResult", "TaskResults", "TaskStatus", "TaskTimeout",
    "UnknownQueue", "UnknownTask", "WaitTimeout", "default_retry_delay",
]  # fmt: skip

# Those that are not errors. Loaded when first asked for: a health check that runs every few seconds needs none
# of it.
_HOMES = {
    "Prefork": "app", "Context": "context", "Invocation": "invocation", "TaskError": "result", "TaskResult": "result",
    "TaskResults": "results", "TaskStatus": "result", "default_retry_delay": "retry", "AsyncTask": "task",
    "Task": "task",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'prefork' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"prefork.{_HOMES.get(name, 'errors')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
