from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from prefork import (
    AsyncTask,
    Context,
    InvalidArguments,
    NotJSON,
    PayloadTooLarge,
    Prefork,
    PreforkError,
    Task,
    TaskResult,
    TaskStatus,
)
from prefork.message import MAX_PAYLOAD_BYTES, decode
from tests.conftest import Server


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Prefork:
    """An app without a broker: whatever were sent would be an InvalidOption."""
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    return Prefork("shop")


@pytest.fixture
def app(server: Server) -> Iterator[Prefork]:
    app = Prefork("shop", server.url)
    yield app
    app.client.close()


def body_of(invocation: Any) -> Any:
    return orjson.loads(invocation.payload.partition(b"\n")[2])


def header_of(invocation: Any) -> dict[str, Any]:
    return dict(orjson.loads(invocation.payload.partition(b"\n")[0]))


def held(server: Server, queue: str = "default") -> list[bytes]:
    """The messages of a queue, in the order of their ids."""
    return [raw for _, raw in sorted(server.client.hgetall(f"prefork:{{{queue}}}:m").items())]


# -- arguments --------------------------------------------------------------------------------------------------------


def two(a: int, b: int = 2) -> None: ...
def keyword(a: int, *, copy: bool) -> None: ...
def optional(a: int = 0, *, copy: bool = False) -> None: ...
def rest(a: int, *others: int) -> None: ...
def anything(*args: int, **kwargs: int) -> None: ...
def positional(a: int, /, b: int) -> None: ...
def nothing() -> None: ...
def contextual(context: Context, a: int, *, b: int = 0) -> None: ...
def contextual_rest(context: Context, *args: int, **kwargs: int) -> None: ...


FITTING: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (two, (1,), {}),
    (two, (1, 2), {}),
    (two, (1,), {"b": 3}),
    (two, (), {"b": 3, "a": 1}),
    (keyword, (1,), {"copy": True}),
    (optional, (), {}),
    (optional, (1,), {"copy": True}),
    (rest, (1,), {}),
    (rest, (1, 2, 3), {}),
    (anything, (), {}),
    (anything, (1, 2), {"x": 3}),
    (positional, (1, 2), {}),
    (positional, (1,), {"b": 2}),
    (nothing, (), {}),
    (contextual, (1,), {}),
    (contextual, (), {"a": 1, "b": 2}),
    (contextual_rest, (), {}),
    (contextual_rest, (1,), {"x": 2}),
]

NOT_FITTING: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (two, (), {}, "missing a required argument: 'a'"),
    (two, (1, 2, 3), {}, "too many positional arguments"),
    (two, (1,), {"c": 3}, "unexpected keyword argument 'c'"),
    (two, (1,), {"a": 3}, "multiple values for argument 'a'"),
    (keyword, (1,), {}, "missing a required.* argument: 'copy'"),
    (keyword, (1, True), {}, "too many positional arguments"),
    (keyword, (), {"copy": True}, "missing a required argument: 'a'"),
    (optional, (1, 2), {}, "too many positional arguments"),
    (rest, (), {}, "missing a required argument: 'a'"),
    (rest, (1,), {"others": (2,)}, "unexpected keyword argument 'others'"),
    (positional, (), {"a": 1, "b": 2}, "'a'"),
    (nothing, (1,), {}, "too many positional arguments"),
    (nothing, (), {"x": 1}, "unexpected keyword argument 'x'"),
    (contextual, (), {}, "missing a required argument: 'a'"),
    (contextual, (1, 2), {}, "too many positional arguments"),
    (contextual, (1,), {"context": 3}, "unexpected keyword argument 'context'"),
    (contextual_rest, (1,), {"context": 3}, "context"),
]


def register(app: Prefork, function: Any) -> Task[..., Any]:
    takes = function.__name__.startswith("contextual")
    task: Task[..., Any] = app.task(takes_context=True)(function) if takes else app.task(function)
    return task


@pytest.mark.parametrize(("function", "args", "kwargs"), FITTING)
def test_arguments_that_fit_the_signature_travel_as_they_are(
    nowhere: Prefork, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert body_of(register(nowhere, function).s(*args, **kwargs)) == [list(args), kwargs]


@pytest.mark.parametrize(("function", "args", "kwargs", "said"), NOT_FITTING)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    nowhere: Prefork, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    task = register(nowhere, function)
    for send in (task.s, task.enqueue, task.using(priority=3).enqueue):
        with pytest.raises(InvalidArguments, match=said) as caught:
            send(*args, **kwargs)
        text = str(caught.value)
        assert text.startswith(f"{__name__}.{function.__name__}(")
        for name in inspect.signature(function).parameters:
            assert (name in text) or name == "context"
        assert len(text.splitlines()) == 1
        assert isinstance(caught.value, TypeError)
    with pytest.raises(InvalidArguments, match=said):
        asyncio.run(task.aenqueue(*args, **kwargs))


def test_the_context_is_no_parameter_of_the_callers(nowhere: Prefork) -> None:
    with pytest.raises(InvalidArguments) as caught:
        register(nowhere, contextual).s()
    assert "context" not in str(caught.value).partition("(")[2]


def test_parameters_may_have_any_name(nowhere: Prefork) -> None:
    @nowhere.task(name="t")
    def task(self: int, args: int, kwargs: int, func: int) -> tuple[int, ...]:
        return self, args, kwargs, func

    assert task(self=1, args=2, kwargs=3, func=4) == (1, 2, 3, 4)  # type: ignore[misc]
    sent = task.s(self=1, args=2, kwargs=3, func=4)  # type: ignore[misc]
    assert body_of(sent)[1] == {"self": 1, "args": 2, "kwargs": 3, "func": 4}


def test_what_is_not_json_is_refused_at_the_callers_line_with_the_name_of_the_argument(nowhere: Prefork) -> None:
    task = nowhere.task(two)
    for send in (task.s, task.enqueue):
        with pytest.raises(NotJSON, match=r"\.two: argument b is a set; send JSON"):
            send(1, {2})  # type: ignore[arg-type]
        with pytest.raises(NotJSON, match=r"\.two: argument a is an object"):
            send(a=object())  # type: ignore[arg-type]
    with pytest.raises(NotJSON, match=r"\.rest: argument #3\[0\] is a set"):
        nowhere.task(rest).s(1, 2, [{3}])  # type: ignore[list-item]


def test_what_is_too_large_is_refused_with_its_size(nowhere: Prefork) -> None:
    @nowhere.task(name="t")
    def task(text: str) -> None: ...

    with pytest.raises(PayloadTooLarge, match=r"^t: the arguments take 1,048,58\d bytes, the limit is 1,048,576"):
        task.enqueue("x" * MAX_PAYLOAD_BYTES)


# -- enqueue and using ------------------------------------------------------------------------------------------------


def test_an_enqueued_message_says_no_more_than_it_must(app: Prefork, server: Server) -> None:
    result = app.task(two).enqueue(1, b=2)
    (raw,) = held(server)
    it = decode(result.id.encode(), "default", raw)
    assert raw.endswith(b' 0 {"task":"%s.two"}\n[[1],{"b":2}]' % __name__.encode())
    assert result.enqueued_at is not None
    assert result.enqueued_at.timestamp() * 1000 == pytest.approx(it.enqueued_ms)
    assert abs(result.enqueued_at - datetime.now(UTC)) < timedelta(seconds=30)
    assert (result.status, result.task_name, result.queue_name) == (TaskStatus.READY, f"{__name__}.two", "default")
    assert isinstance(result, TaskResult)


def test_the_tasks_own_queue_and_priority_hold(app: Prefork, server: Server) -> None:
    task = app.task(queue_name="mail", priority=7)(two)
    id = task.enqueue(1).id
    assert decode(id.encode(), "mail", held(server, "mail")[0]).priority == 7
    assert server.client.zrange("prefork:{mail}:ranked", 0, -1, withscores=True) == [(id.encode(), -7)]


def test_using_says_everything_in_the_message(nowhere: Prefork) -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    task = nowhere.task(name="t")(two).using(
        queue_name="mail", priority=50, run_after=timedelta(minutes=5), expires=at, max_retries=3, timeout=60,
        soft_timeout=timedelta(seconds=50),
    )  # fmt: skip
    sent = task.s(1)
    assert (sent.queue_name, sent.priority, sent.at, sent.task_name) == ("mail", 50, "+300000", "t")
    assert header_of(sent) == {
        "task": "t", "max_retries": 3, "timeout_s": 60.0, "soft_timeout_s": 50.0, "delay_s": 300.0,
        "expires_ms": 1893456000000,
    }  # fmt: skip


def test_using_takes_a_moment_as_it_takes_a_duration(nowhere: Prefork) -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    sent = nowhere.task(name="t")(two).using(run_after=at, expires=10).s(1)
    assert sent.at == "1893456000000"
    assert header_of(sent) == {"task": "t", "due_ms": 1893456000000, "expires_s": 10.0}


def test_using_after_using_adds_and_replaces(nowhere: Prefork) -> None:
    first = nowhere.task(name="t")(two).using(priority=5, run_after=10, expires=datetime(2030, 1, 1, tzinfo=UTC))
    second = first.using(queue_name="mail", run_after=datetime(2030, 1, 1, tzinfo=UTC), expires=5, timeout=3)
    third = second.using(run_after=0, priority=-5)
    assert (first.s(1).priority, first.s(1).at, first.s(1).queue_name) == (5, "+10000", "default")
    assert header_of(first.s(1)) == {"task": "t", "delay_s": 10.0, "expires_ms": 1893456000000}
    assert (second.s(1).priority, second.s(1).at, second.s(1).queue_name) == (5, "1893456000000", "mail")
    assert header_of(second.s(1)) == {"task": "t", "due_ms": 1893456000000, "expires_s": 5.0, "timeout_s": 3.0}
    assert (third.s(1).priority, third.s(1).at) == (-5, "+0")
    assert header_of(third.s(1)) == {"task": "t", "delay_s": 0.0, "expires_s": 5.0, "timeout_s": 3.0}


def test_using_leaves_the_task_as_it_was(nowhere: Prefork) -> None:
    task = nowhere.task(name="t")(two)
    before = task.s(1)
    changed = task.using(
        queue_name="mail", priority=50, run_after=5, expires=9, max_retries=3, timeout=6, soft_timeout=5
    )
    assert changed is not task
    assert task.s(1) == before
    assert (task.queue_name, task.priority) == ("default", 0)
    assert nowhere.tasks == {"t": task}
    assert changed(1) is None


def test_using_nothing_changes_nothing(nowhere: Prefork) -> None:
    task = nowhere.task(queue_name="mail", priority=3)(two)
    assert task.using().s(1) == task.s(1)


def test_using_keeps_what_kind_of_task_it_is(nowhere: Prefork) -> None:
    @nowhere.task(name="t")
    async def fetch() -> int:
        return 5

    again = fetch.using(priority=5)
    assert isinstance(fetch, AsyncTask)
    assert isinstance(again, AsyncTask)
    assert asyncio.run(again()) == 5


@pytest.mark.parametrize(
    "when", [0, 0.0, timedelta(0), datetime(1971, 1, 1, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)], ids=str
)
def test_a_time_that_has_passed_means_now(app: Prefork, server: Server, when: Any) -> None:
    id = app.task(two).using(run_after=when).enqueue(1).id
    assert server.client.lrange("prefork:{default}:pending", 0, -1) == [id.encode()]
    decode(id.encode(), "default", held(server)[0])


def test_a_time_to_come_is_kept_until_then(app: Prefork, server: Server) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    task = app.task(two)
    ids = [task.using(run_after=when).enqueue(1).id for when in (at, timedelta(hours=1), 3600)]
    due = dict(server.client.zrange("prefork:{default}:scheduled", 0, -1, withscores=True))
    assert set(due) == {id.encode() for id in ids}
    assert all(score == pytest.approx(at.timestamp() * 1000, abs=30_000) for score in due.values())
    assert due[ids[0].encode()] == round(at.timestamp() * 1000)


def test_aenqueue_does_not_block_the_loop(app: Prefork, server: Server) -> None:
    task = app.task(two)
    threads: set[str] = set()
    send = app.client.enqueue
    app.client.enqueue = lambda *args: (threads.add(threading.current_thread().name), send(*args))[1]  # type: ignore[method-assign]

    async def main() -> list[TaskResult[None]]:
        return list(await asyncio.gather(*(task.aenqueue(n, b=n) for n in range(20))))

    results = asyncio.run(main())
    assert threading.current_thread().name not in threads
    assert len({result.id for result in results}) == len(held(server)) == 20


def test_many_threads_may_enqueue_at_once(app: Prefork, server: Server) -> None:
    task = app.task(two)
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.extend(task.enqueue(n).id for n in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 400
    assert server.client.llen("prefork:{default}:pending") == 400


# -- a plain call -----------------------------------------------------------------------------------------------------


def test_a_plain_call_runs_the_function_here(nowhere: Prefork) -> None:
    @nowhere.task(name="add")
    def add(a: int, b: int = 2) -> int:
        """Add."""
        return a + b

    assert add(1) == 3
    assert add(1, b=5) == 6
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Add.", __name__)
    assert inspect.signature(add) == inspect.signature(add.function)
    assert repr(add) == f"<task {add.name}>"


def test_a_plain_call_of_an_async_task_is_its_coroutine(nowhere: Prefork) -> None:
    @nowhere.task(name="t")
    async def fetch(n: int) -> int:
        await asyncio.sleep(0)
        return n

    assert asyncio.run(fetch(4)) == 4


def test_a_plain_call_lets_the_error_of_the_function_through(nowhere: Prefork) -> None:
    @nowhere.task(name="t", retry_on=ZeroDivisionError)
    def divide() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        divide()


def test_a_plain_call_gives_a_context_of_its_own(nowhere: Prefork) -> None:
    @nowhere.task(name="t", takes_context=True)
    def job(context: Context, n: int) -> tuple[Any, ...]:
        context.progress(1, 2, "half")
        return context.task_name, context.attempt, context.retries_left, context.deadline, context.enqueued_at, n

    assert job(3) == ("t", 1, 0, None, None, 3)


def test_each_plain_call_has_an_id_of_its_own(nowhere: Prefork) -> None:
    @nowhere.task(name="t", takes_context=True)
    def job(context: Context) -> str:
        return context.id

    assert job() != job()


def test_the_follow_ups_of_a_plain_call_are_enqueued_when_it_has_succeeded(app: Prefork, server: Server) -> None:
    child = app.task(two)
    results: list[TaskResult[Any]] = []
    before = [0]

    @app.task(name="parent", takes_context=True)
    def parent(context: Context, fails: bool) -> str:
        results.append(context.enqueue(child.s(1)))
        results.append(context.enqueue(child.using(queue_name="mail", priority=3).s(2)))
        assert len(held(server)) == before[0]
        if fails:
            raise ValueError
        return "done"

    with pytest.raises(ValueError, match=r"^$"):
        parent(True)
    assert not held(server)
    results.clear()
    assert parent(False) == "done"
    assert len(held(server)) == len(held(server, "mail")) == 1
    for result in results:
        result.refresh()
        assert result.status is TaskStatus.READY
    before[0] = 1
    parent(False)
    assert len(held(server)) == len(held(server, "mail")) == 2


def test_the_follow_ups_of_an_async_plain_call_too(app: Prefork, server: Server) -> None:
    child = app.task(two)

    @app.task(name="parent", takes_context=True)
    async def parent(context: Context, fails: bool) -> TaskResult[None]:
        result = context.enqueue(child.s(1))
        await asyncio.sleep(0)
        assert not held(server)
        if fails:
            raise ValueError
        return result

    with pytest.raises(ValueError, match=r"^$"):
        asyncio.run(parent(True))
    assert not held(server)
    result = asyncio.run(parent(False))
    assert len(held(server)) == 1
    result.refresh()


def test_a_plain_call_without_follow_ups_needs_no_broker(nowhere: Prefork) -> None:
    task = register(nowhere, contextual)
    assert task(1) is None


# -- a context in a worker --------------------------------------------------------------------------------------------


def a_context() -> Context:
    return Context("0" * 32, "t", "default", 1, 25, None, None)


def test_a_follow_up_has_an_id_that_every_attempt_gives_it_again(nowhere: Prefork) -> None:
    task = nowhere.task(two)
    ids = [[(c := a_context()).enqueue(task.s(1)).id, c.enqueue(task.s(1)).id] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def enqueue_again_and_again(context: Context, sent: Any) -> None:
    for _ in range(20_000):
        context.enqueue(sent)


def test_a_task_cannot_have_follow_ups_without_end(nowhere: Prefork) -> None:
    context, sent = a_context(), nowhere.task(two).s(1)
    with pytest.raises(PreforkError, match=r"^t 0+: .*follow-ups.*enqueue_many"):
        enqueue_again_and_again(context, sent)
    assert len(context.follow_ups) >= 1000


def test_follow_ups_that_no_answer_could_carry_are_refused_where_they_are_made(nowhere: Prefork) -> None:
    @nowhere.task(name="large")
    def large(text: str) -> None: ...

    context = a_context()
    with pytest.raises(PreforkError, match="follow-ups"):
        enqueue_again_and_again(context, large.s("x" * 1_000_000))
    assert len(context.follow_ups) < 64  # an answer of a child has at most 64 MiB


def test_a_task_that_takes_its_context_needs_a_parameter_for_it(nowhere: Prefork) -> None:
    for function in (nothing, lambda *, a: a):
        with pytest.raises(PreforkError, match=r"takes_context=True, but it has no first parameter"):
            nowhere.task(name="t", takes_context=True)(function)
