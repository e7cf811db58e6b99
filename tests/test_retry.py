from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import PreforkError, Retry, default_retry_delay
from prefork.retry import UNKNOWN_TASK_DELAYS_S, retry_delay_s, unknown_task_delay_s


@given(st.integers(0, 1000), st.integers())
def test_the_default_delay_is_sidekiqs_formula(retried: int, seed: int) -> None:
    random.seed(seed)
    delay_s = default_retry_delay(retried)
    random.seed(seed)
    assert delay_s == retried**4 + 15 + random.randint(0, 29) * (retried + 1)


def test_the_default_delay_spreads_over_its_whole_range() -> None:
    assert {default_retry_delay(0) for _ in range(2000)} == {15.0 + n for n in range(30)}
    assert {default_retry_delay(2) for _ in range(2000)} == {31.0 + 3 * n for n in range(30)}


def test_all_the_default_retries_together_take_about_three_weeks() -> None:
    days = sum(n**4 + 15 + 14.5 * (n + 1) for n in range(25)) / 86400
    assert 20 < days < 22


@pytest.mark.parametrize("policy", [0, 7, 2.5])
def test_a_policy_of_seconds_is_the_same_each_time(policy: float) -> None:
    assert [retry_delay_s(policy, n) for n in range(3)] == [policy] * 3


def test_a_policy_that_is_a_function_gets_the_retry_count() -> None:
    assert [retry_delay_s(lambda retried: 2**retried, n) for n in range(4)] == [1, 2, 4, 8]


def test_no_policy_is_the_default() -> None:
    assert 15 <= retry_delay_s(None, 0) <= 44


@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), 4e8, None, "soon", [], object()])
def test_a_function_that_gives_no_sensible_number_of_seconds_is_an_error(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        retry_delay_s(lambda _: value, 3)


def test_a_senseless_delay_is_told_with_its_value_and_the_retry() -> None:
    with pytest.raises(ValueError, match=r"retry_delay gave -2\.0 seconds for retry 4; it must be 0 to 10 years"):
        retry_delay_s(lambda _: -2, 3)


def test_an_error_of_the_function_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        retry_delay_s(lambda retried: 1 / retried, 0)


def test_a_message_of_an_unknown_task_is_tried_again_for_more_than_an_hour_and_then_no_more() -> None:
    delays = [unknown_task_delay_s(n) for n in range(len(UNKNOWN_TASK_DELAYS_S))]
    assert delays == sorted(UNKNOWN_TASK_DELAYS_S)
    assert sum(UNKNOWN_TASK_DELAYS_S) > 3600
    assert unknown_task_delay_s(len(delays)) is None
    assert unknown_task_delay_s(10**6) is None


# -- what a task raises -----------------------------------------------------------------------------------------------


def test_retry_says_when_and_at_whose_cost() -> None:
    it = Retry("the shop is closed", delay=30, counted=False)
    assert (it.reason, it.delay_s, it.counted, str(it)) == ("the shop is closed", 30, False, "the shop is closed")
    it = Retry()
    assert (it.reason, it.delay_s, it.counted, str(it)) == ("", None, True, "the task asked for another run")


def test_a_timedelta_is_as_good_as_seconds() -> None:
    assert Retry(delay=timedelta(minutes=1)).delay_s == 60


@pytest.mark.parametrize("delay", [float("nan"), float("inf"), 1e300, "soon", [], timedelta(-1)], ids=repr)
def test_a_delay_that_makes_no_sense_is_refused_where_it_is_given(delay: Any) -> None:
    with pytest.raises(PreforkError, match="delay="):
        Retry(delay=delay)


@pytest.mark.parametrize("counted", ["no", None, 1], ids=repr)
def test_counted_is_a_yes_or_a_no(counted: Any) -> None:
    with pytest.raises(PreforkError, match="counted="):
        Retry(counted=counted)
