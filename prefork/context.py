"""What a task with `takes_context=True` is given first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from prefork.errors import PayloadTooLarge
from prefork.invocation import Invocation
from prefork.message import derived_id, new_id
from prefork.result import TaskResult

R = TypeVar("R")
MAX_FOLLOW_UPS = 1000
MAX_FOLLOW_UP_BYTES = 16 << 20


def _nowhere(*_: Any) -> None:
    """A task that was called plainly has nobody to report to."""


@dataclass
class Context:
    """This attempt of this task.

    `attempt` counts from 1. `retries_left`: retries after this attempt. `deadline`: when it will be killed; None when
    it has no timeout. `enqueued_at`: by the server's clock.
    """

    id: str
    task_name: str
    queue_name: str
    attempt: int
    retries_left: int
    enqueued_at: datetime | None
    deadline: datetime | None
    follow_ups: list[Invocation[Any]] = field(default_factory=list)
    report: Callable[[int | float, int | float | None, str], None] = _nowhere
    _size: int = 0  # of the follow-ups, in bytes

    @classmethod
    def local(cls, task_name: str) -> Context:
        """The context of a plain call."""
        return cls(new_id(), task_name, "default", 1, 0, None, None)

    def progress(self, done: int | float, total: int | float | None = None, text: str = "") -> None:
        """Say how far it has come: seen in `TaskResult.progress` and `prefork show`. Cheap: at most some a second."""
        self.report(done, total, text)

    def enqueue(self, invocation: Invocation[R]) -> TaskResult[R]:
        """Enqueue a follow-up together with this task's own acknowledgement, only if this attempt succeeds."""
        self._size += len(invocation.payload)
        if len(self.follow_ups) >= MAX_FOLLOW_UPS or self._size > MAX_FOLLOW_UP_BYTES:
            raise PayloadTooLarge(
                f"{self.task_name} {self.id}: follow-ups are limited to {MAX_FOLLOW_UPS} and {MAX_FOLLOW_UP_BYTES:,} "
                f"bytes; enqueue so many at once, by enqueue_many"
            )
        id = derived_id(self.id, len(self.follow_ups))
        self.follow_ups.append(invocation)
        return invocation.result(id, 0)
