"""What signals and operators ask for, and what of a worker hears of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from prefork.worker import commands
from prefork.worker.commands import MOST_CHILDREN, Commands

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Told:
    """Whatever is called here is noted down in `log`, with the name of this part."""

    def __init__(self, log: list[str], name: str, **values: Any) -> None:
        self._log, self._name = log, name
        self.__dict__.update(values)

    def __getattr__(self, verb: str) -> Callable[..., None]:
        if verb.startswith("_"):
            raise AttributeError(verb)
        return lambda *words: self._log.append(" ".join(map(str, (self._name, verb, *words))))


class Shutdown(Told):
    """Begins when it is told to, whatever way."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(log, "shutdown", begun=False)

    def drain(self, why: str) -> None:
        self.begun = True
        self._log.append(f"shutdown drain {why.split(';')[0]}")

    def interrupt(self) -> None:
        self._log.append("shutdown interrupt again" if self.begun else "shutdown interrupt")
        self.begun = True

    def now(self, why: str) -> None:
        self.begun = True
        self._log.append(f"shutdown now {why}")


class Worker:
    """The commands of a worker of four children, and what became of them."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.sent: list[tuple[Any, ...]] = []
        self.shutdown = Shutdown(self.did)
        self.pool = SimpleNamespace(size=4)
        self.claims = Told(self.did, "claims", paused=False, in_flight=False, next_serial=4096)
        link = SimpleNamespace(
            claims=self.claims, lease=SimpleNamespace(worker="w1"),
            channel=SimpleNamespace(send_words=lambda words, reply: self.sent.append(words)),
        )  # fmt: skip
        work = Told(self.did, "work", cancels=Told(self.did, "cancels"))
        report = Told(self.did, "report", describe=lambda: {"worker": "w1"}, summary=lambda: "4 children")
        self.commands = Commands(
            "p", None, self.pool, work, link, self.shutdown, report, Told(self.did, "notify"), None  # type: ignore[arg-type]
        )  # fmt: skip
        self.commands.reload = Told(self.did, "reload")  # type: ignore[assignment]

    def gets(self, *signals: signal.Signals) -> list[str]:
        """-> what was done about them"""
        del self.did[:]
        for number in signals:
            self.commands.by_signal()[number]()
        return list(self.did)


@pytest.fixture
def it(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(commands, "make_room", lambda size: "few descriptors" if size > 100 else "")
    return Worker()


# -- signals that end it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGTERM, "drain TERM"), (signal.SIGINT, "interrupt"), (signal.SIGQUIT, "now QUIT")],
)
def test_it_stops_as_it_is_told(it: Worker, number: signal.Signals, how: str) -> None:
    assert it.gets(number) == ["reload give_up", "notify stopping", f"shutdown {how}"]


def test_a_second_int_is_told_to_who_knows_that_it_is_the_second(it: Worker) -> None:
    assert it.gets(signal.SIGINT, signal.SIGINT)[-1] == "shutdown interrupt again"


# -- a new version ----------------------------------------------------------------------------------------------------


def test_a_new_version_is_tried_before_anything_stops(it: Worker) -> None:
    assert it.gets(signal.SIGHUP) == ["reload begin"]
    assert not it.commands.reloading
    del it.did[:]
    it.commands._become_new()
    assert it.did == ["notify reloading", "shutdown drain HUP"]
    assert it.commands.reloading


@pytest.mark.parametrize("number", STOPS)
def test_no_new_version_is_tried_by_a_worker_that_stops(it: Worker, number: signal.Signals) -> None:
    it.gets(number)
    assert it.gets(signal.SIGHUP) == []
    it.commands._become_new()  # that of a trial which was about to end
    assert it.did == []
    assert not it.commands.reloading


@pytest.mark.parametrize(
    ("number", "more"),
    [(signal.SIGTERM, ["shutdown drain TERM"]), (signal.SIGINT, []), (signal.SIGQUIT, ["shutdown now QUIT"])],
)
def test_a_worker_that_drains_for_its_new_version_can_be_told_to_end(
    it: Worker, number: signal.Signals, more: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its first INT too lets what runs finish, as it would if it came alone."""
    caplog.set_level("INFO")
    it.commands._become_new()
    assert it.gets(number) == ["reload give_up", "notify stopping", *more]
    assert not it.commands.reloading
    assert "in place of going on as the new version" in caplog.text
    assert it.gets(signal.SIGINT)[-1] == "shutdown interrupt again"


# -- size and pause ---------------------------------------------------------------------------------------------------


def test_it_gets_a_child_more_or_less(it: Worker) -> None:
    told = ["report entitle", "notify status 4 children"]
    assert it.gets(signal.SIGTTIN) == ["work resize 5", *told]
    assert it.gets(signal.SIGTTOU) == ["work resize 3", *told]


@pytest.mark.parametrize(("size", "number"), [(1, signal.SIGTTOU), (MOST_CHILDREN, signal.SIGTTIN)])
def test_it_keeps_a_child_and_has_not_too_many(it: Worker, size: int, number: signal.Signals) -> None:
    it.pool.size = size
    assert it.gets(number) == []
    it.pool.size = MOST_CHILDREN - 1
    assert it.gets(signal.SIGTTIN)[0] == f"work resize {MOST_CHILDREN}"


def test_a_worker_that_stops_keeps_its_size(it: Worker) -> None:
    it.gets(signal.SIGTERM)
    assert it.gets(signal.SIGTTIN, signal.SIGTTOU) == []


def test_children_for_whom_descriptors_are_few_are_warned_of(it: Worker, caplog: pytest.LogCaptureFixture) -> None:
    it.gets(signal.SIGTTIN)
    assert "few descriptors" not in caplog.text
    it.pool.size = 100
    it.gets(signal.SIGTTIN)
    assert "few descriptors" in caplog.text


def test_it_pauses_and_goes_on(it: Worker) -> None:
    """What `enqueue` may have handed over when it paused goes back, and it looks at all queues when it goes on."""
    assert it.gets(signal.SIGUSR2) == ["claims void", "notify status 4 children"]
    assert it.claims.paused
    assert it.gets(signal.SIGUSR2) == ["claims void", "claims wake_all", "notify status 4 children"]
    assert not it.claims.paused


def test_it_says_what_its_children_do(it: Worker) -> None:
    assert it.gets(signal.SIGUSR1) == ["report say"]


# -- what operators ask for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_flight", "serial"), [(False, 0), (True, 4096)])
def test_a_cancel_holds_for_what_a_claim_may_bring(it: Worker, in_flight: bool, serial: int) -> None:
    it.claims.in_flight = in_flight
    it.commands.requested("cancel 0123")
    assert it.did == [f"cancels cancel 0123 {serial}"]


def test_a_report_is_left_where_it_is_looked_for_and_does_not_stay(it: Worker) -> None:
    it.commands.requested("report")
    ((verb, key, told, unit, ttl_ms),) = it.sent
    assert (verb, key, unit, ttl_ms) == ("SET", "p:worker:w1", "PX", 10_000)
    assert orjson.loads(told) == {"worker": "w1"}


@pytest.mark.parametrize("request_", ["", "repor", "report now of a later version", "cancel", "shutdown"])
def test_what_is_not_known_is_passed_over(it: Worker, request_: str) -> None:
    it.commands.requested(request_)
    assert not [did for did in it.did if did != "cancels cancel  0"]
