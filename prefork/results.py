"""The results of many tasks that were enqueued together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

from prefork.result import Home, TaskResult

R_co = TypeVar("R_co", covariant=True)


class TaskResults(Sequence[TaskResult[R_co]], Generic[R_co]):
    """What `app.enqueue_many` returns: a TaskResult for each, in order; `ids` are theirs.

    A TaskResult is made when it is first asked for, and kept: of a million tasks that nobody looks at again, this takes
    the memory of their ids.
    """

    def __init__(self, app: Home) -> None:
        self._app = app
        self.ids: list[str] = []
        # A run: tasks in a row that have name, queue and time of acceptance in common.
        self._starts: list[int] = []
        self._runs: list[tuple[str, str, int]] = []
        self._made: dict[int, TaskResult[Any]] = {}

    def add(self, ids: Iterable[str], runs: Iterable[tuple[str, str, int]]) -> None:
        """Append what was accepted: ids, and the queue, task name and time in ms of each."""
        for id, run in zip(ids, runs, strict=True):
            if not self._runs or self._runs[-1] != run:
                self._starts.append(len(self.ids))
                self._runs.append(run)
            self.ids.append(id)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TaskResult[R_co]: ...
    @overload
    def __getitem__(self, index: slice) -> list[TaskResult[R_co]]: ...
    def __getitem__(self, index: int | slice) -> TaskResult[R_co] | list[TaskResult[R_co]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        if at not in self._made:
            queue, task, enqueued_ms = self._runs[bisect_right(self._starts, at) - 1]
            self._made[at] = TaskResult(self._app, self.ids[at], queue, task, enqueued_ms)
        return self._made[at]

    def __repr__(self) -> str:
        return f"<{len(self)} tasks>"
