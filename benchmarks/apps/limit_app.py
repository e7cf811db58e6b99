"""The bare limit: the no-op alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import redis

from benchmarks import limit

client = redis.Redis.from_url(os.environ["BENCH_URL"])


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> None:
    assert name == "noop"
    limit.fill(client, rows)
