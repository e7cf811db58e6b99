"""Right calls, as users write them: `mypy --strict` has nothing to say, and infers the types that are asserted."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from prefork import AsyncTask, Context, Dead, Invocation, Prefork, Retry, SoftTimeout, Task, TaskResult, TaskResults

app = Prefork("shop", broker="redis://localhost:6379/0")


@app.task
def bare(order: int, *, copy: bool = False) -> str:
    return str(order)


@app.task()
def parentheses(order: int) -> str:
    return str(order)


@app.task(max_retries=5, timeout=60, queue_name="mail", retry_on=(OSError,), dont_retry_on=KeyError, result_ttl=0)
def options(order: int, *others: float) -> list[str]:
    if order:
        raise Retry("later", delay=3, counted=False)
    raise Dead("no such order")


@app.task(retry_delay=lambda retried: retried * 2.0, expires=timedelta(days=1), soft_timeout=timedelta(seconds=5))
def policies() -> None:
    try:
        print("at work")
    except SoftTimeout as over:
        print(over)


@app.task
async def fetch(url: str) -> int:
    return len(url)


@app.task(priority=5)
async def fetch_later(url: str) -> int:
    return len(url)


@app.task(takes_context=True)
def contextual(context: Context, order: int) -> bool:
    context.progress(1, 2, "half")
    assert_type(context.enqueue(bare.s(order)), TaskResult[str])
    assert_type(context.deadline, datetime | None)
    return context.attempt > 1


@app.task(takes_context=True, name="later")
async def contextual_async(context: Context, order: int = 3) -> bytes:
    context.enqueue(fetch.using(priority=1).s("u"))
    return b""


@app.on_child_start
def connect() -> None: ...


def enqueue() -> None:
    result = bare.enqueue(7, copy=True)
    assert_type(result, TaskResult[str])
    assert_type(result.wait(timeout=10), str)
    assert_type(result.return_value, str)
    assert_type(result.cancel(), bool)
    assert_type(parentheses.enqueue(order=7).wait(), str)
    assert_type(options.enqueue(1, 2.5, 3).wait(), list[str])
    assert_type(policies.enqueue(), TaskResult[None])
    assert_type(fetch.enqueue("u"), TaskResult[int])
    assert_type(fetch.enqueue("u").wait(), int)
    assert_type(fetch_later.enqueue("u"), TaskResult[int])
    assert_type(contextual.enqueue(7), TaskResult[bool])
    assert_type(contextual_async.enqueue(), TaskResult[bytes])
    assert_type(app.result("01ab"), TaskResult[Any])


async def aenqueue() -> None:
    assert_type(await bare.aenqueue(7), TaskResult[str])
    assert_type(await fetch.aenqueue("u"), TaskResult[int])
    assert_type(await app.aenqueue_many([bare.s(1)]), TaskResults[str])


def many() -> None:
    assert_type(bare.s(7, copy=True), Invocation[str])
    assert_type(app.enqueue_many(bare.s(n) for n in range(3)), TaskResults[str])
    assert_type(app.enqueue_many([fetch.s("u"), fetch_later.s("u")]), TaskResults[int])
    assert_type(app.enqueue_many([contextual.s(1)])[0].wait(), bool)
    mixed: list[Invocation[object]] = [bare.s(1), fetch.s("u")]
    assert_type(app.enqueue_many(mixed), TaskResults[object])


def using() -> None:
    changed = bare.using(
        queue_name="mail", priority=50, run_after=timedelta(minutes=5), expires=datetime.now(UTC), max_retries=3,
        timeout=2.5, soft_timeout=timedelta(seconds=1),
    )  # fmt: skip
    assert_type(changed.enqueue(8, copy=True), TaskResult[str])
    assert_type(changed.using(run_after=5).s(8), Invocation[str])
    assert_type(fetch.using(priority=5).enqueue("u"), TaskResult[int])
    assert_type(contextual.using(priority=5).enqueue(1), TaskResult[bool])


def plain() -> None:
    assert_type(bare(7), str)
    assert_type(parentheses(order=7), str)
    assert_type(fetch("u"), Coroutine[Any, Any, int])
    assert_type(fetch_later("u"), Coroutine[Any, Any, int])
    assert_type(contextual(7), bool)
    assert_type(contextual_async(7), Coroutine[Any, Any, bytes])
    assert_type(bare.using(priority=5)(7), str)
    assert_type(fetch.using(priority=5)("u"), Coroutine[Any, Any, int])


def passed_on(task: Task[[int], bool], later: AsyncTask[[str], int]) -> None:
    assert_type(task.enqueue(1).wait(), bool)
    assert_type(later("u"), Coroutine[Any, Any, int])


passed_on(contextual, fetch)
