"""Celery with its prefork pool, as it comes: tasks are acknowledged before they run."""

from __future__ import annotations

import os
from typing import Any

import work
from celery import Celery

app = Celery("celery_app", broker=os.environ["BENCH_URL"])
app.conf.update(task_ignore_result=True)
tasks = {name: app.task(name=name)(function) for name, function in work.TASKS.items()}


def enqueue(name: str, *args: Any) -> None:
    tasks[name].delay(*args)
