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
    clock.told(server_ms)
    assert server_ms <= clock.now_ms() <= server_ms + 1000


def test_between_two_replies_it_goes_on_whatever_the_hosts_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock()
    ticks = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: ticks[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock.told(5_000_000)
    ticks[0] += 2.5
    assert clock.now_ms() == 5_002_500
    clock.told(4_000_000)  # the server's clock was set back
    assert clock.now_ms() == 4_000_000
