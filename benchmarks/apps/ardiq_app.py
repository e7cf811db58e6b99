"""ArdiQ: a core in Rust on streams; one process with an event loop, whose long tasks are plain functions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from typing import Any

import work
from ardiq import Ardiq

concurrency = int(os.environ.get("BENCH_CONCURRENCY", "2"))
app = Ardiq(redis_url=os.environ["BENCH_URL"], queue_name="bench", concurrency=concurrency, result_ttl_ms=1000)
loop = asyncio.new_event_loop()
BATCH = 1000


@app.task(name="noop")
async def noop(*args: Any) -> None:
    work.noop(*args)


@app.task(name="stamp")
async def stamp(sent_ns: int) -> None:
    work.stamp(sent_ns)


@app.task(name="nap")
def nap(seconds: float) -> None:
    work.nap(seconds)


tasks = {"noop": noop, "stamp": stamp, "nap": nap}


def enqueue(name: str, *args: Any) -> None:
    loop.run_until_complete(tasks[name].enqueue(*args))


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> None:
    prepared = [tasks[name].prepare(*args) for args in rows]
    for start in range(0, len(prepared), BATCH):
        loop.run_until_complete(app.enqueue_many(prepared[start : start + BATCH]))
