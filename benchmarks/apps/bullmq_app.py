"""BullMQ, of Node: one process with so many jobs in it. A process of Node's enqueues, too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("bullmq.mjs")
producer: subprocess.Popen[str] | None = None


def send(name: str, rows: list[Any], bulk: bool) -> float:
    """-> the seconds that it took there"""
    global producer
    if producer is None:
        command = ["node", str(SCRIPT), "produce"]
        producer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert producer.stdin
    assert producer.stdout
    producer.stdin.write(json.dumps({"name": name, "rows": rows, "bulk": bulk}) + "\n")
    producer.stdin.flush()
    return float(producer.stdout.readline())


def enqueue(name: str, *args: Any) -> None:
    send(name, [args], False)


def enqueue_timed(name: str, args: tuple[Any, ...], count: int) -> float:
    return send(name, [args] * count, False)


def enqueue_many(name: str, rows: Iterable[tuple[Any, ...]]) -> float:
    return send(name, list(rows), True)
