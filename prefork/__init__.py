"""prefork: background tasks for Python teams on Redis or Valkey. Nothing lost, nothing stuck, and fast."""

from prefork.app import Prefork
from prefork.context import Context
from prefork.errors import (
    AppError,
    BadMessage,
    BrokerError,
    Cancelled,
    ChildDied,
    ConfigError,
    Dead,
    EnqueueUncertain,
    Expired,
    InvalidArguments,
    InvalidOption,
    NotJSON,
    PayloadTooLarge,
    PreforkError,
    ResultUnavailable,
    Retry,
    SoftTimeout,
    TaskFailed,
    TaskTimeout,
    UnknownTask,
    WaitTimeout,
)
from prefork.invocation import Invocation
from prefork.result import TaskError, TaskResult, TaskStatus
from prefork.retry import default_retry_delay
from prefork.task import AsyncTask, Task

__all__ = [
    "AppError", "AsyncTask", "BadMessage", "BrokerError", "Cancelled", "ChildDied", "ConfigError", "Context", "Dead",
    "EnqueueUncertain", "Expired", "InvalidArguments", "InvalidOption", "Invocation", "NotJSON", "PayloadTooLarge",
    "Prefork", "PreforkError", "ResultUnavailable", "Retry", "SoftTimeout", "Task", "TaskError", "TaskFailed",
    "TaskResult", "TaskStatus", "TaskTimeout", "UnknownTask", "WaitTimeout", "default_retry_delay",
]  # fmt: skip
