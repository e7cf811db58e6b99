"""What the master is told of an error, whatever the error is."""

from __future__ import annotations

import logging
from typing import Any

import orjson
import pytest

from prefork import Dead, Prefork, Retry
from prefork.task import Task
from prefork.worker.arguments import decode
from prefork.worker.failure import clean, told, verdict

app = Prefork("failures", broker="redis://nowhere")


def fails() -> None:
    """Never called."""


def a_task(name: str, **options: Any) -> Task[..., Any]:
    task: Task[..., Any] = app.task(name=name, **options)(fails)
    return task


def of(task: Task[..., Any], error: BaseException, retried: int = 0) -> dict[str, Any]:
    said: dict[str, Any] = orjson.loads(verdict(task, retried, error))
    del said["error"]
    return said


def test_an_error_is_tried_again_after_the_delay_of_its_task() -> None:
    assert of(a_task("delayed", retry_delay=7), ValueError()) == {"delay_s": 7}
    task = a_task("growing", retry_delay=lambda retried: 3 + retried)
    assert [of(task, ValueError(), retried)["delay_s"] for retried in range(3)] == [3, 4, 5]


def test_what_a_task_asks_for_holds() -> None:
    task = a_task("asking", retry_delay=1)
    assert of(task, Retry(delay=9, counted=False)) == {"delay_s": 9, "counted": False, "asked": True}
    assert of(task, Retry()) == {"delay_s": 1, "counted": True, "asked": True}
    assert of(task, Dead("no")) == {"dead": True}


def test_only_what_a_task_names_is_tried_again() -> None:
    assert of(a_task("named", retry_on=[OSError]), ValueError()) == {"dead": True}
    assert of(a_task("but_named", retry_on=[OSError], retry_delay=1), ConnectionError()) == {"delay_s": 1}
    assert of(a_task("barred", dont_retry_on=[OSError]), ConnectionError()) == {"dead": True}


def test_a_delay_that_fails_is_said_and_the_default_holds(caplog: pytest.LogCaptureFixture) -> None:
    task = a_task("odd", retry_delay=lambda retried: 1 / 0)
    with caplog.at_level(logging.WARNING, "prefork"):
        assert of(task, ValueError())["delay_s"] > 0
    assert "retry_delay of odd failed (ZeroDivisionError" in caplog.text


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [Unspeakable(), ValueError("\ud800" * 9000), BaseException(), SystemExit(3)])
def test_there_is_a_text_for_every_error(error: BaseException) -> None:
    said = told(error)
    assert said["class"].endswith(type(error).__qualname__)
    orjson.dumps(said)
    assert len(said["message"]) < 2100


def test_a_traceback_begins_with_the_users_code() -> None:
    with pytest.raises(ValueError, match="zero-length") as raised:
        decode(b"")
    error = raised.value
    assert "in decode" in told(error)["traceback"]
    assert error.__traceback__ is not None
    assert "in decode" not in told(error.with_traceback(error.__traceback__.tb_next))["traceback"]


@pytest.mark.parametrize("size", [0, 99, 100, 101, 5000])
def test_the_middle_of_a_long_text_is_left_out(size: int) -> None:
    text = "".join(chr(33 + n % 90) for n in range(size))
    short = clean(text, 100)
    if size <= 100:
        assert short == text
    else:
        assert short.startswith(text[:33])
        assert short.endswith(text[-67:])
        assert f"{size - 100:,} characters left out" in short
