"""The app that is tortured: a task for each way in which tasks behave, and what is to become of each.

Each task carries its tag, and what it is to do: nothing here is random, so that every attempt does the same. Ends are
written just before the function returns, so that between an end and its settlement there is nothing but prefork.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefork.app import Prefork
from prefork.context import Context
from prefork.errors import Dead, Retry
from prefork.torture.ledger import Pen, now_us

LEDGER = "PREFORK_TORTURE_LEDGER"  # the environment tells the workers where it is
PREFIX = "torture"
QUEUES = ("first", "second")
LIMIT_S = 2.0  # of an enqueue, so that some faults outlast it
KEPT_S = 86_400
MAX_CRASHES = 3
MAX_TAKEOVERS = 10

app = Prefork("torture", prefix=PREFIX, limit_s=LIMIT_S)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is to become of a task. `share`: of all that are enqueued, in thousandths.

    `dead`: it is to be a dead letter. `fails`: how many failures that takes, at least. `timeout_s`: when it is killed.
    `kept`: its result is kept.
    """

    share: float
    dead: bool = False
    fails: int = 0
    timeout_s: float = 0.0
    kept: bool = True


KINDS = {
    "noop": Kind(0, kept=False),  # the rest of the thousand, in bulk
    "nap": Kind(40),
    "long": Kind(3),
    "ranked": Kind(15, kept=False),
    "late": Kind(15),
    "flaky": Kind(8),
    "asking": Kind(4),
    "hopeless": Kind(2, dead=True, fails=3),
    "fatal": Kind(1, dead=True, fails=1),
    "crashing": Kind(1.5),
    "deadly": Kind(0.5, dead=True),
    "slow": Kind(1, timeout_s=0.4),
    "stuck": Kind(0.5, dead=True, fails=2, timeout_s=0.3),
    "cancelled": Kind(4),
    "parent": Kind(5),
    "heir": Kind(0),  # the follow-ups of a parent, in its queue and in the other one
    "guest": Kind(0, kept=False),
}

_pen: Pen | None = None


@app.on_child_start
def open_ledger() -> None:
    """Give this child a file of its own."""
    global _pen
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _pen = Pen(Path(os.environ[LEDGER]), f"run-{os.getpid()}-{now_us()}")
    _pen.write("p", os.getpid(), os.getppid())


def _note(*words: object) -> None:
    assert _pen
    _pen.write(*words)


def attempt(context: Context, tag: str, act: Callable[[], None] = lambda: None) -> str:
    """Run one attempt between its two lines. -> the tag, as the result"""
    _note("s", tag, context.id, context.attempt)
    try:
        act()
    except BaseException as error:
        _note("e", tag, type(error).__name__)
        raise
    _note("e", tag, "ok")
    return tag


@app.task(takes_context=True, name="noop", result_ttl=0)
def noop(context: Context, tag: str) -> None:
    """The usual task: short, no result."""
    attempt(context, tag)


@app.task(takes_context=True, name="ranked", result_ttl=0)
def ranked(context: Context, tag: str) -> None:
    """One with a priority."""
    attempt(context, tag)


@app.task(takes_context=True, name="nap", result_ttl=KEPT_S)
def nap(context: Context, tag: str, seconds: float) -> str:
    """One that takes its time. Also those that are delayed, or to be cancelled."""
    return attempt(context, tag, lambda: time.sleep(seconds))


@app.task(takes_context=True, name="flaky", result_ttl=KEPT_S, max_retries=20, retry_delay=0.2)
def flaky(context: Context, tag: str, times: int) -> str:
    """Fails so often, then succeeds."""

    def act() -> None:
        if context.attempt <= times:
            raise RuntimeError("as told")

    return attempt(context, tag, act)


@app.task(takes_context=True, name="asking", result_ttl=KEPT_S, max_retries=20)
def asking(context: Context, tag: str, times: int, delay: float) -> str:
    """Asks for another run so often, then succeeds."""

    def act() -> None:
        if context.attempt <= times:
            raise Retry("as told", delay=delay, counted=False)

    return attempt(context, tag, act)


@app.task(takes_context=True, name="hopeless", result_ttl=KEPT_S, max_retries=2, retry_delay=0.1)
def hopeless(context: Context, tag: str) -> str:
    """Always fails."""

    def act() -> None:
        raise RuntimeError("as told")

    return attempt(context, tag, act)


@app.task(takes_context=True, name="fatal", result_ttl=KEPT_S)
def fatal(context: Context, tag: str) -> str:
    """Is a dead letter at once."""

    def act() -> None:
        raise Dead("as told")

    return attempt(context, tag, act)


@app.task(takes_context=True, name="crashing", result_ttl=KEPT_S)
def crashing(context: Context, tag: str, times: int, how: str) -> str:
    """Takes its child down so often, in one of three ways, then succeeds."""

    def act() -> None:
        if context.attempt <= times:
            _note("e", tag, "crash")
            if how == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
            time.sleep(60)

    return attempt(context, tag, act)


@app.task(takes_context=True, name="slow", result_ttl=KEPT_S, timeout=KINDS["slow"].timeout_s, max_retries=20,
          retry_delay=0.1)  # fmt: skip
def slow(context: Context, tag: str, times: int) -> str:
    """Is over its time so often, then succeeds."""
    return attempt(context, tag, lambda: time.sleep(60 if context.attempt <= times else 0))


@app.task(takes_context=True, name="stuck", result_ttl=KEPT_S, timeout=KINDS["stuck"].timeout_s, max_retries=1,
          retry_delay=0.1)  # fmt: skip
def stuck(context: Context, tag: str) -> str:
    """Is always over its time."""
    return attempt(context, tag, lambda: time.sleep(60))


@app.task(takes_context=True, name="parent", result_ttl=KEPT_S)
def parent(context: Context, tag: str, here: int, there: int, other: str) -> str:
    """Has follow-ups, in its own queue and in the other one."""

    def act() -> None:
        own = next(queue for queue in QUEUES if queue != other)
        for n in range(here):
            context.enqueue(heir.using(queue_name=own).s(f"{tag}/heir-{n}"))
        for n in range(there):
            context.enqueue(guest.using(queue_name=other).s(f"{tag}/guest-{n}"))

    return attempt(context, tag, act)


@app.task(takes_context=True, name="heir", result_ttl=KEPT_S)
def heir(context: Context, tag: str) -> str:
    """A follow-up in its parent's queue."""
    return attempt(context, tag)


@app.task(takes_context=True, name="guest", result_ttl=0)
def guest(context: Context, tag: str) -> None:
    """A follow-up in another queue than its parent's."""
    attempt(context, tag)
