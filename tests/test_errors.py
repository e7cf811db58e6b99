from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import prefork
from prefork import errors
from prefork.errors import Cancelled, ConfigError, Dead, PreforkError, Retry, SoftTimeout, TaskFailed

ALL = [it for _, it in inspect.getmembers(errors, inspect.isclass) if it.__module__ == errors.__name__]
SAMPLES: list[BaseException] = [
    ConfigError("shop.conf", 3, "unknown key 'concurency'; did you mean 'concurrency'?"),
    ConfigError("--lease", None, "must be a time"),
    Retry(),
    Retry("later", delay=3.5, counted=False),
    Dead(),
    Dead("no such customer"),
    TaskFailed("shop.send", "01ab", "builtins.OSError", "no route", "Traceback …\nOSError: no route\n"),
    TaskFailed("shop.send", "01ab", "prefork.Cancelled", "cancelled before it started", ""),
    *(kind("what is wrong; the remedy") for kind in ALL if kind not in (ConfigError, TaskFailed, Retry, Dead)),
]


def test_there_is_a_sample_of_each() -> None:
    assert {type(it) for it in SAMPLES} == set(ALL)


@pytest.mark.parametrize("kind", ALL)
def test_one_except_catches_them_all(kind: type[BaseException]) -> None:
    # These two have to get past `except Exception` in a task, so they can't be of them.
    assert issubclass(kind, PreforkError) is (kind not in (SoftTimeout, Cancelled))


def test_a_soft_timeout_is_not_caught_by_except_exception() -> None:
    assert issubclass(SoftTimeout, BaseException)
    assert not issubclass(SoftTimeout, Exception)


@pytest.mark.parametrize("kind", ALL)
def test_each_error_can_be_imported_from_the_top_and_says_what_it_means(kind: type[BaseException]) -> None:
    assert getattr(prefork, kind.__name__) is kind
    assert kind.__name__ in prefork.__all__
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidOption, ValueError),
        (errors.InvalidArguments, TypeError),
        (errors.NotJSON, TypeError),
        (errors.PayloadTooLarge, ValueError),
        (errors.BadMessage, ValueError),
        (errors.UnknownTask, LookupError),
        (errors.WaitTimeout, TimeoutError),
        (errors.ResultUnavailable, LookupError),
        (errors.EnqueueUncertain, errors.BrokerError),
    ],
)
def test_errors_are_also_what_python_programmers_expect(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", SAMPLES, ids=lambda it: type(it).__name__)
def test_an_error_survives_pickling(error: BaseException, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda it: type(it).__name__)
def test_an_error_can_be_copied(error: BaseException) -> None:
    assert str(copy.copy(error)) == str(error)


def test_an_error_of_the_configuration_names_file_and_line() -> None:
    assert str(ConfigError("shop.conf", 3, "what")) == "shop.conf:3: what"
    assert str(ConfigError("--lease", None, "what")) == "--lease: what"


def test_a_failed_task_tells_class_message_and_traceback() -> None:
    error = TaskFailed("shop.send", "01ab", "builtins.OSError", "no route", "Traceback …\nOSError: no route\n")
    assert str(error) == "shop.send 01ab failed: builtins.OSError: no route\nTraceback …\nOSError: no route"
    assert error.traceback.endswith("OSError: no route\n")


def test_without_a_traceback_it_is_one_line() -> None:
    error = TaskFailed("shop.send", "01ab", "prefork.Cancelled", "cancelled before it started", "")
    assert str(error) == "shop.send 01ab failed: prefork.Cancelled: cancelled before it started"
