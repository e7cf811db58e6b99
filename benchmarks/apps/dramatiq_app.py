"""Dramatiq with a thread in each process."""

from __future__ import annotations

import os
from typing import Any

import dramatiq
import work
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_URL"]))
tasks = {name: dramatiq.actor(function, actor_name=name) for name, function in work.TASKS.items()}


def enqueue(name: str, *args: Any) -> None:
    tasks[name].send(*args)
