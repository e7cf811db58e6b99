from __future__ import annotations

import enum
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import InvalidOption, Prefork, PreforkError, options
from prefork.options import TEN_YEARS_S, TaskOptions
from prefork.values import queue_name as name_in_conf


def job(a: int = 0) -> int:
    return a


def app() -> Prefork:
    return Prefork("shop")


NO_TIMES = [-1, float("nan"), float("inf"), 1e12, "5", [], True, timedelta(-1), timedelta(days=40000)]
WRONG: list[tuple[str, Any]] = [
    *[
        ("queue_name", it)
        for it in ("", "a b", "a{b}", "a:b", "a,b", "x" * 101, 3, b"mail", None, "a\n", "a\x00", "\ud800")
    ],
    *[("priority", it) for it in (101, -101, 1.5, "5", None, True, 2**70)],
    *[("max_retries", it) for it in (-1, 1001, 1.0, "5", None, True, 2**70)],
    *[("retry_delay", it) for it in (*NO_TIMES, "soon")],
    *[("retry_on", it) for it in (None, OSError("an instance"), "OSError", [OSError, 3], int, ("OSError",))],
    *[("dont_retry_on", it) for it in (None, OSError("an instance"), "OSError", [OSError, 3], int, ("OSError",))],
    *[("timeout", it) for it in (0, 0.0001, *NO_TIMES)],
    *[("soft_timeout", it) for it in (0, 0.0001, *NO_TIMES)],
    *[("expires", it) for it in (0, *NO_TIMES, datetime(2030, 1, 1, tzinfo=UTC))],
    *[("result_ttl", it) for it in (None, *NO_TIMES)],
    *[("name", it) for it in ("", "a b", "x" * 201, 3, b"send", "a\nb", "a\ud800", "a\x00")],
]


@pytest.mark.parametrize(("option", "value"), WRONG, ids=lambda it: repr(it)[:40])
def test_a_task_option_that_makes_no_sense_is_refused_by_name_and_value(option: str, value: Any) -> None:
    it = app()
    with pytest.raises(InvalidOption) as caught:
        it.task(**{option: value})(job)
    said = str(caught.value)
    culprit = value[-1] if isinstance(value, list | tuple) and value else value
    assert re.match(rf"{option}\b", said)
    assert repr(culprit) in said
    assert len(said.splitlines()) == 1
    assert not it.tasks
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("option", "value"), [it for it in WRONG if it[0] in
    ("queue_name", "priority", "max_retries", "timeout", "soft_timeout", "expires") and it[1] is not None
    and not isinstance(it[1], datetime)], ids=lambda it: repr(it)[:40])  # fmt: skip
def test_using_refuses_the_same_values(option: str, value: Any) -> None:
    task = app().task(job)
    with pytest.raises(InvalidOption, match=rf"^{option}=") as caught:
        task.using(**{option: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-1, -0.5, timedelta(-1), float("nan"), 1e12, "5", [], True, datetime(2030, 1, 1)])
def test_run_after_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^run_after="):
        app().task(job).using(run_after=value)


@pytest.mark.parametrize("option", ["run_after", "expires"])
def test_a_naive_datetime_is_refused_with_the_remedy(option: str) -> None:
    with pytest.raises(InvalidOption, match="the datetime is naive; give it a timezone, or pass a timedelta"):
        app().task(job).using(**{option: datetime(2030, 1, 1)})  # type: ignore[arg-type]


def test_an_option_that_does_not_exist_is_refused_by_its_name() -> None:
    with pytest.raises((PreforkError, TypeError), match="max_retry") as caught:
        app().task(max_retry=5)(job)  # type: ignore[call-overload]
    assert "_register" not in str(caught.value)


@pytest.mark.parametrize(("hard", "soft"), [(5, 5), (5, 6), (timedelta(seconds=1), 2)])
def test_a_soft_timeout_that_could_never_come_before_the_hard_one_is_refused(hard: Any, soft: Any) -> None:
    with pytest.raises(InvalidOption, match=r"soft_timeout=\d must be shorter than timeout=\d"):
        app().task(timeout=hard, soft_timeout=soft)(job)
    with pytest.raises(InvalidOption, match=r"soft_timeout=\d must be shorter than timeout=\d"):
        app().task(timeout=hard)(job).using(soft_timeout=soft)
    with pytest.raises(InvalidOption, match=r"soft_timeout=\d must be shorter than timeout=\d"):
        app().task(soft_timeout=soft)(job).using(timeout=hard)


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert app().task(job).options == TaskOptions() == TaskOptions(
        queue_name="default", priority=0, max_retries=25, retry_delay=None, retry_on=(Exception,), dont_retry_on=(),
        timeout_s=None, soft_timeout_s=None, expires_s=None, result_ttl_s=86400.0, takes_context=False,
    )  # fmt: skip


def test_every_option_is_kept_in_seconds_and_tuples() -> None:
    task = app().task(
        name="other.name", queue_name="mail", priority=-100, max_retries=0, retry_delay=timedelta(minutes=1),
        retry_on=OSError, dont_retry_on=[KeyError, IndexError], timeout=timedelta(hours=1), soft_timeout=3,
        expires=timedelta(days=1), result_ttl=0, takes_context=True,
    )(job)  # type: ignore[call-overload]  # fmt: skip
    assert task.name == "other.name"
    assert task.options == TaskOptions(
        queue_name="mail", priority=-100, max_retries=0, retry_delay=60.0, retry_on=(OSError,),
        dont_retry_on=(KeyError, IndexError), timeout_s=3600.0, soft_timeout_s=3.0, expires_s=86400.0, result_ttl_s=0.0,
        takes_context=True,
    )  # fmt: skip


def test_a_function_may_say_the_delay_of_a_retry() -> None:
    assert app().task(retry_delay=math.factorial)(job).options.retry_delay is math.factorial


@given(st.floats(0.001, TEN_YEARS_S) | st.integers(1, int(TEN_YEARS_S)))
def test_seconds_and_timedeltas_are_the_same(value: float) -> None:
    assert options.seconds("timeout", value) == float(value)
    assert math.isclose(options.seconds("timeout", timedelta(seconds=value)), value, abs_tol=1e-6, rel_tol=1e-6)


@given(st.datetimes(timezones=st.timezones() | st.just(UTC)))
def test_an_aware_datetime_is_a_moment_in_ms_whatever_its_timezone(at: datetime) -> None:
    assert options.moment("run_after", at, least=0) == (None, max(0, round(at.timestamp() * 1000)))


def test_the_offset_of_a_timezone_counts() -> None:
    there = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert options.moment("run_after", there, least=0)[1] == datetime(2030, 1, 1, 6, 30, tzinfo=UTC).timestamp() * 1000


@given(st.text(max_size=5) | st.sampled_from(["a\u200bb", "a\u2028", "\x7f", "mail", "ü", "a-b.c"]))
def test_code_and_configuration_agree_on_what_a_queue_may_be_called(name: str) -> None:
    def accepts(check: Any, error: type[Exception]) -> bool:
        try:
            return bool(check(name) == name)
        except error:
            return False

    assert accepts(options.queue_name, InvalidOption) == accepts(name_in_conf, ValueError)


@pytest.mark.parametrize("prefix", ["", "a b", "a{b}", "x" * 101, "\ud800", "a:{b"])
def test_a_prefix_that_would_spoil_the_names_of_keys_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidOption, match=r"^prefix="):
        Prefork("shop", prefix=prefix)


@pytest.mark.parametrize("limit_s", [0, -1, float("nan"), "5", None, True])
def test_a_limit_that_makes_no_sense_is_refused(limit_s: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^limit_s="):
        Prefork("shop", limit_s=limit_s)


class Queues(str, enum.Enum):  # noqa: UP042  # the older form, which is still about
    MAIL = "mail"


class Ranks(enum.IntEnum):
    HIGH = 10


def test_members_of_enums_are_what_they_stand_for() -> None:
    """An f-string makes `Queues.MAIL` of the first: keys of another queue, to which no worker listens."""
    assert f"{options.queue_name(Queues.MAIL)}" == "mail"
    assert f"{options.prefix(Queues.MAIL)}" == "mail"
    task = app().task(queue_name=Queues.MAIL, priority=Ranks.HIGH, max_retries=Ranks.HIGH)(job)
    assert [type(it) for it in (task.queue_name, task.priority, task.options.max_retries)] == [str, int, int]
    assert type(task.using(queue_name=Queues.MAIL).queue_name) is str
