"""Mayu: a core in Rust, a process for each slot."""

from __future__ import annotations

import os
from typing import Any

import work
from mayu import App

app = App(broker=os.environ["BENCH_URL"])
tasks = {name: app.task(name=name)(function) for name, function in work.TASKS.items()}


def enqueue(name: str, *args: Any) -> None:
    tasks[name].delay(*args)
