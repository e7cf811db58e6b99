"""What is said of trouble with the broker."""

from __future__ import annotations

import time

import pytest

from prefork.worker.outage import LASTING_S, Outage


class Clock:
    """Stands for the monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_it_is_said_once_when_it_begins_and_once_when_all_of_it_is_over(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = Outage()
    it.begins("connection", "closed")
    it.begins("outcomes of queue q", "refused")
    assert said(caplog) == ["closed; trying again, what runs goes on"]
    clock.s += 7
    it.ends("connection")
    assert said(caplog) == []
    it.ends("outcomes of queue q")
    it.ends("outcomes of queue q")
    assert said(caplog) == ["the broker is back after 7.0 s"]


def test_what_is_wrong_with_a_queue_for_long_does_not_hide_what_begins_later(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    it = Outage()
    it.begins("outcomes of queue mail", "WRONGTYPE")
    clock.s += LASTING_S + 1
    it.begins("outcomes of queue mail", "WRONGTYPE")
    assert len(said(caplog)) == 1
    it.begins("connection", "closed")
    clock.s += 5
    it.begins("outcomes of queue mail", "WRONGTYPE")
    it.ends("connection")
    assert said(caplog) == ["closed; trying again, what runs goes on", "the broker is back after 5.0 s"]
    it.ends("outcomes of queue mail")
    assert said(caplog) == ["the trouble with outcomes of queue mail is over"]


def test_a_connection_that_is_away_for_long_speaks_for_all(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    it = Outage()
    it.begins("connection", "closed")
    clock.s += 10 * LASTING_S
    it.begins("second connection", "closed too")
    it.begins("lease q", "refused")
    assert len(said(caplog)) == 1
    for part in ("connection", "second connection", "lease q"):
        it.ends(part)
    assert said(caplog) == [f"the broker is back after {10 * LASTING_S:.1f} s"]
