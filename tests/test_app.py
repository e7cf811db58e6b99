from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork import (
    AppError,
    BrokerError,
    InvalidOption,
    NotJSON,
    Prefork,
    PreforkError,
    ResultUnavailable,
    TaskStatus,
)
from tests.conftest import Server, until


def job(n: int = 0) -> int:
    return n


def other(n: int = 0) -> int:
    return n


class Callable:
    def __call__(self, n: int) -> int:
        return n

    def method(self, n: int) -> int:
        return n


@pytest.fixture
def app(server: Server) -> Iterator[Prefork]:
    app = Prefork("shop", server.url)
    yield app
    app.client.close()


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_task_is_named_by_where_it_is_defined() -> None:
    app = Prefork("shop")
    assert app.task(job).name == f"{__name__}.job"
    assert app.task()(other).name == f"{__name__}.other"
    assert set(app.tasks) == {f"{__name__}.job", f"{__name__}.other"}
    assert repr(app) == "<prefork app shop, 2 tasks>"


def test_a_function_made_inside_another_needs_a_name() -> None:
    app = Prefork("shop")

    def inner() -> None: ...

    for function in (inner, lambda: None, functools.partial(job, 1)):
        with pytest.raises(InvalidOption, match="give it name="):
            app.task(function)
    with pytest.raises(InvalidOption, match=r"inner'? is made inside a function.*; move it to the module's top level"):
        app.task(inner)
    assert app.task(name="inner")(inner).name == "inner"
    assert app.task(name="lambda")(lambda: 3)() == 3


@pytest.mark.parametrize("function", [functools.partial(job, 1), Callable(), Callable().method, len])
def test_whatever_can_be_called_can_be_a_task_that_has_a_name(function: Any) -> None:
    app = Prefork("shop")
    task = app.task(name="t")(function)
    assert app.tasks == {"t": task}
    with pytest.raises(AppError, match="two tasks are named t"):
        app.task(name="t")(job)


@pytest.mark.parametrize("what", ["send", 3, None, object()])
def test_what_cannot_be_called_is_no_task(what: Any) -> None:
    with pytest.raises(InvalidOption, match=r"is not a function; write @app\.task or @app\.task\(\.\.\.\)"):
        Prefork("shop").task(what)


def test_a_name_is_given_once_and_the_error_says_where_the_other_is() -> None:
    app = Prefork("shop")
    first = app.task(name="send")(job)
    with pytest.raises(AppError, match=rf"^two tasks are named send: one at {__file__}:\d+; give one of them name="):
        app.task(name="send")(other)
    with pytest.raises(AppError, match=f"two tasks are named {__name__}.job"):
        app.task(job), app.task(job)
    assert app.tasks["send"] is first


def test_two_apps_know_nothing_of_each_other() -> None:
    one, two = Prefork("one"), Prefork("two")
    assert one.task(job).app is one
    assert two.task(job).app is two


@pytest.mark.parametrize("how", ["tasks.py", "-m shop.tasks", "-m shop"])
def test_a_task_of_the_main_module_is_named_as_a_worker_will_import_it(tmp_path: Path, how: str) -> None:
    code = textwrap.dedent("""
        from prefork import Prefork
        app = Prefork("shop")
        @app.task
        def send(): ...
        print(send.name)
    """)
    (tmp_path / "shop").mkdir()
    for name in ("tasks.py", "shop/__init__.py", "shop/__main__.py", "shop/tasks.py"):
        (tmp_path / name).write_text("" if name.endswith("__init__.py") else code)
    ran = subprocess.run([sys.executable, *how.split()], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = {"tasks.py": "tasks.send", "-m shop.tasks": "shop.tasks.send", "-m shop": "shop.__main__.send"}
    assert ran.stdout.strip() == expected[how]


# -- the broker -------------------------------------------------------------------------------------------------------


def test_without_a_broker_the_first_enqueue_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    task = Prefork("shop").task(job)
    with pytest.raises(InvalidOption, match=r"app shop has no broker: pass broker= to Prefork, or set PREFORK_BROKER"):
        task.enqueue(1)


def test_the_environment_names_the_broker_when_the_app_does_not(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("PREFORK_BROKER", server.url)
    app = Prefork("shop")
    assert app.task(job).enqueue(1).status is TaskStatus.READY
    assert app.client.url == server.url
    app.client.close()
    monkeypatch.setenv("PREFORK_BROKER", "redis://elsewhere:1")
    named = Prefork("shop", server.url)
    assert named.client.url == server.url


def test_a_broker_that_is_not_there_is_an_error_within_the_limit(tmp_path: Path) -> None:
    app = Prefork("shop", f"unix://{tmp_path}/none", limit_s=0.5)
    task = app.task(job)
    for ask in (lambda: task.enqueue(1), lambda: app.result("0" * 32), lambda: app.enqueue_many([task.s(1)])):
        with pytest.raises(BrokerError, match="none") as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("limit_s", [0.1, 0.15, 0.2, 0.25, 1])
def test_every_limit_that_is_accepted_lets_a_task_be_enqueued(server: Server, limit_s: float) -> None:
    try:
        app = Prefork("shop", server.url, limit_s=limit_s)
    except InvalidOption:
        return
    task = app.task(job)

    def enqueued() -> bool:
        try:
            return task.enqueue(1).status is TaskStatus.READY
        except BrokerError as error:  # a busy machine
            assert "does not answer in time" in str(error)  # noqa: PT017
            return False

    until(enqueued)
    app.client.close()


def test_the_prefix_sets_apps_apart(server: Server) -> None:
    one, two = Prefork("shop", server.url, prefix="one"), Prefork("shop", server.url, prefix="two")
    id = one.task(job).enqueue(1).id
    assert one.result(id).status is TaskStatus.READY
    with pytest.raises(ResultUnavailable):
        two.result(id)
    assert {key.split(b":")[0] for key in server.client.scan_iter()} == {b"one"}
    one.client.close()
    two.client.close()


def test_connect_to_changes_the_broker_from_then_on(server: Server) -> None:
    app = Prefork("shop", "unix:///nowhere")
    app.connect_to(server.url, "other")
    app.task(job).enqueue(1)
    assert server.client.llen("other:{default}:pending") == 1
    app.connect_to(None, None)
    assert (app.broker, app.prefix) == (server.url, "other")
    app.client.close()


def test_an_app_may_be_used_on_both_sides_of_a_fork(app: Prefork, server: Server) -> None:
    task = app.task(job)
    task.enqueue(1)
    if not (pid := os.fork()):
        try:
            for n in range(100):
                task.enqueue(n)
        finally:
            os._exit(0)
    for n in range(100):
        task.enqueue(n)
    os.waitpid(pid, 0)
    assert server.client.llen("prefork:{default}:pending") == 201


# -- enqueue_many -----------------------------------------------------------------------------------------------------


def test_enqueue_many_takes_any_iterable_and_keeps_its_order(app: Prefork, server: Server) -> None:
    task = app.task(job)
    results = app.enqueue_many(task.s(n) for n in range(1234))
    assert [result.id.encode() for result in results] == server.client.lrange("prefork:{default}:pending", 0, -1)
    bodies = server.client.hmget("prefork:{default}:m", [result.id for result in results])
    assert [json.loads(raw.partition(b"\n")[2])[0][0] for raw in bodies] == list(range(1234))


def test_enqueue_many_of_nothing_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    assert list(Prefork("shop").enqueue_many(iter(()))) == []


def test_enqueue_many_mixes_tasks_queues_and_options(app: Prefork, server: Server) -> None:
    one, two = app.task(job), app.task(queue_name="mail")(other)
    results = app.enqueue_many(
        [one.s(1), two.s(2), one.using(priority=5).s(3), two.using(queue_name="default", run_after=60).s(4), one.s(5)]
    )
    assert [result.queue_name for result in results] == ["default", "mail", "default", "default", "default"]
    assert [result.task_name.rpartition(".")[2] for result in results] == ["job", "other", "job", "other", "job"]
    pending = server.client.lrange("prefork:{default}:pending", 0, -1)
    assert pending == [results[0].id.encode(), results[4].id.encode()]
    assert server.client.zcard("prefork:{default}:ranked") == server.client.zcard("prefork:{default}:scheduled") == 1
    assert {app.result(result.id).id for result in results} == {result.id for result in results}


def test_enqueue_many_sends_large_payloads_in_batches_that_are_not_too_large(app: Prefork, server: Server) -> None:
    @app.task(name="t")
    def task(text: str) -> None: ...

    results = app.enqueue_many(task.s("x" * 300_000) for _ in range(20))
    assert len(results) == server.client.llen("prefork:{default}:pending") == 20


def test_an_argument_that_is_refused_stops_enqueue_many_at_its_line(app: Prefork) -> None:
    task = app.task(job)
    with pytest.raises(NotJSON, match="argument n is a set"):
        app.enqueue_many(task.s(n) for n in (1, {2}))  # type: ignore[arg-type]


def test_what_is_no_invocation_is_refused_with_the_remedy(app: Prefork, server: Server) -> None:
    task = app.task(job)
    for wrong in (task, task.s, 3, None):
        with pytest.raises((PreforkError, TypeError), match=r"\.s\("):
            app.enqueue_many([task.s(1), wrong])  # type: ignore[list-item]
    with pytest.raises((PreforkError, TypeError), match=r"\.s\("):
        app.enqueue_many(task.s(1))  # type: ignore[arg-type]
    assert not server.client.keys()


def test_aenqueue_many_does_the_same(app: Prefork, server: Server) -> None:
    import asyncio

    task = app.task(job)
    results = asyncio.run(app.aenqueue_many(task.s(n) for n in range(7)))
    assert [result.id.encode() for result in results] == server.client.lrange("prefork:{default}:pending", 0, -1)


# -- result and hooks -------------------------------------------------------------------------------------------------


def test_a_result_is_found_by_its_id_whatever_its_queue(app: Prefork) -> None:
    task = app.task(job)
    for queue in ("default", "mail", "a-b.c"):
        it = task.using(queue_name=queue).enqueue(3)
        found = app.result(it.id)
        assert (found.id, found.queue_name, found.task_name) == (it.id, queue, f"{__name__}.job")
        assert (found.status, found.enqueued_at) == (TaskStatus.READY, it.enqueued_at)


@pytest.mark.parametrize("id", ["", "0" * 32, "no such", str(uuid.UUID(int=7))])
def test_an_id_of_which_nothing_is_known_is_an_error(app: Prefork, id: str) -> None:
    app.task(job).enqueue(1)
    with pytest.raises(ResultUnavailable, match=f"nothing is known of task {id}"):
        app.result(id)


def test_hooks_of_children_are_kept_in_their_order_and_stay_functions() -> None:
    app = Prefork("shop")

    @app.on_child_start
    def first() -> None: ...

    second = app.on_child_start(lambda: None)
    assert app.child_start_hooks == [first, second]
    assert first() is None


def test_results_are_kept_as_long_as_the_task_says() -> None:
    app = Prefork("shop")
    app.task(name="none", result_ttl=0)(job)
    app.task(name="hour", result_ttl=3600)(job)
    assert [app.result_ttl_ms(name) for name in ("none", "hour", "unknown")] == [0, 3_600_000, 86_400_000]
