"""What became of a task, seen from where it was enqueued."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import orjson

from prefork import message
from prefork.broker import facts
from prefork.broker.client import Client, Disturbed
from prefork.broker.wire import NEVER
from prefork.errors import BadMessage, ResultUnavailable, TaskFailed, WaitTimeout

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
NOTHING: Mapping[str, Any] = MappingProxyType({})
RECHECK_S = 1.0  # the word that a task has finished can get lost with its connection
ANSWER_S = 2.0  # for a broker to say, when the time is over, that it has not


class Home(Protocol):
    """What a result needs of the app that it belongs to."""

    @property
    def client(self) -> Client:
        """The connection to the broker."""

    def result_ttl_ms(self, task_name: str) -> int:
        """How long results of a task are kept; 0 for none."""


class TaskStatus(StrEnum):
    """As in Django's Tasks. A task that waits for its retry is READY again."""

    READY = "READY"
    RUNNING = "RUNNING"
    SUCCESSFUL = "SUCCESSFUL"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class TaskError:
    """The error of one attempt. `exception_class_path`: as `module.Class`; `traceback`: as text, may be empty."""

    exception_class_path: str
    traceback: str
    message: str = ""

    @property
    def exception_class(self) -> str:
        """The last part of the path."""
        return self.exception_class_path.rpartition(".")[2]


class TaskResult(Generic[R_co]):
    """A task that was enqueued, as it was at the last `refresh`. Making one asks nothing of the broker."""

    __slots__ = ("_app", "_enqueued_ms", "_known", "_value", "id", "queue_name", "status", "task_name")

    def __init__(self, app: Home, id: str, queue_name: str, task_name: str, enqueued_ms: int) -> None:
        self.id, self.queue_name, self.task_name = id, queue_name, task_name
        self.status = TaskStatus.READY
        self._app, self._enqueued_ms = app, enqueued_ms
        self._known: Mapping[str, Any] = NOTHING
        self._value: Any = None

    def __repr__(self) -> str:
        return f"<{self.task_name} {self.id} {self.status}>"

    @property
    def enqueued_at(self) -> datetime | None:
        """When the broker accepted it, by its clock."""
        return _moment(self._enqueued_ms)

    @property
    def started_at(self) -> datetime | None:
        """When its first attempt began."""
        return _moment(self._known.get("started_ms"))

    @property
    def finished_at(self) -> datetime | None:
        """When it succeeded, or failed for good."""
        return _moment(self._known.get("finished_ms"))

    @property
    def is_finished(self) -> bool:
        """Whether it has succeeded, or failed for good."""
        return self.status in (TaskStatus.SUCCESSFUL, TaskStatus.FAILED)

    @property
    def attempts(self) -> int:
        """How often it was started."""
        known = self._known.get("attempts", 0)
        return known if isinstance(known, int) else 0

    @property
    def errors(self) -> list[TaskError]:
        """The errors of its attempts so far: the first and the latest ones."""
        return [
            TaskError(e.get("class", ""), e.get("traceback", ""), e.get("message", ""))
            for e in self._known.get("errors", ())
        ]

    @property
    def progress(self) -> tuple[float, float | None, str] | None:
        """What the running task said last: done, total, text."""
        said = self._known.get("progress")
        return (said[0], said[1], said[2]) if said else None

    @property
    def return_value(self) -> R_co:
        """What the task returned, as JSON carries it. Raises ValueError before it has succeeded."""
        if self.status is TaskStatus.SUCCESSFUL:
            return self._value  # type: ignore[no-any-return]
        raise ValueError("Task failed" if self.status is TaskStatus.FAILED else "Task has not finished yet")

    def refresh(self) -> None:
        """Ask the broker. Raises ResultUnavailable when it knows nothing of this task (any more)."""
        place, raw, state, record, _, score = self._app.client.inspect(self.queue_name, self.id)
        if record is not None:
            self._take_record(record)
        elif place == "dead":
            self.status = TaskStatus.FAILED
            self._take_state(raw, state)
            self._known = {**self._known, "finished_ms": score}
        elif place:
            self.status = TaskStatus.RUNNING if place == "active" else TaskStatus.READY
            self._take_state(raw, state)
            if place == "active":
                self._known = {"started_ms": score, **self._known, "attempts": self.attempts + 1}
        elif self._keeps_none():
            raise ResultUnavailable(f"{self.task_name} {self.id} has finished and keeps no result: its result_ttl is 0")
        else:
            raise ResultUnavailable(
                f"nothing is known of task {self.id} in queue {self.queue_name}: its result has expired, or it never "
                f"was"
            )

    async def arefresh(self) -> None:
        """As `refresh`, without blocking the event loop."""
        await self._app.client.in_thread(self.refresh)

    def wait(self, timeout: float | None = None) -> R_co:
        """Wait until it has finished, up to `timeout` seconds, and return its value.

        Raises TaskFailed with the task's error and traceback, WaitTimeout, ResultUnavailable if it keeps no result;
        BrokerError if the broker can't be used, two seconds after `timeout` at the latest.
        """
        if self._keeps_none():
            raise ResultUnavailable(f"{self.task_name} keeps no result to wait for: its result_ttl is 0")
        limit_s = NEVER if timeout is None else max(0.0, timeout) + ANSWER_S
        with self._app.client.within(limit_s):
            self._wait(timeout)
        if self.status is TaskStatus.SUCCESSFUL:
            return self.return_value
        errors = self.errors
        last = errors[-1] if errors else TaskError("", "")
        raise TaskFailed(self.task_name, self.id, last.exception_class_path, last.message, last.traceback)

    def _wait(self, timeout: float | None) -> None:
        give_up = None if timeout is None else time.monotonic() + timeout
        self.refresh()
        while not self.is_finished:
            if give_up is not None and time.monotonic() >= give_up:
                raise WaitTimeout(f"{self.task_name} {self.id} is {self.status} after {timeout:g} s")
            try:
                with self._app.client.listen(self.queue_name, self.id) as heard:
                    self.refresh()  # it may have finished before anybody listened
                    while not self.is_finished:
                        left_s = RECHECK_S if give_up is None else min(RECHECK_S, give_up - time.monotonic())
                        if left_s <= 0:
                            break
                        heard(left_s)
                        self.refresh()
            except Disturbed:
                time.sleep(0.05)  # the listening connection broke; `refresh` reports a broker that is really gone
                self.refresh()

    def cancel(self, *, running: bool = False) -> bool:
        """Cancel it if it has not started: then it is FAILED with `prefork.Cancelled`. -> whether it was cancelled

        `running`: if it has, tell its worker to stop it: `Cancelled` is raised in it, and five seconds later its child
        is killed. It may end otherwise before that; `wait` tells. -> whether it was cancelled or the worker told
        """
        now_ms = time.time_ns() // 1_000_000
        record = {"status": "FAILED", "task": self.task_name, "enqueued_ms": self._enqueued_ms, "finished_ms": now_ms}
        ttl_ms = self._app.result_ttl_ms(self.task_name)
        before = message.State.decode(self._app.client.inspect(self.queue_name, self.id)[2])
        record |= {"attempts": before.attempts, "started_ms": before.started_ms, "errors": before.errors}
        said = self._app.client.cancel(self.queue_name, self.id, ttl_ms, record, stop=running)
        return said in ("cancelled", "asked")

    def _keeps_none(self) -> bool:
        return self._app.result_ttl_ms(self.task_name) == 0

    def _take_record(self, raw: bytes) -> None:
        try:
            record = orjson.loads(raw)
            self.status = TaskStatus(record["status"])
        except (ValueError, TypeError, KeyError):
            raise ResultUnavailable(f"the result of task {self.id} is damaged: {raw[:60]!r}") from None
        record["errors"] = facts.errors(record.get("errors"))
        self.task_name = record.get("task", self.task_name)
        self._enqueued_ms = record.get("enqueued_ms") or self._enqueued_ms
        self._value = record.get("value")
        self._known = record

    def _take_state(self, raw: bytes, state: bytes | None) -> None:
        self._known = {name: it for name, it in asdict(message.State.decode(state)).items() if it}
        try:
            decoded = message.decode(self.id.encode(), self.queue_name, raw)
        except BadMessage:
            return
        self.task_name, self._enqueued_ms = decoded.header.task, decoded.enqueued_ms


def _moment(ms: int | None) -> datetime | None:
    fits = isinstance(ms, int | float) and 0 < ms <= message.LATEST_MS  # what the broker holds may be damaged
    return datetime.fromtimestamp(ms / 1000, UTC) if ms and fits else None
