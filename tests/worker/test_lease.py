from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.broker.channel import Lost
from prefork.broker.keys import Keys
from prefork.broker.verbs import Call
from prefork.worker import lease
from prefork.worker.clock import ServerClock
from prefork.worker.lease import Lease, _start_of, has_died, identity
from prefork.worker.neighbours import ENDED
from prefork.worker.queues import Queue

NOW_MS = 1764000000000


# -- who lives --------------------------------------------------------------------------------------------------------


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process, which has said who it is."""
    code = "import sys; from prefork.worker.lease import identity; print(identity(1), flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_this_process_lives() -> None:
    assert not has_died(identity(1))
    assert identity(1) != identity(2)
    assert identity(1) == identity(1)


def test_another_process_lives_until_it_is_gone(other: subprocess.Popen[str]) -> None:
    name = said(other)
    assert name != identity(1)
    assert not has_died(name)
    other.kill()
    while os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    assert has_died(name)  # a zombie works no more
    other.wait()
    assert has_died(name)


def test_a_process_that_stands_still_lives(other: subprocess.Popen[str]) -> None:
    name = said(other)
    other.send_signal(signal.SIGSTOP)
    assert not has_died(name)
    other.send_signal(signal.SIGCONT)


def test_another_process_with_the_same_pid_is_not_that_one() -> None:
    host, machine, pid, start, serial = identity(1).rsplit(":", 4)
    assert has_died(f"{host}:{machine}:{pid}:{int(start) + 1}:{serial}")


def test_of_another_host_boot_or_container_nothing_is_known() -> None:
    host, machine, _, start, serial = identity(1).rsplit(":", 4)
    gone = 2**22 + 1
    assert has_died(f"{host}:{machine}:{gone}:{start}:{serial}")
    assert not has_died(f"{host}x:{machine}:{gone}:{start}:{serial}")
    assert not has_died(f"{host}:00000000:{gone}:{start}:{serial}")


def test_a_host_name_may_hold_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "fe80::1")
    host, machine, _, start, serial = identity(1).rsplit(":", 4)
    assert host == "fe80::1"
    assert not has_died(identity(1))
    assert has_died(f"{host}:{machine}:{2**22 + 1}:{start}:{serial}")


@given(st.text(max_size=60))
def test_of_a_name_that_is_none_nothing_is_known(name: str) -> None:
    assert not has_died(name)


@pytest.mark.parametrize("pid", ["-1", "0", "²", "", "x", "9" * 30, "1e3"])
@pytest.mark.parametrize("start", ["1", "", "dead", "x"])
def test_a_damaged_name_of_this_host_does_no_harm(pid: str, start: str) -> None:
    host, machine, *_ = identity(1).rsplit(":", 4)
    has_died(f"{host}:{machine}:{pid}:{start}:1")


# -- the lease --------------------------------------------------------------------------------------------------------


@dataclass
class Timer:
    delay_s: float
    callback: Any
    live: bool = True

    def cancel(self) -> None:
        self.live = False


@dataclass
class Loop:
    timers: list[Timer] = field(default_factory=list)

    def call_later(self, delay_s: float, callback: Any) -> Timer:
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def on_read(self, fd: int, callback: Any) -> None: ...

    def forget(self, fd: int) -> None: ...

    def live(self) -> list[Timer]:
        return [timer for timer in self.timers if timer.live]


class Wire:
    """Stands for a Channel: keeps what is sent until the test replies."""

    def __init__(self) -> None:
        self.ready = True
        self.due: list[tuple[Call, Any]] = []

    def send(self, call: Call, callback: Any, limit_s: float = 10) -> None:
        self.due.append((call, callback))

    def flush(self) -> None: ...

    def reply(self, reply: Any) -> Call:
        call, callback = self.due.pop(0)
        callback(reply)
        return call


@dataclass
class Claims:
    queues: list[Queue]
    told_due: list[tuple[str, int]] = field(default_factory=list)
    woken: list[str] = field(default_factory=list)
    open: bool = True
    kept: int = 0

    def keep_soon(self) -> None:
        self.kept += 1

    def due(self, queue: Queue, next_due_ms: int) -> None:
        self.told_due.append((queue.keys.queue, next_due_ms))

    def wake(self, queue: Queue) -> None:
        self.woken.append(queue.keys.queue)


class Held:
    """A lease on two queues, with what it needs and what it has said."""

    def __init__(self) -> None:
        self.loop, self.wire = Loop(), Wire()
        self.claims = Claims([Queue(Keys("p", "mail"), 1), Queue(Keys("p", "print"), 1)])
        self.fenced: list[str] = []
        self.held: list[bool] = []
        self.known = {"mail": 0, "print": 0}
        self.lease = Lease(
            self.loop, self.wire, self.claims, ServerClock(), 9.0, 10, self.fenced.append,  # type: ignore[arg-type]
            self.known.__getitem__,
        )  # fmt: skip

    def begin(self) -> None:
        self.lease.begin(lambda: self.held.append(True))

    def beat(
        self, *others: tuple[str | bytes, int], waiting: int = 0, next_due_ms: int = -1, holds: int = 0
    ) -> Call:  # fmt: skip
        """The broker replies to the oldest beat: these leases there are beside ours."""
        leases: list[Any] = [self.lease.worker.encode(), NOW_MS + 9000]
        for name, ends_ms in others:
            leases += [name.encode() if isinstance(name, str) else name, ends_ms]
        return self.wire.reply([NOW_MS, next_due_ms, waiting, holds, *leases])


@pytest.fixture
def it() -> Held:
    return Held()


def dead_name() -> str:
    host, machine, _, start, serial = identity(1).rsplit(":", 4)
    return f"{host}:{machine}:{2**22 + 1}:{start}:{serial}"


def test_a_lease_is_taken_on_each_queue_before_anything_is_claimed(it: Held) -> None:
    it.begin()
    assert [(call.verb, call.keys[0], call.arguments) for call, _ in it.wire.due] == [
        ("beat", "p:{mail}:leases", (it.lease.worker, 9000, "1")),
        ("beat", "p:{print}:leases", (it.lease.worker, 9000, "1")),
    ]
    it.beat()
    assert it.held == []
    it.beat()
    assert it.held == [True]
    assert not has_died(it.lease.worker)


def test_what_the_kernel_says_of_a_neighbours_end_holds_whatever_else_there_is_to_see(it: Held) -> None:
    it.begin()
    pid = os.getppid()  # a process that can be seen, as one that is being reaped can
    name = f"{identity(7).rsplit(':', 3)[0]}:{pid}:{_start_of(pid)}:7"
    it.beat((name, NOW_MS + 60_000))
    it.beat()
    it.lease.neighbours.abandon()
    it.lease.neighbours._watched[name] = ENDED
    it.lease._look_now()
    it.beat((name, NOW_MS + 60_000))
    assert [call.arguments[:2] for call, _ in it.wire.due if call.verb == "restore"] == [(name, "gone")]


def test_what_this_process_was_before_a_reload_is_given_up_at_once(it: Held, caplog: pytest.LogCaptureFixture) -> None:
    before = it.lease.worker
    it.lease.new_identity()
    it.begin()
    it.beat((before, NOW_MS + 60_000))
    it.beat()
    ((call, _),) = it.wire.due
    assert (call.verb, call.arguments[:2]) == ("restore", (before, "left"))
    it.wire.reply(2)
    assert "(this process was it): 2 messages back to queue mail" in caplog.text


def test_it_is_renewed_at_a_third_of_its_length(it: Held) -> None:
    it.begin()
    it.beat()
    it.beat()
    for _ in range(3):
        (timer,) = it.loop.live()
        assert timer.delay_s == pytest.approx(3.0)
        timer.live = False
        timer.callback()
        assert [call.arguments[2] for call, _ in it.wire.due] == ["0", "0"]
        it.beat()
        it.beat()
    assert it.held == [True]


def test_while_the_connection_is_down_it_tries_again_later(it: Held) -> None:
    it.begin()
    it.wire.due.clear()
    it.wire.ready = False
    (timer,) = it.loop.live()
    timer.live = False
    timer.callback()
    assert it.wire.due == []
    assert len(it.loop.live()) == 1


def test_each_beat_tells_what_waits_and_what_is_due(it: Held) -> None:
    it.begin()
    it.beat(waiting=3, next_due_ms=NOW_MS + 5)
    it.beat()
    assert it.claims.told_due == [("mail", NOW_MS + 5), ("print", -1)]
    assert it.claims.woken == ["mail"]


def test_what_the_broker_holds_for_this_worker_and_is_not_here_is_put_back(
    it: Held, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def beat(holds: int) -> float:
        """-> after how many seconds the next one comes"""
        it.beat(holds=holds)
        it.beat()
        timer = it.loop.live()[-1]
        it.loop.timers.clear()
        timer.callback()
        return timer.delay_s

    it.known["mail"] = 3
    it.begin()
    assert beat(3) == pytest.approx(3.0)
    assert beat(2) == pytest.approx(3.0)
    assert beat(5) == pytest.approx(0.5), "what is just being handed over is known at the next one"
    assert beat(3) == pytest.approx(3.0)
    assert it.claims.kept == 0
    beat(5)
    beat(4)
    assert it.claims.kept == 1
    assert "holds 4 messages of queue mail for this worker, of which 3 have come" in caplog.text
    beat(4)
    it.claims.open = False  # it is being put right already
    beat(4)
    it.claims.open = True
    it.claims.queues[0].unkept = True  # and is refused
    beat(4)
    beat(4)
    it.claims.queues[0].unkept = False
    beat(4)
    assert it.claims.kept == 1
    beat(4)
    assert it.claims.kept == 2


def test_a_worker_of_this_host_that_is_gone_is_taken_over_at_once(it: Held, caplog: pytest.LogCaptureFixture) -> None:
    it.begin()
    it.beat((dead_name(), NOW_MS + 8000), ("elsewhere:12:3:4:1", NOW_MS + 5))
    it.beat()
    ((call, _),) = it.wire.due
    assert (call.verb, call.keys[0], call.arguments) == (
        "restore",
        "p:{mail}:leases",
        (dead_name(), "gone", 10, "p:{mail}:done:", "p:{mail}:r:", "p:{mail}:stop:"),
    )
    it.wire.reply(4)
    assert it.claims.woken == ["mail"]
    assert f"took over from worker {dead_name()} (its process is gone): 4 messages back to queue mail" in caplog.text


def test_a_worker_elsewhere_is_taken_over_when_its_lease_has_ended(it: Held, caplog: pytest.LogCaptureFixture) -> None:
    it.begin()
    it.beat(("elsewhere:12:3:4:1", NOW_MS - 1))
    ((_, _), (call, _)) = it.wire.due
    assert call.arguments[:3] == ("elsewhere:12:3:4:1", "expired", 10)
    it.wire.due.reverse()
    it.wire.reply(-1)  # it has renewed its lease meanwhile
    assert it.claims.woken == []
    assert "took over" not in caplog.text


def test_a_takeover_that_is_on_its_way_is_not_begun_again(it: Held) -> None:
    it.begin()
    it.beat((dead_name(), NOW_MS + 8000))
    it.beat((dead_name(), NOW_MS + 8000))
    restores = [(call.keys[0], call.arguments[0]) for call, _ in it.wire.due]
    assert restores == [("p:{mail}:leases", dead_name()), ("p:{print}:leases", dead_name())]
    it.wire.due.clear()
    it.lease.renew()
    it.beat((dead_name(), NOW_MS + 8000))
    assert [call.verb for call, _ in it.wire.due] == ["beat"]


@pytest.mark.parametrize("reply", [Lost("gone"), hiredis.ReplyError("READONLY")], ids=repr)
def test_a_takeover_that_failed_is_tried_at_the_next_beat(it: Held, reply: Exception) -> None:
    it.begin()
    it.beat((dead_name(), NOW_MS + 8000))
    it.wire.due.reverse()
    it.wire.reply(reply)
    it.wire.due.clear()
    it.lease.renew()
    it.beat((dead_name(), NOW_MS + 8000))
    assert [call.verb for call, _ in it.wire.due] == ["beat", "restore"]


def test_a_name_that_is_no_text_does_no_harm(it: Held) -> None:
    it.begin()
    it.beat((b"\xff\xfe", NOW_MS + 8000))
    it.beat((b"\xff\xfe", NOW_MS - 8000))


def test_a_worker_whose_lease_is_gone_is_told_so_and_not_that_it_holds_it(it: Held) -> None:
    it.begin()
    it.beat()
    it.beat()
    it.held.clear()
    it.lease.renew(lambda: it.held.append(True))
    it.wire.reply(hiredis.ReplyError(f"FENCED the lease of {it.lease.worker} is gone"))
    it.beat()
    assert it.held == []
    assert len(it.fenced) == 1
    before = it.lease.worker
    it.lease.new_identity()
    assert it.lease.worker != before


@pytest.mark.parametrize("reply", [Lost("gone"), hiredis.ReplyError("LOADING")], ids=repr)
def test_a_beat_that_failed_does_not_count_as_held(it: Held, reply: Exception) -> None:
    it.begin()
    it.wire.reply(reply)
    it.beat()
    assert it.held == []
    assert it.fenced == []
    assert len(it.loop.live()) == 1  # the next one comes by itself


def test_after_the_end_it_renews_no_more(it: Held) -> None:
    it.begin()
    it.lease.stop()
    assert it.loop.live() == []
    it.lease.stop()
    assert lease.identity(1)
