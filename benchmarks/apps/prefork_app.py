"""prefork itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import work

from prefork import Prefork

app = Prefork("bench", broker=os.environ["BENCH_URL"])
tasks = {name: app.task(name=name, result_ttl=0)(function) for name, function in work.TASKS.items()}
tasks["kept"] = app.task(name="kept")(work.noop)


def enqueue(name: str, *args: Any) -> None:
    tasks[name].enqueue(*args)


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    return app.enqueue_many(tasks[name].s(*args) for args in rows)
