"""The load: a process that enqueues random tasks by the public API, and writes down what it was told.

1. It owes the queues so many tasks a second; what a fault has kept it from is made up for afterwards.
2. Before each call it writes what it attempts, after it what came of it.
3. When much is waiting already, it pauses: the backlog is bounded.
4. It ends when its standard input does, also because the torture has died.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefork.errors import BrokerError, EnqueueUncertain
from prefork.result import TaskResult
from prefork.torture import app as tasks
from prefork.torture.app import KINDS, QUEUES, app
from prefork.torture.ledger import Pen, now_us

LARGEST_BULK = 400
MOST_WAITING = 20_000
LOOK_EVERY_S = 1.0
CATCH_UP_S = 30.0  # what was kept back for longer than that is not made up for
GIVEN = "PREFORK_TORTURE_LOAD"
HOWS = ("exit", "kill", "segfault")
SINGLE = 0.3  # how many of the steps are a single task


@dataclass(frozen=True, slots=True)
class Cancel:
    """What is to be cancelled, and when."""

    due_s: float
    tag: str
    result: TaskResult[Any]
    running: bool


class Load:
    """One producer. `number` tells its tags from those of others.

    All that it draws comes from the seed and the number of the step, never from the clock: what differs between two
    runs with the same seed is when a step comes, and what it meets.
    """

    def __init__(self, folder: Path, number: int, seed: str, rate: float) -> None:
        self._seed, self._number, self._rate = f"{seed}/load/{number}", number, rate
        self._pen = Pen(folder, f"load-{number}")
        self._count = 0
        self._cancels: list[Cancel] = []

    def run(self) -> None:
        """Enqueue until told to stop."""
        begun_s, looked_s = time.monotonic(), 0.0
        for step in itertools.count():
            draw = random.Random(f"{self._seed}/{step}")
            size = 1 if draw.random() < SINGLE else draw.randint(2, max(2, min(LARGEST_BULK, round(self._rate))))
            while (owed := (time.monotonic() - begun_s) * self._rate - self._count) < size:
                self._cancel_what_is_due()
                if _told_to_stop(0.01):
                    return
            begun_s += max(0.0, owed / self._rate - CATCH_UP_S)
            if time.monotonic() - looked_s > LOOK_EVERY_S:
                looked_s = time.monotonic()
                while self._waiting() > MOST_WAITING:
                    if _told_to_stop(0.2):
                        return
            self._enqueue_some(draw, size)
            if _told_to_stop(0):
                return

    def _waiting(self) -> int:
        try:
            return sum(int(app.client.census(queue)[1]) for queue in QUEUES)
        except BrokerError:
            return 0

    # -- enqueue ------------------------------------------------------------------------------------------------

    def _enqueue_some(self, draw: random.Random, size: int) -> None:
        """Each kind has its share of all tasks, and the rest are bulk, in one command, which is carried out or not."""
        kinds = [name for name, kind in KINDS.items() if kind.share]
        shares = [KINDS[name].share for name in kinds]
        special = sum(draw.random() * 1000 < sum(shares) for _ in range(size))
        for kind in draw.choices(kinds, shares, k=special):
            self._enqueue(kind, draw)
        queue = draw.choice(QUEUES)
        if size == special + 1:
            self._enqueue("noop", draw)
        elif size > special:
            task = tasks.noop.using(queue_name=queue)
            tags = [self._tag() for _ in range(size - special)]
            self._pen.write_all("t", ((tag, "noop") for tag in tags))
            self._write_answer(tags, lambda: app.enqueue_many(task.s(tag) for tag in tags))

    def _tag(self) -> str:
        self._count += 1
        return f"{self._number}-{self._count}"

    def _enqueue(self, kind: str, draw: random.Random) -> None:
        tag = self._tag()
        own, other = draw.sample(QUEUES, 2)
        task, arguments = _drawn(kind, draw, other)
        written = f"parent:{arguments[0]}:{arguments[1]}" if kind == "parent" else kind
        cancel_in_s, running = draw.uniform(0, 4), draw.random() < 0.5
        self._pen.write("t", tag, written)
        results = self._write_answer([tag], lambda: [task.using(queue_name=own).enqueue(tag, *arguments)])
        if kind == "cancelled" and results:
            self._cancels.append(Cancel(time.monotonic() + cancel_in_s, tag, results[0], running))

    def _write_answer(self, tags: list[str], ask: Callable[[], Sequence[TaskResult[Any]]]) -> Sequence[TaskResult[Any]]:
        try:
            results = ask()
        except EnqueueUncertain:
            self._pen.write_all("u", ((tag, "-") for tag in tags))
        except BrokerError:
            self._pen.write_all("r", ((tag, "-") for tag in tags))
        else:
            self._pen.write_all("a", ((tag, result.id) for tag, result in zip(tags, results, strict=True)))
            return results
        return []

    # -- cancel -------------------------------------------------------------------------------------------------

    def _cancel_what_is_due(self) -> None:
        now_s = time.monotonic()
        due = [it for it in self._cancels if it.due_s <= now_s]
        self._cancels = [it for it in self._cancels if it.due_s > now_s]
        for it in due:
            begun_us = now_us()
            try:
                said = "yes" if it.result.cancel(running=it.running) else "no"
            except BrokerError:
                said = "unknown"
            self._pen.write("c", it.tag, f"{said}{'-running' if it.running else ''}", begun_us)


def _told_to_stop(wait_s: float) -> bool:
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def _drawn(kind: str, draw: random.Random, other: str) -> tuple[Any, list[Any]]:
    """-> a task of that kind, and its arguments but for the tag. `other`: the queue that it is not in"""
    if kind in ("nap", "late"):
        later = round(draw.uniform(0.1, 8), 3) if kind == "late" else 0
        return tasks.nap.using(run_after=later or None), [round(draw.uniform(0.001, 0.04), 4)]
    if kind in ("long", "cancelled"):
        later = round(draw.uniform(0.5, 6), 3) if kind == "cancelled" and draw.random() < 0.6 else 0
        return tasks.nap.using(run_after=later or None), [round(draw.uniform(0.3, 2.5), 4)]
    if kind == "ranked":
        return tasks.ranked.using(priority=draw.choice((-5, -1, 1, 9))), []
    if kind == "parent":
        return tasks.parent, [draw.randint(0, 3), draw.randint(0, 2), other]
    if kind in ("crashing", "deadly"):
        return tasks.crashing, [99 if kind == "deadly" else draw.randint(1, 2), draw.choice(HOWS)]
    times = [draw.randint(1, 3)] if kind in ("flaky", "asking", "slow") else []
    return getattr(tasks, kind), times + ([round(draw.uniform(0, 1), 3)] if kind == "asking" else [])


def main() -> int:
    """Run one, as its environment says: a JSON object (arguments would show the broker's password)."""
    given = json.loads(os.environ[GIVEN])
    app.connect_to(given["broker"], given["prefix"])
    Load(Path(given["folder"]), given["number"], given["seed"], given["rate"]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
