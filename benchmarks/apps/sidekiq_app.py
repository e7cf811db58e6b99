"""Sidekiq, of Ruby: one process with so many threads. Jobs are pushed from here, as its own client writes them."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import redis

client = redis.Redis.from_url(os.environ["BENCH_URL"])
BATCH = 1000


def job(name: str, args: tuple[Any, ...]) -> str:
    now = time.time()
    fields = {"class": "Bench", "args": [name, *args], "retry": True, "queue": "default"}
    return json.dumps(fields | {"jid": secrets.token_hex(12), "created_at": now, "enqueued_at": now})


def enqueue(name: str, *args: Any) -> None:
    pipe = client.pipeline(transaction=False)
    pipe.sadd("queues", "default")
    pipe.lpush("queue:default", job(name, args))
    pipe.execute()


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> None:
    client.sadd("queues", "default")
    rows = iter(rows)
    while batch := [job(name, args) for args in islice(rows, BATCH)]:
        client.lpush("queue:default", *batch)
