"""RQ as it comes: a fork for each job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import redis
import work
from rq import Queue

queue = Queue(connection=redis.Redis.from_url(os.environ["BENCH_URL"]))


def enqueue(name: str, *args: Any) -> None:
    queue.enqueue(work.TASKS[name], *args, result_ttl=0)


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> None:
    queue.enqueue_many([Queue.prepare_data(work.TASKS[name], args=args, result_ttl=0) for args in rows])
