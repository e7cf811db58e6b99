from __future__ import annotations

import math
from collections import deque
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.worker.slots import LAG_S, SOON_S, WORTH_A_CLAIM_S, Slot, Slots

EXPECTED = st.sampled_from([1e-5, 1e-4, 3e-4, 0.0011, 0.1, 30.0, inf]) | st.floats(1e-5, 1e3)


@given(st.lists(st.tuples(st.sampled_from(["handed", "answered", "taken_back"]), EXPECTED), max_size=60))
def test_the_load_of_a_child_is_never_negative_and_always_a_number(events: list[tuple[str, float]]) -> None:
    slot, held, now_s = Slot(open=True), deque[float](), 0.0
    for what, expected_s in events:
        now_s += 0.001
        if what == "handed":
            slot.handed(expected_s, now_s)
            held.append(expected_s)
        elif held:
            getattr(slot, what)(held.popleft(), now_s) if what == "answered" else slot.taken_back(held.pop())
        assert slot.outstanding == len(held)
        assert not math.isnan(slot.load_s)
        assert slot.load_s >= -1e-9
        if not held:
            assert slot.load_s == 0
            assert not slot.lags(now_s + 100)


def test_a_child_that_runs_something_for_too_long_lags() -> None:
    slot = Slot(open=True)
    slot.handed(1e-4, 10.0)
    slot.handed(1e-4, 10.001)
    assert not slot.lags(10.0 + LAG_S / 2)
    assert slot.lags(10.0 + LAG_S * 1.1)
    slot.answered(1e-4, 10.004)  # the next one has begun
    assert not slot.lags(10.004 + LAG_S / 2)
    assert slot.lags(10.004 + LAG_S * 1.1)


def test_a_child_ends_soon_when_what_it_runs_is_expected_to_be_done_in_a_moment() -> None:
    slots = Slots()
    slot, other = Slot(slots, open=True), Slot(slots, open=True)
    other.handed(inf, 5.0)
    assert slots.soon(5.0) == []
    slot.handed(0.010, 5.0)
    assert slots.soon(5.005) == []
    assert slots.next_s(5.005) == pytest.approx(5.010 - SOON_S)
    assert slots.soon(5.0085) == [slot]
    slot.handed_spare(1e-4, 5.0085)
    assert slots.soon(5.0086) == [], "it has more to do"
    slot.taken_back(1e-4)
    assert slots.soon(5.0087) == [slot]
    assert slots.soon(5.011) == [], "it takes longer than expected: who knows how long"
    slot.answered(0.010, 5.012)
    slot.handed(0.004, 5.012)
    assert slots.soon(5.0145) == [slot]
    slot.open = False
    assert slots.soon(5.0146) == []


def test_a_spare_may_wait_until_what_runs_was_expected_to_end() -> None:
    slots = Slots()
    slot = Slot(slots, open=True)
    slot.handed(0.010, 5.0)
    slot.handed_spare(inf, 5.009)
    assert slots.lagging(5.0099) == []
    assert slots.lagging(5.0101) == [slot]
    slot.taken_back(inf)
    assert slots.lagging(5.0101) == []
    assert slot.load_s == pytest.approx(0.010)
    slot.handed_spare(0.010, 5.0095)
    slot.answered(0.010, 5.0098)  # the spare has begun
    assert not slots.spared
    assert slot.end_s == pytest.approx(5.0198)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["hand", "spare", "answer", "take back", "open", "close", "leave"]),
            EXPECTED,
            st.sampled_from([1e-4, 1e-3, 0.01]),
        ),
        max_size=100,
    )
)
def test_each_child_is_where_it_belongs(events: list[tuple[int, str, float, float]]) -> None:
    """What is kept up with each change is what a look at all of them would find."""
    among, now_s = Slots(), 5.0
    slots = [Slot(among, open=True) for _ in range(4)]
    held: list[deque[float]] = [deque() for _ in slots]
    for at, what, expected_s, later_s in events:
        now_s += later_s
        slot, queue = slots[at], held[at]
        if what == "hand" and not slot.spare and slot.open:
            slot.handed(expected_s, now_s)
            queue.append(expected_s)
        elif what == "spare" and slot in among.soon(now_s):
            slot.handed_spare(expected_s, now_s)
            queue.append(expected_s)
        elif what == "answer" and queue:
            slot.answered(queue.popleft(), now_s)
        elif what == "take back" and queue:
            slot.taken_back(queue.pop())
        elif what in ("open", "close"):
            slot.open = what == "open"
        elif what == "leave":
            slot.leave()
            slots[at], held[at] = Slot(among, open=True), deque()
        among.sift(now_s)
        assert {*among.deep} == {slot for slot in slots if slot.outstanding > 1}
        assert {*among.spared} == {slot for slot in slots if slot.spare} <= {*among.deep}
        assert {*among.idle} == {slot for slot in slots if slot.open and not slot.outstanding}
        at_work = {slot for slot in slots if slot.open and slot.outstanding}
        assert {*among.light} | {*among.full} | {*among.long} == at_work
        assert among.awake + len(among.long) == len(at_work)
        assert not any(slot.lags(now_s) for slot in (*among.light, *among.full))
        assert {*among.soon(now_s)} == {
            slot
            for slot in at_work
            if slot.outstanding == 1 and slot.load_s <= WORTH_A_CLAIM_S and now_s < slot.end_s <= now_s + SOON_S
        }
