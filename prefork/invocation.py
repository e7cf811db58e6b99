"""A task with its arguments, checked and encoded, ready to be sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from prefork.broker.verbs import Entry
from prefork.result import Home, TaskResult
from prefork.results import TaskResults
from prefork.signing import Signer

R_co = TypeVar("R_co", covariant=True)


class Sender(Home, Protocol):
    """What an invocation and its task need of the app."""

    @property
    def signer(self) -> Signer | None:
        """Who signs messages; None: nobody."""

    def enqueue_many(self, invocations: Iterable[Invocation[Any]]) -> TaskResults[Any]:
        """Enqueue many, in batches."""

    def enqueue_follow_ups(self, parent_id: str, follow_ups: list[Invocation[Any]]) -> None:
        """Enqueue what a plain call has gathered in its context."""


@dataclass(slots=True)  # a frozen one takes twice as long to make
class Invocation(Generic[R_co]):
    """Made by `task.s(…)`, to be enqueued by `app.enqueue_many` or `context.enqueue`.

    `at`: as `Entry` has it. `payload`: header, newline, body.
    """

    sender: Sender
    task_name: str
    queue_name: str
    priority: int
    at: str
    payload: bytes

    def entry(self, id: str) -> Entry:
        """As the broker takes it."""
        payload, signer = self.payload, self.sender.signer
        if signer is not None:
            payload = signer.sign(id, self.queue_name, self.priority, payload)
        return Entry(self.queue_name, id, self.priority, self.at, payload)

    def result(self, id: str, enqueued_ms: int) -> TaskResult[R_co]:
        """What its caller gets once it is enqueued, or will be."""
        return TaskResult(self.sender, id, self.queue_name, self.task_name, enqueued_ms)
