"""What the tests of whole workers look at: where messages are, what is known of them, which processes live."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import orjson
import psutil

from prefork import TaskResult
from tests.conftest import PATIENCE_S, Project, until

# Run hundreds of times, it is known as fast, so that many are handed to a child at once.
STEPS = """
@app.task(name="step", retry_delay=0, result_ttl=600)
def step(n, how=""):
    note("steps", n)
    if how:
        note("how", f"{n} {os.getpid()}")
        exec(how)
    return n
"""


def key(name: str, queue: str = "default") -> str:
    return f"prefork:{{{queue}}}:{name}"


def place(project: Project, result: TaskResult[Any]) -> str:
    """Where a message is: pending, scheduled, active, dead, finished, or "" when nothing is known of it."""
    return str(project.tasks.app.client.inspect(result.queue_name, result.id)[0])


def state(project: Project, result: TaskResult[Any]) -> dict[str, Any]:
    """What has happened to a message that has not finished."""
    raw = project.server.client.hget(key("state", result.queue_name), result.id)
    return orjson.loads(raw) if raw else {}  # type: ignore[no-any-return]


def pending(project: Project, queue: str = "default") -> list[str]:
    """The ids that wait, the next one first."""
    return [id.decode() for id in project.server.client.lrange(key("pending", queue), 0, -1)]


def active(project: Project, queue: str = "default") -> int:
    """How many messages workers hold."""
    return sum(project.server.client.zcard(name) for name in project.server.client.keys(key("active:*", queue)))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(*pids: int) -> bool:
    return not any(lives(pid) for pid in pids)


def counts(project: Project, name: str) -> Counter[str]:
    """How often each line was noted."""
    return Counter(project.lines(name))


def wait_dead(project: Project, result: TaskResult[Any], seconds: float = PATIENCE_S) -> None:
    until(lambda: place(project, result) == "dead", seconds, f"{result} is a dead letter")
    result.refresh()


def warm_up(project: Project, n: int = 400) -> None:
    """Let the worker learn that `step` is fast."""
    step = project.tasks.step
    for result in project.tasks.app.enqueue_many(step.s(-1) for _ in range(n)):
        result.wait(timeout=60)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    @property
    def s(self) -> float:
        return time.monotonic() - self.begun
