"""Huey with processes: it pops tasks and does not acknowledge them."""

from __future__ import annotations

import os
from typing import Any

import work
from huey import RedisHuey

huey = RedisHuey("bench", url=os.environ["BENCH_URL"], results=False)
tasks = {name: huey.task(name=name)(function) for name, function in work.TASKS.items()}


def enqueue(name: str, *args: Any) -> None:
    tasks[name](*args)
