"""All rows of the table: how each is measured, and what is to come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from benchmarks.rows.throughput import throughput
from benchmarks.scene import Scene
from benchmarks.sides import LIMIT, PREFORK

Values = dict[str, float]
PEERS = "peers"  # whoever of them was asked for


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value of prefork's, or its ratio to somebody else's of the same round.

    `target`: such as `>= 0.5`; nothing: it is only shown. `against`: a side, or `most` or `least` of all peers.
    """

    key: str
    what: str
    target: str = ""
    unit: str = ""
    against: str = ""


@dataclass(frozen=True)
class Row:
    """What is measured in one go. `sides`: who takes part."""

    name: str
    measure: Callable[[Scene], Values]
    figures: tuple[Figure, ...]
    sides: tuple[str, ...] = (PREFORK,)
    rounds: tuple[int, int, int] = (3, 1, 1)  # full, quick, tiny
    compared: tuple[str, ...] = field(default=())  # keys that stand in the table of peers


def _throughput(concurrency: int) -> Row:
    figures = (
        Figure("rate", f"no-op tasks/s, {concurrency} children, of the bare limit", ">= 0.5", "", LIMIT),
        Figure("rate", f"the same, {concurrency} children", "", "/s"),
        Figure("rate", "the same, of Celery's", ">= 60", "x", "celery"),
        Figure("rate", "the same, of the fastest peer's", ">= 5", "x", "most"),
        Figure("worker_us", "CPU of the worker a task", "", "µs"),
        Figure("master_us", "CPU of its master a task", "", "µs"),
        Figure("cpu_us", "CPU of worker and server a task, of the bare limit", "", "x", LIMIT),
        Figure("worker_us", "CPU of the worker, of Celery's", "< 0.02", "x", "celery"),
        Figure("worker_us", "CPU of the worker, of the thriftiest peer's", "< 0.2", "x", "least"),
        Figure("server_us", "CPU of the server a task", "", "µs"),
        Figure("commands", "commands a task", "< 0.2"),
        Figure("all_commands", "commands a task, with those inside of scripts"),
        Figure("others", "what others took of the machine meanwhile", "", "%"),
    )
    compared = "rate", "worker_us", "server_us", "all_commands"
    name, sides = f"throughput-{concurrency}", (LIMIT, PREFORK, PEERS)
    return Row(name, partial(throughput, concurrency=concurrency), figures, sides, (5, 2, 1), compared)


ROWS = {row.name: row for row in (_throughput(2), _throughput(10))}
