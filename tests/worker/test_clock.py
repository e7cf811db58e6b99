from __future__ import annotations

import time

import pytest

from prefork.worker.clock import ServerClock


def test_before_the_server_has_said_anything_it_is_the_hosts_clock() -> None:
    assert ServerClock().now_ms() == pytest.approx(time.time() * 1000, abs=1000)


@pytest.mark.parametrize("off_ms", [-86_400_000, -1, 0, 3_600_000])
def test_it_is_the_time_that_the_server_has_told(off_ms: int) -> None:
    clock = ServerClock()
    server_ms = 1764000000000 + off_ms
    clock.told(server_ms, time.monotonic())
    assert server_ms <= clock.now_ms() <= server_ms + 1000


def test_a_reply_that_is_long_on_its_way_tells_no_more_than_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now_s = ServerClock(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    clock.told(5_000_000, 1000.0)
    for sent_s, late_s in [(0.0, 0.4), (0.4, 0.0), (0.2, 0.2)]:  # by the server, on the way there or back
        asked_s = now_s[0]
        now_s[0] += sent_s + late_s
        clock.told(round(5_000_000 + (asked_s + sent_s - 1000) * 1000), asked_s)
        assert clock.now_ms() == pytest.approx(5_000_000 + (now_s[0] - 1000) * 1000, abs=1)
    asked_s = now_s[0]
    now_s[0] += 0.1
    clock.told(9_000_000, asked_s)  # it was set, and may have been 0.1 s ago
    assert clock.now_ms() == 9_000_000


def test_between_two_replies_it_goes_on_whatever_the_hosts_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock()
    ticks = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: ticks[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.told(5_000_000, 1000.0)
    ticks[0] += 2.5
    assert clock.now_ms() == 5_002_500
    clock.told(4_000_000, ticks[0])  # the server's clock was set back
    assert clock.now_ms() == 4_000_000
