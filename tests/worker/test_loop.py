from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork.worker.loop import Loop, Timer
from tests.conftest import SLACK_S


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop._selector.close()


@pytest.fixture
def pipes() -> Iterator[Callable[[], tuple[int, int]]]:
    opened: list[int] = []

    def pipe() -> tuple[int, int]:
        ends = os.pipe()
        opened.extend(ends)
        return ends

    yield pipe
    for fd in opened:
        try:
            os.close(fd)
        except OSError:
            continue


def run(loop: Loop, seconds: float = 5.0) -> None:
    """Run until somebody says stop; fail rather than hang."""
    late: list[bool] = []
    guard = loop.call_later(seconds, lambda: (late.append(True), loop.stop())[1])
    loop.run()
    guard.cancel()
    assert not late, "nobody said stop"


# -- timers -----------------------------------------------------------------------------------------------------------


def test_timers_are_called_in_the_order_in_which_they_are_due(loop: Loop) -> None:
    called: list[int] = []
    for fiftieths in (30, 10, 20, 0, 10):
        loop.call_later(fiftieths / 50, lambda fiftieths=fiftieths: called.append(fiftieths))  # type: ignore[misc]
    loop.call_later(0.8, loop.stop)
    run(loop)
    assert called == [0, 10, 10, 20, 30]


def test_timers_that_are_due_together_are_called_in_the_order_in_which_they_were_set(loop: Loop) -> None:
    called: list[int] = []
    for n in range(100):
        loop.call_later(-1, lambda n=n: called.append(n))  # type: ignore[misc]
    loop.call_later(0, loop.stop)
    run(loop)
    assert called == list(range(100))


def test_a_timer_is_never_early(loop: Loop) -> None:
    off: list[float] = []
    for delay_s in (0.001, 0.01, 0.05):
        due_s = time.monotonic() + delay_s
        loop.call_later(delay_s, lambda due_s=due_s: off.append(time.monotonic() - due_s))  # type: ignore[misc]
    loop.call_later(0.06, loop.stop)
    run(loop)
    assert all(-0.002 <= it < SLACK_S for it in off)


def test_a_cancelled_timer_is_not_called_also_by_one_that_is_due_with_it(loop: Loop) -> None:
    called: list[str] = []
    second: list[Timer] = []
    loop.call_later(0.001, lambda: (called.append("first"), second[0].cancel())[0])
    second.append(loop.call_later(0.001, lambda: called.append("second")))
    before = loop.call_later(0.0, lambda: called.append("never"))
    before.cancel()
    before.cancel()
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert called == ["first"]


def test_a_timer_may_set_another(loop: Loop) -> None:
    called: list[int] = []

    def again() -> None:
        called.append(1)
        loop.call_later(0, again) if len(called) < 50 else loop.stop()

    loop.call_later(0, again)
    run(loop)
    assert len(called) == 50


def test_a_timer_that_sets_itself_again_at_once_lets_others_live(loop: Loop, pipes: Any) -> None:
    read, write = pipes()
    os.write(write, b"x")
    loop.on_read(read, loop.stop)

    def again() -> None:
        loop.call_later(0, again)

    again()
    run(loop)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=40))
def test_exactly_the_timers_that_are_not_cancelled_are_called(timers: list[tuple[int, bool]]) -> None:
    loop = Loop()
    called: list[int] = []
    kept = []
    for n, (delay, cancelled) in enumerate(timers):
        timer = loop.call_later(delay / 10_000, lambda n=n: called.append(n))  # type: ignore[misc]
        if cancelled:
            timer.cancel()
        else:
            kept.append((timer.due_s, n))
    loop.call_later(0.0021, loop.stop)
    run(loop)
    assert called == [n for _, n in sorted(kept)]
    loop._selector.close()


@pytest.mark.parametrize("delay_s", [25 * 86_400, 3.2e8, 1e12])
def test_a_timer_may_be_due_in_years(loop: Loop, pipes: Any, delay_s: float) -> None:
    read, write = pipes()
    loop.call_later(delay_s, lambda: None)
    loop.on_read(read, loop.stop)
    os.write(write, b"x")
    loop.run()


def test_timers_that_were_cancelled_take_no_memory_for_the_rest_of_their_time(loop: Loop) -> None:
    """As when each reply of a busy broker says anew when a message of next week is due."""
    rounds: list[int] = []

    def turn() -> None:
        for _ in range(1000):
            loop.call_later(86_400, lambda: None).cancel()
        rounds.append(1)
        loop.call_later(0, turn) if len(rounds) < 50 else loop.stop()

    kept = loop.call_later(3600, lambda: None)
    loop.call_later(0, turn)
    run(loop, 20)
    gc.collect()
    alive = sum(isinstance(it, Timer) for it in gc.get_objects())
    assert alive < 5000
    assert kept.callback


# -- descriptors ------------------------------------------------------------------------------------------------------


def test_what_can_be_read_is_called_until_it_has_been_read(loop: Loop, pipes: Any) -> None:
    read, write = pipes()
    got: list[bytes] = []
    loop.on_read(read, lambda: (got.append(os.read(read, 1)), len(got) == 3 and loop.stop())[0])  # type: ignore[func-returns-value]
    os.write(write, b"abc")
    run(loop)
    assert got == [b"a", b"b", b"c"]


def test_reading_and_writing_are_watched_apart(loop: Loop) -> None:
    import socket

    one, two = socket.socketpair()
    called: list[str] = []
    loop.on_read(one.fileno(), lambda: (called.append("read"), one.recv(9), loop.stop())[0])
    loop.on_write(one.fileno(), lambda: (called.append("write"), loop.on_write(one.fileno(), None))[0])
    loop.call_later(0.02, lambda: two.send(b"x") and None)
    run(loop)
    assert called == ["write", "read"]
    loop.on_write(one.fileno(), None)
    loop.forget(one.fileno())
    loop.forget(one.fileno())
    loop.on_write(one.fileno(), None)
    one.close()
    two.close()


def test_a_later_callback_takes_the_place_of_an_earlier_one(loop: Loop, pipes: Any) -> None:
    read, write = pipes()
    called: list[str] = []
    loop.on_read(read, lambda: called.append("old"))
    loop.on_read(read, lambda: (called.append("new"), loop.stop())[0])
    os.write(write, b"x")
    run(loop)
    assert called == ["new"]


def test_a_descriptor_that_was_forgotten_in_the_same_turn_is_not_called(loop: Loop, pipes: Any) -> None:
    """As when the signal of a child's death and the end of its answers come together."""
    ends = [pipes() for _ in range(5)]
    called: list[int] = []

    def first_come(n: int) -> None:
        called.append(n)
        for other, (read, _) in enumerate(ends):
            if other != n:
                loop.forget(read)
                os.close(read)
        loop.call_later(0.01, loop.stop)
        loop.forget(ends[n][0])

    for n, (read, write) in enumerate(ends):
        loop.on_read(read, lambda n=n: first_come(n))  # type: ignore[misc]
        os.write(write, b"x")
    run(loop)
    assert len(called) == 1


def test_a_descriptor_whose_number_was_given_away_in_the_same_turn_is_not_called(loop: Loop, pipes: Any) -> None:
    one, two = pipes(), pipes()
    called: list[str] = []
    fresh: list[tuple[int, int]] = []

    def reuse(old: int) -> None:
        loop.forget(old)
        os.close(old)
        fresh.append(pipes())
        assert old in fresh[-1]
        read = os.dup(fresh[-1][0]) if fresh[-1][0] != old else old
        if read != old:
            os.dup2(read, old)
        loop.on_read(old, lambda: called.append("fresh"))

    loop.on_read(one[0], lambda: (called.append("one"), reuse(two[0]), loop.forget(one[0]))[0])
    loop.on_read(two[0], lambda: (called.append("two"), reuse(one[0]), loop.forget(two[0]))[0])
    os.write(one[1], b"x")
    os.write(two[1], b"x")
    loop.call_later(0.05, loop.stop)
    run(loop)
    assert called in (["one"], ["two"])
    os.write(fresh[0][1], b"x")
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert "fresh" in called


def test_a_callback_that_was_taken_away_in_the_same_turn_is_not_called(loop: Loop) -> None:
    import socket

    one, two = socket.socketpair()
    two.send(b"x")
    called: list[str] = []
    loop.on_read(one.fileno(), lambda: (called.append("read"), loop.on_write(one.fileno(), None), one.recv(9))[0])
    loop.on_write(one.fileno(), lambda: called.append("write"))
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert called == ["read"]
    loop.forget(one.fileno())
    one.close()
    two.close()


def test_the_end_of_a_file_is_something_to_read(loop: Loop, pipes: Any) -> None:
    read, write = pipes()
    loop.on_read(read, loop.stop)
    os.close(write)
    run(loop)


# -- turns ------------------------------------------------------------------------------------------------------------


def test_after_is_called_once_for_all_that_has_happened_in_a_turn(loop: Loop, pipes: Any) -> None:
    story: list[str] = []
    for n in range(3):
        read, write = pipes()
        os.write(write, b"x")
        loop.on_read(read, lambda n=n, read=read: (story.append(f"read {n}"), os.read(read, 9))[0])  # type: ignore[misc]
    loop.call_later(-1, lambda: story.append("timer"))
    loop.after = lambda: (story.append("after"), loop.stop())[0]
    run(loop)
    assert sorted(story[:3]) == ["read 0", "read 1", "read 2"]
    assert story[3:] == ["timer", "after"]


def test_stop_lets_the_turn_end_and_the_loop_can_run_again(loop: Loop) -> None:
    story: list[str] = []
    loop.call_later(-1, loop.stop)
    loop.call_later(-1, lambda: story.append("timer"))
    loop.after = lambda: story.append("after")
    run(loop)
    assert story == ["timer", "after"]
    loop.call_later(0, loop.stop)
    run(loop)
    assert story == ["timer", "after", "after"]


def test_an_idle_loop_sleeps(loop: Loop) -> None:
    turns: list[int] = []
    loop.after = lambda: turns.append(1)
    loop.call_later(0.2, loop.stop)
    run(loop)
    assert len(turns) <= 3


def test_a_turn_tells_when_it_took_in_what_had_come(loop: Loop) -> None:
    loop.call_later(0.01, loop.stop)
    before = time.monotonic()
    run(loop)
    assert before < loop.turned_s <= time.monotonic()


def test_an_error_in_a_callback_is_not_hidden(loop: Loop) -> None:
    loop.call_later(0, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        loop.run()


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signals(loop: Loop) -> Iterator[list[str]]:
    """What the loop was told of USR1 and USR2."""
    heard: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    loop.on_signals({
        signal.SIGUSR1: lambda: heard.append("USR1"),
        signal.SIGUSR2: lambda: (heard.append("USR2"), loop.stop())[0],
    })  # fmt: skip
    yield heard
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    for fd in (loop._wake_r, loop._wake_w):
        os.close(fd)


def test_a_signal_is_called_from_the_loop_and_wakes_it(loop: Loop, signals: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals == []
    loop.call_later(0.02, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    run(loop)
    assert signals == ["USR1", "USR2"]


def test_a_storm_of_signals_does_not_stop_the_loop(loop: Loop, signals: list[str]) -> None:
    for _ in range(100_000):  # more than the pipe holds
        os.kill(os.getpid(), signal.SIGUSR1)
    loop.call_later(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    run(loop)
    assert signals[0] == "USR1"
    assert signals[-1] == "USR2"


def test_the_loop_tells_its_own_descriptors_for_a_child_to_close(loop: Loop, signals: list[str]) -> None:
    own = list(loop.descriptors())
    assert {loop._wake_r, loop._wake_w} < set(own)
    assert all(os.fstat(fd) for fd in own)
    assert list(Loop().descriptors()) != own
