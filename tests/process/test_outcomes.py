"""What becomes of a message: done, retried, dead, expired, cancelled; and of what is no message at all."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import orjson
import pytest

from prefork import TaskFailed
from tests.conftest import SLACK_S, Project, until
from tests.process.scene import active, counts, key, pending, place, state, wait_dead

TASKS = """
import enum, uuid, dataclasses, datetime

@app.task(max_retries=2, retry_delay=0.05)
def fail(text="no"):
    note("fail", time.time())
    raise ValueError(text)

@app.task(max_retries=5, retry_delay=0.05)
def fail_until(name, n):
    note(name)
    if len((here / name).read_text().splitlines()) < n:
        raise ValueError("not yet")
    return n

@app.task(max_retries=3, retry_delay=lambda retried: 0.3 * (retried + 1))
def delay_by_function():
    note("fail", time.time())
    raise ValueError

@app.task(max_retries=1, retry_delay=lambda retried: 1 / 0)
def delay_that_fails():
    raise ValueError

@app.task(max_retries=1, retry_delay=lambda retried: "soon")
def delay_of_nonsense():
    raise ValueError

@app.task(max_retries=1, retry_delay=lambda retried: float("nan"))
def delay_not_a_number():
    raise ValueError

@app.task(max_retries=1, retry_delay=lambda retried: sys.exit(3))
def delay_that_exits():
    raise ValueError

@app.task(max_retries=5, retry_delay=0, retry_on=(OSError, KeyError))
def picky(kind):
    note(kind)
    raise {"OSError": ConnectionError, "ValueError": ValueError}[kind]()

@app.task(max_retries=2, retry_delay=0, dont_retry_on=(LookupError,))
def unpicky(kind):
    note(kind)
    raise {"KeyError": KeyError, "ValueError": ValueError}[kind]()

@app.task(max_retries=1, retry_delay=0)
def ask(options):
    note("ask", time.time())
    if len((here / "ask").read_text().splitlines()) < 4:
        raise Retry("later", **options)
    return "at last"

@app.task
def die():
    note("die")
    raise Dead("no such order")

@app.task(max_retries=1, retry_delay=0)
def leave(how):
    note("leave", how)
    if how == "SystemExit": sys.exit(0)
    if how == "SystemExit with text": raise SystemExit("bye")
    if how == "KeyboardInterrupt": raise KeyboardInterrupt
    if how == "GeneratorExit": raise GeneratorExit
    if how == "BaseException": raise BaseException("base")
    if how == "StopIteration": raise StopIteration(1)
    if how == "CancelledError":
        import asyncio
        raise asyncio.CancelledError
    if how == "ExceptionGroup": raise ExceptionGroup("some", [ValueError(1), TypeError(2)])

@app.task(max_retries=1, retry_delay=0)
async def aleave(how):
    note("leave", how)
    return leave.function(how)

@app.task(max_retries=0)
def returns(what):
    note("returns")
    if what == "object": return object()
    if what == "set": return {1, 2}
    if what == "nan": return [1, float("nan")]
    if what == "surrogate": return "\\ud800"
    if what == "bytes": return b"x"
    if what == "huge int": return 1 << 70
    if what == "int keys": return {1: 2}
    if what == "too large": return "x" * (1 << 21)
    if what == "itself":
        itself = []
        itself.append(itself)
        return itself
    if what == "generator": return (n for n in range(3))
    if what == "coroutine": return aleave.function("")

class Mute(Exception):
    def __str__(self): raise RuntimeError("cannot say")
    __repr__ = __str__

class Quitter(Exception):
    def __str__(self): sys.exit(1)
    __repr__ = __str__

class Liar(Exception):
    def __str__(self): return 42

class Homeless(Exception):
    pass
Homeless.__module__ = None

class Chatty(Exception):
    def __str__(self): return "x" * 10_000_000

@app.task(max_retries=1, retry_delay=0)
def raises(what):
    note("raises")
    if what == "mute": raise Mute
    if what == "quitter": raise Quitter
    if what == "liar": raise Liar
    if what == "homeless": raise Homeless("where from")
    if what == "chatty": raise Chatty
    if what == "surrogate": raise ValueError("\\ud800 \\x00 \\x1b[31m")
    if what == "newlines": raise ValueError("\\n\\n\\r\\n")
    if what == "bytes": raise ValueError(b"\\xff\\xfe")
    if what == "recursion":
        def deeper(): return deeper()
        deeper()
    if what == "chain":
        try: 1 / 0
        except ZeroDivisionError as error: raise Mute from error
    if what == "circle":
        error = ValueError(1)
        error.__cause__ = error
        raise error
    if what == "os error": open("/nonexistent/\\udcff")
    if what == "assertion": assert not sys.argv, sys.argv

@app.task
def echo(what):
    return what

@app.task(result_ttl=0)
def silent(n):
    note("silent", n)

@app.task(result_ttl=0, max_retries=1, retry_delay=0.05)
def silent_at_second(n):
    note("silent", n)
    if counts_of(n) < 2:
        raise ValueError

def counts_of(n):
    return (here / "silent").read_text().splitlines().count(str(n))
"""


@pytest.fixture(autouse=True)
def _tasks(project: Project) -> None:
    project.add(TASKS)


def test_a_task_that_succeeds_keeps_its_result(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.add.enqueue(1, b=5)
    assert result.wait(timeout=60) == 6
    assert (result.status, result.attempts, result.errors) == ("SUCCESSFUL", 1, [])
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert project.server.client.hlen(key("m")) == 0
    assert worker.stop() == 0


def test_retries_are_counted_and_then_it_is_a_dead_letter(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.fail.enqueue("no luck")
    wait_dead(project, result)
    assert len(project.lines("fail")) == 3
    assert (result.status, result.attempts) == ("FAILED", 3)
    assert [(e.exception_class_path, e.message) for e in result.errors] == [("builtins.ValueError", "no luck")] * 3
    assert "raise ValueError(text)" in result.errors[0].traceback
    assert "prefork/worker" not in result.errors[0].traceback
    with pytest.raises(TaskFailed, match="no luck"):
        result.wait(timeout=60)
    assert worker.stop() == 0


def test_a_retry_may_succeed(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.fail_until.enqueue("tries", 4)
    assert result.wait(timeout=60) == 4
    assert (result.attempts, len(result.errors)) == (4, 3)
    assert worker.stop() == 0


def test_max_retries_of_one_message_hold_for_it(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.fail.using(max_retries=0).enqueue()
    wait_dead(project, result)
    assert result.attempts == 1
    assert worker.stop() == 0


def test_a_constant_retry_delay_is_kept(project: Project) -> None:
    worker = project.worker()
    wait_dead(project, project.tasks.fail.enqueue())
    times = [float(line) for line in project.lines("fail")]
    assert all(0.05 <= later - earlier < 0.05 + SLACK_S for earlier, later in pairwise(times))
    assert worker.stop() == 0


def test_a_retry_delay_may_be_a_function_of_the_retry_count(project: Project) -> None:
    worker = project.worker()
    wait_dead(project, project.tasks.delay_by_function.enqueue())
    times = [float(line) for line in project.lines("fail")]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(gaps) == 3
    assert all(0.3 * n <= gap < 0.3 * n + SLACK_S for n, gap in enumerate(gaps, 1))
    assert worker.stop() == 0


def test_for_a_retry_delay_that_fails_the_default_holds(project: Project) -> None:
    worker = project.worker()
    for task in ("delay_that_fails", "delay_of_nonsense", "delay_not_a_number", "delay_that_exits"):
        result = getattr(project.tasks, task).enqueue()
        until(lambda result=result: place(project, result) == "scheduled", what=task)  # type: ignore[misc]
        due_ms = project.server.client.zscore(key("scheduled"), result.id)
        assert 15 - SLACK_S < due_ms / 1000 - time.time() < 46, task
        assert state(project, result)["errors"][0]["class"] == "builtins.ValueError", task
        assert state(project, result).get("crashes", 0) == 0, task
    assert worker.stop() == 0


def test_only_what_is_in_retry_on_is_retried(project: Project) -> None:
    worker = project.worker()
    for kind, attempts in (("OSError", 6), ("ValueError", 1)):
        result = project.tasks.picky.enqueue(kind)
        wait_dead(project, result)
        assert len(project.lines(kind)) == result.attempts == attempts
    assert worker.stop() == 0


def test_what_is_in_dont_retry_on_is_not_retried(project: Project) -> None:
    worker = project.worker()
    for kind, attempts in (("KeyError", 1), ("ValueError", 3)):
        result = project.tasks.unpicky.enqueue(kind)
        wait_dead(project, result)
        assert len(project.lines(kind)) == result.attempts == attempts
    assert worker.stop() == 0


def test_a_task_may_ask_for_another_run_that_is_not_counted(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.ask.enqueue({"delay": 0.3, "counted": False})
    assert result.wait(timeout=60) == "at last"
    assert result.attempts == 4
    times = [float(line) for line in project.lines("ask")]
    assert all(0.3 <= later - earlier < 0.3 + SLACK_S for earlier, later in pairwise(times))
    assert worker.stop() == 0


def test_a_counted_retry_uses_up_the_retries(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.ask.enqueue({"delay": 0})
    wait_dead(project, result)
    assert result.attempts == 2
    assert result.errors[-1].exception_class_path == "prefork.Retry"
    assert worker.stop() == 0


NONSENSE = (
    "delay=-1", "delay='soon'", "delay=float('nan')", "delay=float('inf')", "delay=1e300", "delay=10**30", "delay=[]",
    "delay=object()", "delay=True", "counted='yes'", "counted=None", "counted=[]",
    "delay=__import__('datetime').timedelta(seconds=0.1)",
)  # fmt: skip


def test_a_retry_with_nonsense_neither_hurts_the_worker_nor_is_lost(project: Project) -> None:
    for n, options in enumerate(NONSENSE):
        project.add(f"""
            @app.task(max_retries=1, retry_delay=0)
            def nonsense{n}():
                note("nonsense", {n})
                raise Retry("again", {options})
        """)
    worker = project.worker()
    for n, options in enumerate(NONSENSE):
        result = getattr(project.tasks, f"nonsense{n}").enqueue()
        until(lambda result=result: place(project, result) in ("dead", "scheduled"), what=options)  # type: ignore[misc]
        assert str(n) in project.lines("nonsense"), options
        assert state(project, result).get("crashes", 0) == 0, options
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_task_may_go_to_the_dead_letters_at_once(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.die.enqueue()
    wait_dead(project, result)
    assert len(project.lines("die")) == 1
    assert result.errors[-1].exception_class_path == "prefork.Dead"
    assert result.errors[-1].message == "no such order"
    assert worker.stop() == 0


@pytest.mark.parametrize("task", ["leave", "aleave"])
def test_whatever_a_task_raises_is_a_failure_of_the_task_alone(project: Project, task: str) -> None:
    worker = project.worker("concurrency = 1")
    project.tasks.add.enqueue(1).wait(timeout=60)
    before = worker.children()
    for how in ("SystemExit", "SystemExit with text", "KeyboardInterrupt", "GeneratorExit", "BaseException",
                "StopIteration", "CancelledError", "ExceptionGroup"):  # fmt: skip
        result = getattr(project.tasks, task).enqueue(how)
        after = project.tasks.aleave.enqueue("")
        wait_dead(project, result)
        assert result.attempts == 2, how
        kind = "RuntimeError" if (task, how) == ("aleave", "StopIteration") else how.split()[0]
        assert result.errors[-1].exception_class == kind, how
        assert after.wait(timeout=60) is None, how
        assert worker.children() == before, how
    assert worker.stop() == 0


def test_a_result_that_is_not_JSON_fails_the_task_once_with_a_reason(project: Project) -> None:
    worker = project.worker()
    for what in ("object", "set", "nan", "surrogate", "bytes", "huge int", "int keys", "too large", "itself",
                 "generator", "coroutine"):  # fmt: skip
        result = project.tasks.returns.enqueue(what)
        wait_dead(project, result)
        assert result.attempts == 1, what
        assert result.errors[-1].exception_class in ("NotJSON", "PayloadTooLarge"), what
        assert "returns: its result" in result.errors[-1].message, what
    assert worker.stop() == 0


UNSPEAKABLE = {
    "mute": "Mute", "quitter": "Quitter", "liar": "Liar", "homeless": "Homeless", "chatty": "Chatty",
    "surrogate": "ValueError", "newlines": "ValueError", "bytes": "ValueError", "recursion": "RecursionError",
    "chain": "Mute", "circle": "ValueError", "os error": "FileNotFoundError", "assertion": "AssertionError",
}  # fmt: skip


def test_an_exception_that_cannot_be_told_is_told_as_well_as_it_goes(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    project.tasks.add.enqueue(1).wait(timeout=60)
    before = worker.children()
    for what, name in UNSPEAKABLE.items():
        result = project.tasks.raises.enqueue(what)
        wait_dead(project, result)
        assert result.attempts == 2, what
        assert result.errors[-1].exception_class == name, what
        assert len(result.errors[-1].traceback) < 20_000, what
        assert worker.children() == before, what
    assert worker.stop() == 0


def test_large_arguments_and_results_pass(project: Project) -> None:
    worker = project.worker()
    text = "x" * ((1 << 20) - 100)
    results = [project.tasks.echo.enqueue(text) for _ in range(8)]
    assert all(result.wait(timeout=60) == text for result in results)
    assert worker.stop() == 0


def test_large_and_small_messages_go_through_one_pipe_together(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    echo = project.tasks.echo
    for result in project.tasks.app.enqueue_many(echo.s(n) for n in range(300)):
        result.wait(timeout=60)
    texts = [str(n) * (300_000 if n % 7 == 0 else 1) for n in range(60)]
    results = project.tasks.app.enqueue_many(echo.s(text) for text in texts)
    assert [result.wait(timeout=60) for result in results] == texts
    assert all(result.attempts == 1 for result in results)
    assert worker.stop() == 0


def test_nothing_stays_in_the_broker_of_a_task_that_keeps_no_result(project: Project) -> None:
    worker = project.worker()
    silent, app = project.tasks.silent, project.tasks.app
    results = list(app.enqueue_many(silent.s(n) for n in range(300)))
    results += [silent.using(priority=5).enqueue(300), silent.using(run_after=0.2).enqueue(301)]
    results += [project.tasks.silent_at_second.enqueue(302)]
    until(lambda: len(project.lines("silent")) == 304)
    until(lambda: all(place(project, result) == "" for result in results[-3:]))
    assert worker.stop() == 0
    left = {name.decode() for name in project.server.client.keys("*")}
    assert left <= {"prefork:queues", key("stats"), key("wake")}


def test_an_unknown_task_is_kept_and_tried_again_on_a_schedule(project: Project) -> None:
    project.tasks.app.task(name="shop.of_tomorrow")(lambda n: n)
    result = project.tasks.app.tasks["shop.of_tomorrow"].enqueue(7)
    raw = project.server.client.hget(key("m"), result.id)
    worker = project.worker()
    until(lambda: place(project, result) == "scheduled")
    assert state(project, result)["unknown"] == 1
    assert state(project, result).get("retried", 0) == 0
    line = next(line for line in worker.log.splitlines() if "shop.of_tomorrow" in line)
    assert "tasks_" in line
    assert ".add" in line
    assert 5 - SLACK_S < state(project, result)["due_ms"] / 1000 - time.time() < 6
    assert project.server.client.hget(key("m"), result.id) == raw
    # As if it had come that often already: now it has had its chances.
    project.server.client.hset(key("state"), result.id, orjson.dumps({"unknown": 9}))
    project.server.client.zadd(key("scheduled"), {result.id: 1})
    project.tasks.add.enqueue(1).wait(timeout=60)
    wait_dead(project, result)
    assert result.errors[-1].exception_class_path == "prefork.UnknownTask"
    assert ".add" in result.errors[-1].message
    assert worker.stop() == 0


def test_a_rolling_deploy_loses_nothing_of_a_task_that_only_the_new_release_knows(project: Project) -> None:
    old = project.worker()
    project.tasks.app.task(name="new")(lambda n: n)
    result = project.tasks.app.tasks["new"].enqueue(7)
    until(lambda: place(project, result) == "scheduled")
    assert old.stop() == 0
    with (project.folder / f"{project.module_name}.py").open("a") as file:
        file.write("\n@app.task(name='new')\ndef new(n):\n    return n\n")
    new = project.worker()
    assert result.wait(timeout=60) == 7
    assert new.stop() == 0


GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "text": b"hello world",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07garbage\x94.",
    "other_version": b'2 1764000000000 0 {"task":"x"}\n[[],{}]',
    "no_body": b'1 1764000000000 0 {"task":"x"}',
    "no_json": b"1 1764000000000 0 {task}\n[[],{}]",
    "no_task": b"1 1764000000000 0 {}\n[[],{}]",
    "header_is_a_list": b"1 1764000000000 0 []\n[[],{}]",
    "task_is_a_number": b'1 1764000000000 0 {"task":7}\n[[],{}]',
    "priority_is_text": b'1 1764000000000 high {"task":"ADD"}\n[[],{}]',
    "time_is_text": b'1 now 0 {"task":"ADD"}\n[[1],{}]',
    "negative_time": b'1 -5 0 {"task":"ADD"}\n[[1],{}]',
    "huge_time": b'1 99999999999999999999999999 0 {"task":"ADD"}\n[[1],{}]',
    "huge_priority": b'1 1764000000000 99999999999999999999999 {"task":"ADD"}\n[[1],{}]',
    "max_retries_is_text": b'1 1764000000000 0 {"task":"ADD","max_retries":"many"}\n[[1],{}]',
    "negative_max_retries": b'1 1764000000000 0 {"task":"ADD","max_retries":-1}\n[[1],{}]',
    "huge_max_retries": b'1 1764000000000 0 {"task":"ADD","max_retries":1e300}\n[[1],{}]',
    "negative_timeout": b'1 1764000000000 0 {"task":"ADD","timeout_s":-1}\n[[1],{}]',
    "timeout_is_a_list": b'1 1764000000000 0 {"task":"ADD","timeout_s":[1]}\n[[1],{}]',
    "zeros": b"\0" * 1000,
    "task_of_surrogates": b'1 1764000000000 0 {"task":"\\ud800"}\n[[],{}]',
}


def test_a_message_that_cannot_be_decoded_is_a_dead_letter_as_it_is(project: Project) -> None:
    worker = project.worker()
    client = project.server.client
    for n, (name, raw) in enumerate(GARBAGE.items()):
        id = f"{n:032x}"
        raw = raw.replace(b"ADD", project.tasks.add.name.encode())
        client.hset(key("m"), id, raw)
        client.rpush(key("pending"), id)
        assert project.tasks.add.enqueue(1).wait(timeout=60) == 3, name
        until(lambda id=id: client.zscore(key("dead"), id), what=name)  # type: ignore[misc]
        assert client.hget(key("m"), id) == raw, name
        error = orjson.loads(client.hget(key("state"), id))["errors"][-1]
        assert error["class"] == "prefork.BadMessage", name
        assert id in worker.log, name
    assert active(project) == 0
    assert worker.stop() == 0


def test_garbage_with_a_strange_id_does_not_stay_in_the_way(project: Project) -> None:
    worker = project.worker()
    client = project.server.client
    for id in (b"\xff\xfe", b"", b"x" * 5000, b"with space\n", b"7", "ü".encode()):
        client.hset(key("m"), id, b"garbage")
        client.rpush(key("pending"), id)
        assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
        until(lambda id=id: client.zscore(key("dead"), id), what=f"{id!r:.20} is a dead letter")  # type: ignore[misc]
        assert client.hget(key("m"), id) == b"garbage"
    assert active(project) == 0
    assert worker.stop() == 0


def test_a_good_message_with_a_strange_id_is_run(project: Project) -> None:
    client = project.server.client
    raw = f'1 1764000000000 0 {{"task":"{project.tasks.silent.name}"}}\n[[5],{{}}]'.encode()
    ids = (b"", b"x" * 5000, b"with space\n", b"7", "ü".encode())
    for id in ids:
        client.hset(key("m"), id, raw)
        client.rpush(key("pending"), id)
    worker = project.worker()
    until(lambda: project.lines("silent") == ["5"] * len(ids))
    until(lambda: client.hlen(key("m")) == 0)
    assert worker.stop() == 0


def test_a_damaged_body_is_a_dead_letter_with_its_reason(project: Project) -> None:
    worker = project.worker()
    client = project.server.client
    bodies = (b"", b"[", b"{}", b"[1,2]", b"[[],[]]", b"[[1],{}", b"\xff", b"[[1],{},3]", b"null", b"[" * 5000,
              b'[[1],{"a":1}]')  # fmt: skip
    for n, body in enumerate(bodies):
        id = f"{n:032x}"
        raw = f'1 1764000000000 0 {{"task":"{project.tasks.add.name}","max_retries":0}}\n'.encode() + body
        client.hset(key("m"), id, raw)
        client.rpush(key("pending"), id)
        assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
        until(lambda id=id: client.zscore(key("dead"), id), what=repr(body))  # type: ignore[misc]
        assert client.hget(key("m"), id) == raw
        error = orjson.loads(client.hget(key("state"), id))["errors"][-1]
        assert error["class"] == ("builtins.TypeError" if body.endswith(b":1}]") else "prefork.BadMessage"), body
    assert worker.stop() == 0


DAMAGED_STATES = (
    b"", b"garbage", b"[]", b"7", b'{"attempts":"three"}', b'{"errors":7}', b'{"attempts":70000,"retried":0}',
    b'{"attempts":-1}', b'{"errors":[1,2]}', b'{"workers":"me"}', b'{"progress":5}', b'{"unknown":"x"}',
    b'{"started_ms":"x"}', b'{"crashes":[]}', b'{"retried":1.5}', b'{"attempts":5000000000}', b'{"attempts":1e999}',
    b'{"errors":[{"class":7}]}', b'{"workers":[7]}', b'{"attempts":true,"errors":[null]}', b"\xff",
)  # fmt: skip


@pytest.mark.parametrize("task", ["add", "fail"])
def test_a_damaged_state_does_not_keep_a_message_from_running(project: Project, task: str) -> None:
    worker = project.worker()
    client = project.server.client
    for raw in DAMAGED_STATES:
        result = getattr(project.tasks, task).using(max_retries=0, run_after=0.05).enqueue(1)
        client.hset(key("state"), result.id, raw)
        end = {"add": "finished", "fail": "dead"}[task]
        until(lambda result=result, end=end: place(project, result) == end, what=repr(raw))  # type: ignore[misc]
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_damaged_state_hurts_nobody_when_the_child_dies_or_the_task_is_unknown(project: Project) -> None:
    project.add("""
        @app.task
        def crash():
            os._exit(1)
    """)
    worker = project.worker("max_crashes = 2")
    client = project.server.client
    project.tasks.app.task(name="shop.of_tomorrow")(lambda: None)
    for raw in (b'{"unknown":"x"}', b'{"crashes":[]}', b'{"crashes":"x"}', b'{"retried":[]}', b'{"errors":{}}'):
        crash = project.tasks.crash.using(run_after=0.05).enqueue()
        unknown = project.tasks.app.tasks["shop.of_tomorrow"].using(run_after=0.05).enqueue()
        due = client.zscore(key("scheduled"), unknown.id)
        for result in (crash, unknown):
            client.hset(key("state"), result.id, raw)
        until(lambda crash=crash: place(project, crash) == "dead", what=repr(raw))  # type: ignore[misc]
        until(
            lambda unknown=unknown, due=due: client.zscore(key("scheduled"), unknown.id) not in (None, due),  # type: ignore[misc]
            what=repr(raw),
        )  # fmt: skip
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_pending_id_without_a_message_is_passed_over(project: Project) -> None:
    worker = project.worker()
    for n in range(50):
        project.server.client.rpush(key("pending"), f"{n:032x}")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert pending(project) == []
    assert worker.stop() == 0


@pytest.mark.parametrize("how", ["seconds", "timedelta", "moment"])
def test_what_has_not_started_by_its_expiry_is_dropped_with_a_reason(project: Project, how: str) -> None:
    given: Any = {"seconds": 0.05, "timedelta": timedelta(seconds=0.05),
                  "moment": datetime.now(UTC) + timedelta(seconds=0.05)}[how]  # fmt: skip
    result = project.tasks.add.using(expires=given).enqueue(1)
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 0.1)
    worker = project.worker()
    until(lambda: place(project, result) == "finished")
    result.refresh()
    assert (result.status, result.attempts) == ("FAILED", 0)
    assert result.errors[-1].exception_class_path == "prefork.Expired"
    assert project.server.client.hlen(key("m")) == 0
    assert project.tasks.add.using(expires=60.0).enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_what_is_cancelled_while_pending_never_runs(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    first = project.tasks.hold.enqueue(0)
    until(lambda: project.lines("started"))
    results = [project.tasks.nap.enqueue(n, 0) for n in range(1, 10)]
    ranked = project.tasks.nap.using(priority=9).enqueue(10, 0)
    assert [result.cancel() for result in results[::2]] == [True] * 5
    assert ranked.cancel()
    assert place(project, first) == "active"
    assert not first.cancel()
    project.let_go()
    assert [result.wait(timeout=60) for result in results[1::2]] == [2, 4, 6, 8]
    for result in results[::2]:
        result.refresh()
        assert result.status == "FAILED"
        assert result.errors[-1].exception_class_path == "prefork.Cancelled"
    assert set(counts(project, "ended")) == {"0", "2", "4", "6", "8"}
    assert worker.stop() == 0


def test_what_is_cancelled_while_scheduled_never_runs(project: Project) -> None:
    worker = project.worker()
    delayed = project.tasks.nap.using(run_after=60).enqueue(1, 0)
    retried = project.tasks.delay_that_fails.enqueue()
    assert delayed.cancel()
    until(lambda: place(project, retried) == "scheduled")
    assert retried.cancel()
    later = project.tasks.nap.using(run_after=0.1).enqueue(2, 0)
    assert later.wait(timeout=60) == 2
    assert counts(project, "ended") == {"2": 1}
    assert project.server.client.hlen(key("m")) == 0
    assert worker.stop() == 0


def test_an_outcome_that_is_refused_in_one_queue_holds_up_no_other(project: Project) -> None:
    project.server.client.set("prefork:{mail}:dead", "spoiled")
    worker = project.worker("queues = mail, default")
    failed = project.tasks.die.using(queue_name="mail").enqueue()
    worker.wait_for("does not take outcomes of queue mail")
    results = project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(50))
    assert [result.wait(timeout=60) for result in results] == [*range(2, 52)]
    assert project.server.client.hexists("prefork:{mail}:m", failed.id)
    project.server.client.delete("prefork:{mail}:dead")
    until(lambda: project.server.client.zcard("prefork:{mail}:dead") == 1)
    again = project.tasks.add.using(queue_name="mail").enqueue(1)
    assert again.wait(timeout=60) == 3
    assert worker.stop() == 0


def test_dead_letters_are_bounded(project: Project) -> None:
    worker = project.worker("dead_max = 5")
    results = [project.tasks.die.enqueue() for _ in range(12)]
    until(lambda: len(project.lines("die")) == 12)
    until(lambda: all(place(project, result) in ("dead", "finished") for result in results))
    assert project.server.client.zcard(key("dead")) == 5
    assert project.server.client.hlen(key("m")) == 5
    assert project.server.client.hlen(key("state")) == 5
    assert worker.stop() == 0
