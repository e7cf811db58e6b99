"""What a producer does wrong is refused at its own line: what, and the remedy; and nothing is sent."""

from __future__ import annotations

import asyncio
import decimal
import math
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from prefork import InvalidArguments, InvalidOption, NotJSON, PayloadTooLarge, Prefork, PreforkError
from tests.conftest import Project
from tests.process.scene import place

SELF: list[Any] = []
SELF.append(SELF)
DEEP: list[Any] = []
for _ in range(10_000):
    DEEP = [DEEP]

NOT_JSON = {
    "an object": (object(), "argument a is an object"),
    "a set": ({1}, "argument a is a set"),
    "bytes": (b"x", "argument a is a bytes"),
    "a complex": (1j, "argument a is a complex"),
    "a decimal": (decimal.Decimal(1), "argument a is a decimal.Decimal"),
    "a timedelta": (timedelta(1), "argument a is a datetime.timedelta"),
    "a function": (len, "argument a is a builtin_function_or_method"),
    "a class": (int, "argument a is a type"),
    "a generator": ((n for n in ()), "argument a is a generator"),
    "an exception": (ValueError("x"), "argument a is a ValueError"),
    "nan": (math.nan, "argument a is nan, a float that JSON has no form for"),
    "infinity": (math.inf, "argument a is inf, a float that JSON has no form for"),
    "minus infinity": (-math.inf, "argument a is -inf, a float that JSON has no form for"),
    "nan within": ({"rows": [1, math.nan]}, "argument a['rows'][1] is nan"),
    "nan beside None": ([None, math.nan], "argument a[1] is nan"),
    "a set within": ([1, {"x": {2}}], "argument a[1]['x'] is a set"),
    "a huge integer": (1 << 64, "argument a is an int (Integer exceeds 64-bit range)"),
    "a huge negative integer": (-(1 << 63) - 1, "argument a is an int (Integer exceeds 64-bit range)"),
    "an integer of 5,000 digits": (10**5000, "argument a is an int (Integer exceeds 64-bit range)"),
    "a key that is a number": ({1: 2}, "argument a is a dict with the int 1 as a key"),
    "a key that is a tuple": ({(1, 2): 3}, "argument a is a dict with the tuple (1, 2) as a key"),
    "a lone surrogate": ("\ud800", "argument a is a str"),
    "a lone surrogate as a key": ({"\ud800": 1}, "argument a is a dict with the str '\\ud800' as a key"),
    "what holds itself": (SELF, "nested too deeply"),
    "10,000 deep": (DEEP, "nested too deeply"),
}

OPTIONS = {
    "priority above": ({"priority": 101}, "priority=101: a priority is an integer from -100 to 100"),
    "priority below": ({"priority": -101}, "priority=-101: a priority is an integer from -100 to 100"),
    "priority a float": ({"priority": 1.5}, "priority=1.5: a priority is an integer from -100 to 100"),
    "priority a word": ({"priority": "high"}, "priority='high': a priority is an integer from -100 to 100"),
    "priority a bool": ({"priority": True}, "priority=True: a priority is an integer from -100 to 100"),
    "empty queue": ({"queue_name": ""}, "queue_name='': a queue's name has 1 to 100 characters"),
    "queue with a space": ({"queue_name": "a b"}, "queue_name='a b': a queue's name has 1 to 100 characters"),
    "queue with a brace": ({"queue_name": "{a}"}, "queue_name='{a}': a queue's name has 1 to 100 characters"),
    "queue too long": ({"queue_name": "q" * 101}, "a queue's name has 1 to 100 characters"),
    "queue a number": ({"queue_name": 7}, "queue_name=7: a queue's name has 1 to 100 characters"),
    "queue a surrogate": ({"queue_name": "\ud800"}, "queue_name='\\ud800': a queue's name has 1 to 100 characters"),
    "naive run_after": ({"run_after": datetime(2030, 1, 1)}, "the datetime is naive; give it a timezone"),
    "naive expires": ({"expires": datetime(2030, 1, 1)}, "the datetime is naive; give it a timezone"),
    "run_after negative": ({"run_after": -1}, "run_after=-1: give seconds or a timedelta, from 0 s to 10 years"),
    "run_after nan": ({"run_after": math.nan}, "run_after=nan: give seconds or a timedelta"),
    "run_after for ever": ({"run_after": math.inf}, "run_after=inf: give seconds or a timedelta"),
    "run_after a word": ({"run_after": "tomorrow"}, "run_after='tomorrow': give seconds or a timedelta"),
    "run_after huge": ({"run_after": 10**400}, "give seconds or a timedelta"),
    "expires at once": ({"expires": 0}, "expires=0: give seconds or a timedelta, from 0.001 s to 10 years"),
    "max_retries negative": ({"max_retries": -1}, "max_retries=-1: give an integer from 0 to 1000"),
    "max_retries huge": ({"max_retries": 10**30}, "give an integer from 0 to 1000"),
    "timeout zero": ({"timeout": 0}, "timeout=0: give seconds or a timedelta"),
    "soft_timeout too long": ({"timeout": 5, "soft_timeout": 5}, "soft_timeout=5 must be shorter than timeout=5"),
    "misspelt": ({"timeuot": 3}, "timeuot= is no option of using; did you mean timeout=?"),
    "of a task": ({"retry_on": ValueError}, "retry_on= is no option of using; there are queue_name, priority, "),
    "unlike any": ({"zzz": 3}, "zzz= is no option of using; there are queue_name, priority, "),
}

ARGUMENTS = {
    "missing": ((), {}, "missing a required argument: 'a'"),
    "too many": ((1, 2, 3), {}, "too many positional arguments"),
    "unknown keyword": ((1,), {"c": 3}, "got an unexpected keyword argument 'c'"),
    "twice": ((1,), {"a": 3}, "multiple values for argument 'a'"),
}


@pytest.fixture
def quiet(project: Project) -> Iterator[Project]:
    """A project whose broker must stay empty."""
    yield project
    assert project.server.client.keys("*") == []


def refused(error: type[PreforkError], task: Any, *args: Any, **kwargs: Any) -> str:
    """The one line that each way to send says."""
    said = []
    for send in (task.enqueue, task.s, lambda *a, **k: asyncio.run(task.aenqueue(*a, **k)),
                 lambda *a, **k: task.app.enqueue_many(task.s(*a, **k) for _ in range(2))):  # fmt: skip
        with pytest.raises(error) as caught:
            send(*args, **kwargs)
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert said[0].isprintable()
    assert len(said[0]) < 1000
    return said[0]


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_not_json(quiet: Project, name: str) -> None:
    value, part = NOT_JSON[name]
    line = refused(NotJSON, quiet.tasks.add, value)
    assert line.startswith(f"{quiet.tasks.add.name}: argument a")
    assert part in line
    assert "; send JSON: str, int (64 bit), float, bool, None, list" in line


def test_what_is_too_large(quiet: Project) -> None:
    line = refused(PayloadTooLarge, quiet.tasks.add, "x" * (1 << 20))
    assert line == (
        f"{quiet.tasks.add.name}: the arguments take 1,048,585 bytes, the limit is 1,048,576; "
        f"store the data elsewhere and send where it is"
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_makes_no_sense(quiet: Project, name: str) -> None:
    options, part = OPTIONS[name]
    with pytest.raises(InvalidOption) as caught:
        quiet.tasks.add.using(**options)
    line = str(caught.value)
    assert part in line
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_fit(quiet: Project, name: str) -> None:
    args, kwargs, part = ARGUMENTS[name]
    line = refused(InvalidArguments, quiet.tasks.add, *args, **kwargs)
    assert line.startswith(f"{quiet.tasks.add.name}(a: ")
    assert part in line


@pytest.mark.parametrize("given", [5, "add", [5], None], ids=repr)
def test_what_is_no_invocation(quiet: Project, given: Any) -> None:
    for many in ([given], given):
        with pytest.raises((InvalidArguments, TypeError)) as caught:
            quiet.tasks.app.enqueue_many(many)
        assert len(str(caught.value).splitlines()) == 1


def test_no_broker_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    task = Prefork("shop").task(name="t")(len)
    with pytest.raises(InvalidOption, match="app shop has no broker: pass broker= to Prefork, or set PREFORK_BROKER"):
        task.enqueue([])


@pytest.mark.parametrize("broker", [5, b"redis://localhost", ["redis://localhost"]], ids=repr)
def test_a_broker_that_is_no_text(broker: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^broker=.*: give a URL, such as redis://localhost:6379/0"):
        Prefork("shop", broker=broker)


# -- what is right, be it strange -----------------------------------------------------------------------------------

PAST = {
    "a second ago": lambda: datetime.now(UTC) - timedelta(seconds=1),
    "in 1971": lambda: datetime(1971, 1, 1, tzinfo=UTC),
    "in the year 1": lambda: datetime.min.replace(tzinfo=UTC),
    "in the year 1, where it is early": lambda: datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    "now": lambda: 0,
}


def test_a_run_after_that_has_passed_runs_at_once(project: Project) -> None:
    add = project.tasks.add
    results = [add.using(run_after=when()).enqueue(n) for n, when in enumerate(PAST.values())]
    far = add.using(run_after=datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))).enqueue(1)
    project.worker("", "--burst", wait=False).wait()
    assert [result.wait(timeout=1) for result in results] == [n + 2 for n in range(len(PAST))]
    assert place(project, far) == "scheduled"


def test_values_that_json_carries_in_its_own_way(project: Project) -> None:
    project.add("@app.task\ndef echo(value): return value")
    at, id = datetime(2030, 1, 1, tzinfo=UTC), uuid.uuid4()
    values = {
        "2030-01-01T00:00:00+00:00": at, str(id): id, (1 << 64) - 1: (1 << 64) - 1, -(1 << 63): -(1 << 63),
        "\U0001f600": "\U0001f600", "\x00": "\x00",
    }  # fmt: skip
    results = [project.tasks.echo.enqueue(value) for value in values.values()]
    project.worker("", "--burst", wait=False).wait()
    assert [result.wait(timeout=1) for result in results] == list(values)
