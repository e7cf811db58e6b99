from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefork.worker.dispatch import FEW, MOST_READY, STALE_S, Dispatcher, RunTimes
from prefork.worker.slots import AHEAD_S, LAG_S, MAX_DEPTH, SOON_S, WORTH_A_CLAIM_S, Slot, Slots

# -- run times --------------------------------------------------------------------------------------------------------


def test_a_task_never_seen_may_take_for_ever() -> None:
    times = RunTimes()
    assert times.expect_s("t") == inf
    assert times.mix_s == inf
    times.observe("other", 0.001)
    assert times.expect_s("t") == inf


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_what_is_expected_is_a_number_whatever_was_seen(runs: list[float]) -> None:
    times = RunTimes()
    for ran_s in runs:
        times.observe("t", ran_s)
        assert 0 < times.expect_s("t") < inf
        assert 0 < times.mix_s < inf
    assert times.mix_s <= max(runs) + 1e-4


@given(st.floats(0, 10), st.integers(40, 80))
def test_what_always_takes_the_same_is_soon_expected_to(ran_s: float, n: int) -> None:
    times = RunTimes()
    for _ in range(n):
        times.observe("t", ran_s)
    assert times.expect_s("t") == pytest.approx(ran_s, rel=0.01, abs=1e-4)


def test_what_varies_is_expected_to_take_longer_than_its_mean() -> None:
    times = RunTimes()
    for n in range(200):
        times.observe("t", 0.001 if n % 2 else 0.003)
    assert 0.003 < times.expect_s("t") < 0.005


def test_names_are_learnt_apart() -> None:
    times = RunTimes()
    for _ in range(50):
        times.observe("short", 1e-4)
        times.observe("long", 1.0)
    assert times.expect_s("short") < AHEAD_S < times.expect_s("long")


# -- to whom ----------------------------------------------------------------------------------------------------------


EXPECTED = st.sampled_from([1e-5, 1e-4, 3e-4, 0.0011, 0.1, 30.0, inf]) | st.floats(1e-5, 1e3)


@dataclass(eq=False)
class Work:
    expected_s: float
    serial: int = 0
    name: str = "t"


def works(n: int, expected_s: float, first: int = 0) -> list[Work]:
    return [Work(expected_s, first + k) for k in range(n)]


SLOTS = st.lists(
    st.builds(
        lambda open, loads: (open, loads), st.booleans(), st.lists(st.sampled_from([1e-5, 1e-4, 1e-3, inf]), max_size=4)
    ),
    min_size=1,
    max_size=6,
)


def idle_ones(n: int) -> tuple[Dispatcher[Work], list[Slot]]:
    among = Slots()
    return Dispatcher(among), [Slot(among, open=True) for _ in range(n)]


def slots_of(among: Slots, drawn: list[tuple[bool, list[float]]], now_s: float) -> list[Slot]:
    slots = []
    for open, loads in drawn:
        slot = Slot(among, open=open)
        for load_s in loads:
            slot.handed(load_s, now_s)
        slots.append(slot)
    return slots


@given(SLOTS, st.lists(EXPECTED, max_size=200), st.floats(0, 0.01))
def test_what_is_ready_is_handed_out_in_order_and_nobody_stays_idle(
    drawn: list[tuple[bool, list[float]]], expected: list[float], later_s: float
) -> None:
    dispatcher: Dispatcher[Work] = Dispatcher(Slots())
    slots = slots_of(dispatcher.slots, drawn, 5.0)
    before = [slot.outstanding for slot in slots]
    ready = [Work(expected_s, n) for n, expected_s in enumerate(expected)]
    dispatcher.add(ready, 5.0)
    lagging = [slot.lags(5.0 + later_s) for slot in slots]
    given_out = dispatcher.assign(5.0 + later_s)

    handed = [work for _, some in given_out for work in some]
    assert [work.serial for work in handed] == list(range(len(handed)))
    assert handed + list(dispatcher.ready) == ready  # nothing lost, nothing doubled, what is left in its order
    assert len({id(slot) for slot, _ in given_out}) == len(given_out)
    for slot, some in given_out:
        at = slots.index(slot)
        assert slot.open
        assert slot.outstanding == before[at] + len(some) <= MAX_DEPTH
        assert not (before[at] and lagging[at])
        if slot.spare:
            assert before[at] == 1
            assert slot.head_since_s < 5.0 + later_s < slot.end_s <= 5.0 + later_s + SOON_S
        elif slot.outstanding > 1:  # about two milliseconds of work ahead, or one message
            assert slot.load_s <= AHEAD_S
    if dispatcher.ready:
        assert all(slot.outstanding for slot in slots if slot.open)


@given(SLOTS, st.lists(EXPECTED, min_size=1, max_size=2), st.floats(0, 0.01), st.booleans())
def test_what_comes_alone_goes_where_it_would_go_among_others(
    drawn: list[tuple[bool, list[float]]], expected: list[float], later_s: float, long: bool
) -> None:
    now_s, seen = 5.0 + later_s, []
    for alone in (True, False):
        dispatcher: Dispatcher[Work] = Dispatcher(Slots())
        slots = slots_of(dispatcher.slots, drawn * (3 if long else 1), 5.0)
        dispatcher.add([Work(expected_s, n) for n, expected_s in enumerate(expected)], 5.0)
        if not alone:
            dispatcher.assign(now_s)
        elif given_out := dispatcher.alone():
            slot, work = given_out
            slot.handed(work.expected_s, now_s)
        else:
            assert [work.serial for work in dispatcher.ready] == list(range(len(expected)))
            return
        seen.append([(it.outstanding, it.load_s, it.left, it.head_since_s, it.end_s, it.spare) for it in slots])
        assert not dispatcher.ready
    assert seen[0] == seen[1]


def test_what_is_ready_is_shared_evenly() -> None:
    dispatcher, _ = idle_ones(4)
    dispatcher.add(works(20, 1e-4), 0.0)
    assert [len(some) for _, some in dispatcher.assign(0.0)] == [5, 5, 5, 5]


def test_what_is_done_before_another_child_would_be_awake_stays_together() -> None:
    dispatcher, _ = idle_ones(200)
    dispatcher.add(works(60, 1e-5), 0.0)
    assert [len(some) for _, some in dispatcher.assign(0.0)] == [20, 20, 20]


def test_what_is_short_stays_in_few_children_however_many_there_are() -> None:
    dispatcher, slots = idle_ones(200)
    dispatcher.add(works(FEW * 20, 1e-5), 0.0)
    awake = [slot for slot, _ in dispatcher.assign(0.0)]
    assert len(awake) == FEW
    for at in range(50):
        for slot in awake:
            for _ in range(10):
                slot.answered(1e-5, at * 1e-4)
        dispatcher.add(works(FEW * 10, 1e-5, first=1000 * at + 1000), at * 1e-4)
        assert {slot for slot, _ in dispatcher.assign(at * 1e-4)} <= {*awake}
        assert not dispatcher.ready
    dispatcher.add(works(FEW * MAX_DEPTH, 1e-5, first=10**6), 0.1)  # those that are awake lag now
    assert len({slot for slot, _ in dispatcher.assign(0.1)} - {*awake}) == FEW
    assert not dispatcher.ready
    assert len(slots) > 2 * FEW


def test_who_had_something_last_is_woken_first() -> None:
    dispatcher, (first, second, third) = idle_ones(3)
    for slot in (first, third, second):
        slot.handed(1.0, 0.0)
    for slot in (third, first, second):
        slot.answered(1.0, 1.0)
    dispatcher.add(works(2, 1.0), 1.0)
    assert [slot for slot, _ in dispatcher.assign(1.0)] == [second, first]


def test_it_is_time_to_claim_ahead_when_the_first_child_ends_soon() -> None:
    dispatcher, slots = idle_ones(4)
    assert dispatcher.ahead_in_s(5.0) is None
    for slot, expected_s in zip(slots, (0.010, 0.020, 30.0, inf), strict=True):
        slot.handed(expected_s, 5.0)
    assert dispatcher.ahead_in_s(5.0) == pytest.approx(0.010 - SOON_S)
    assert dispatcher.ahead_in_s(5.009) == pytest.approx(0.011 - SOON_S)
    assert dispatcher.ahead_in_s(5.019) is None


def test_who_has_nothing_comes_first() -> None:
    dispatcher, (busy, idle) = idle_ones(2)
    busy.handed(1e-5, 0.0)
    dispatcher.add(works(1, 1e-5), 0.0)
    assert [slot for slot, _ in dispatcher.assign(0.0)] == [idle]


@pytest.mark.parametrize("expected_s", [inf, 0.0031, 3.0])
def test_what_is_long_or_unknown_is_handed_out_one_by_one(expected_s: float) -> None:
    dispatcher, slots = idle_ones(3)
    dispatcher.add(works(10, expected_s), 0.0)
    assert [len(some) for _, some in dispatcher.assign(0.0)] == [1, 1, 1]
    assert dispatcher.assign(0.0) == []
    slots[1].answered(expected_s, 1.0)
    assert [(slot is slots[1], [work.serial for work in some]) for slot, some in dispatcher.assign(1.0)] == [
        (True, [3])
    ]


def test_nothing_is_put_behind_a_task_that_takes_long() -> None:
    dispatcher, (slot,) = idle_ones(1)
    slot.handed(1e-4, 0.0)
    dispatcher.add(works(3, 1e-4), 0.0)
    assert dispatcher.assign(LAG_S * 1.1) == []


def test_a_closed_child_is_given_nothing() -> None:
    dispatcher, (slot,) = idle_ones(1)
    slot.open = False
    dispatcher.add(works(3, 1e-4), 0.0)
    assert dispatcher.assign(0.0) == []
    assert dispatcher.wanted(inf, 0.0) == 0
    assert len(dispatcher.ready) == 3


def test_a_child_is_given_no_more_than_it_has_left_before_it_is_recycled() -> None:
    dispatcher: Dispatcher[Work] = Dispatcher(Slots())
    slot = Slot(dispatcher.slots, open=True, left=3)
    dispatcher.add(works(10, 1e-5), 0.0)
    assert [len(some) for _, some in dispatcher.assign(0.0)] == [3]
    slot.taken_back(1e-5)
    assert [len(some) for _, some in dispatcher.assign(0.0)] == [1]
    for _ in range(3):
        slot.answered(1e-5, 0.1)
    assert dispatcher.assign(0.1) == []


def test_what_was_taken_back_comes_before_what_was_claimed_after_it_and_among_its_like() -> None:
    dispatcher: Dispatcher[Work] = Dispatcher(Slots())
    dispatcher.add(works(2, 1.0, first=5), 0.0)
    dispatcher.add(works(3, 1.0, first=1), 0.0)
    assert [work.serial for work in dispatcher.ready] == [1, 2, 3, 5, 6]
    dispatcher.add([], 0.0)
    dispatcher.add(works(2, 1.0, first=7), 0.0)
    dispatcher.add(works(1, 1.0, first=4), 0.0)
    assert [work.serial for work in dispatcher.ready] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_cannot_be_handed_out_for_a_while_goes_back() -> None:
    dispatcher, (slot,) = idle_ones(1)
    slot.handed(inf, 0.0)
    dispatcher.add(works(3, 1.0), 1.0)
    assert dispatcher.stale(1.0 + STALE_S / 2) == []
    assert [work.serial for work in dispatcher.stale(1.0 + STALE_S * 1.1)] == [0, 1, 2]
    assert not dispatcher.ready
    assert dispatcher.stale(99.0) == []


def test_what_came_a_moment_ago_is_not_stale_because_something_was_before() -> None:
    dispatcher: Dispatcher[Work] = Dispatcher(Slots())
    dispatcher.add(works(3, 1.0), 1.0)
    dispatcher.stale(2.0)
    dispatcher.add(works(1, 1.0), 5.0)
    assert dispatcher.stale(5.0 + STALE_S / 2) == []


# -- how much to claim ------------------------------------------------------------------------------------------------


@given(SLOTS, st.integers(0, 300), st.floats(1e-6, 100) | st.just(inf), st.floats(0, 0.01))
def test_what_is_wanted_has_its_bounds(
    drawn: list[tuple[bool, list[float]]], ready: int, mix_s: float, later_s: float
) -> None:
    dispatcher: Dispatcher[Work] = Dispatcher(Slots())
    slots = slots_of(dispatcher.slots, drawn, 5.0)
    dispatcher.add(works(ready, 1e-4), 5.0)
    now_s = 5.0 + later_s
    wanted = dispatcher.wanted(mix_s, now_s)
    idle = sum(slot.open and not slot.outstanding for slot in slots)
    open_slots = sum(slot.open for slot in slots)
    assert 0 <= wanted <= 2 * MAX_DEPTH * open_slots
    soon = sum(
        slot.open
        and slot.outstanding == 1
        and AHEAD_S < slot.load_s <= WORTH_A_CLAIM_S
        and now_s < slot.end_s <= now_s + SOON_S
        for slot in slots
    )
    if not soon and all(slot.lags(now_s) for slot in slots if slot.open):
        assert wanted == 0  # nobody is free, and nobody soon will be
    if mix_s >= AHEAD_S:
        assert wanted == max(0, idle + soon - ready)  # what is long is claimed only for those who can start it now
    assert wanted + ready <= max(ready, MOST_READY, open_slots)
    if idle > ready:
        assert wanted > 0


# -- a simulated worker -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Child:
    slot: Slot
    queue: deque[Work] = field(default_factory=deque)  # its token pipe
    running: Work | None = None
    unread: int = 0  # answers
    began_s: float = 0.0
    spare_since_s: float = 0.0


class Simulation:
    """A master with its children in simulated time: claims take a round trip, tasks their durations.

    `stretched`: by how much, in turn, each takes longer than that. `deaf_s`: from an answer until the master reads it.
    """

    def __init__(
        self, children: int, durations: dict[str, float], names: list[str], round_trip_s: float,
        stretched: Sequence[float] = (1.0,), deaf_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.now_s = 100.0
        self.durations, self.round_trip_s, self.stretched, self.deaf_s = durations, round_trip_s, stretched, deaf_s
        self.broker = deque(Work(0.0, n, name) for n, name in enumerate(names))
        self.dispatcher: Dispatcher[Work] = Dispatcher(Slots())
        self.children = [Child(Slot(self.dispatcher.slots, open=True)) for _ in range(children)]
        self.times = RunTimes()
        self.events: list[tuple[float, int, object]] = []
        self.order = count()
        self.claiming = self.lag_armed = self.ahead_armed = False
        self.started: list[Work] = []
        self.done: list[Work] = []
        self.given_back = 0
        self.longest_wait_s = 0.0  # of a message behind another in a child, over what that one has run already
        self.longest_spare_s = 0.0  # of a spare in a child
        self.spares = self.begun_spares = 0
        self.deepest = 0
        self.turns = 0

    def at(self, delay_s: float, what: object) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.order), what))

    def run(self) -> None:
        self.turn()
        while self.events:
            self.now_s, _, what = heapq.heappop(self.events)
            what()  # type: ignore[operator]
            self.turn()

    def turn(self) -> None:
        self.turns += 1
        assert self.turns < 200_000
        given_out = []
        if alone := self.dispatcher.alone():
            slot, work = alone
            slot.handed(work.expected_s, self.now_s)
            given_out.append((slot, [work]))
        for slot in self.dispatcher.hoarding():
            self.take_back(self.child_of(slot))
        for slot, some in given_out + self.dispatcher.assign(self.now_s):
            child = self.child_of(slot)
            if slot.spare:
                assert len(some) == 1
                self.spares += 1
                child.spare_since_s = self.now_s
            child.queue.extend(some)
            self.go_on(child)
        idle = [child for child in self.children if not child.slot.outstanding]
        for child in self.children:
            slot = child.slot
            assert slot.outstanding == len(child.queue) + (child.running is not None) + child.unread
            assert not math.isnan(slot.load_s)
            assert slot.load_s >= -1e-9
            self.deepest = max(self.deepest, slot.outstanding)
            if slot.spare and child.queue:
                assert not idle, "a spare waits while a child idles"
                self.longest_spare_s = max(self.longest_spare_s, self.now_s - child.spare_since_s)
            elif child.queue:
                self.longest_wait_s = max(self.longest_wait_s, self.now_s - child.began_s)
            if self.dispatcher.ready:
                assert slot.outstanding, "a child idles while something is ready"
        if self.dispatcher.waits() and not self.lag_armed:
            self.lag_armed = True
            self.at(LAG_S, self.look)
        if not self.ahead_armed and (in_s := self.dispatcher.ahead_in_s(self.now_s)) is not None:
            self.ahead_armed = True
            self.at(in_s, self.look_ahead)
        wanted = self.dispatcher.wanted(self.times.mix_s, self.now_s)
        assert wanted >= 0
        if wanted and not self.claiming and self.broker:
            self.claiming = True
            taken = [self.broker.popleft() for _ in range(min(wanted, len(self.broker)))]
            self.at(self.round_trip_s, lambda: self.claimed(taken))

    def claimed(self, taken: list[Work]) -> None:
        self.claiming = False
        for work in taken:
            work.expected_s = self.times.expect_s(work.name)
        self.dispatcher.add(taken, self.now_s)

    def go_on(self, child: Child) -> None:
        if child.running is None and child.queue:
            child.running, child.began_s = work, _ = child.queue.popleft(), self.now_s
            self.begun_spares += child.slot.spare
            stretched = self.stretched[len(self.started) % len(self.stretched)]
            self.started.append(work)
            ran_s = self.durations[work.name] * stretched
            self.at(ran_s, lambda: self.answer(child, work, ran_s))

    def answer(self, child: Child, work: Work, ran_s: float) -> None:
        child.running = None
        child.unread += 1
        if self.deaf_s:
            self.at(self.deaf_s, lambda: self.read(child, work, ran_s))
            self.go_on(child)
        else:
            self.read(child, work, ran_s)
            self.go_on(child)

    def read(self, child: Child, work: Work, ran_s: float) -> None:
        child.unread -= 1
        self.done.append(work)
        self.times.observe(work.name, ran_s)
        child.slot.answered(work.expected_s, self.now_s)

    def child_of(self, slot: Slot) -> Child:
        return next(child for child in self.children if child.slot is slot)

    def look_ahead(self) -> None:
        self.ahead_armed = False

    def take_back(self, child: Child) -> None:
        back, child.queue = list(child.queue), deque()
        for work in back:
            child.slot.taken_back(work.expected_s)
        self.dispatcher.add(back, self.now_s)

    def look(self) -> None:
        self.lag_armed = False
        for slot in self.dispatcher.slots.lagging(self.now_s):
            self.take_back(self.child_of(slot))
        stale = self.dispatcher.stale(self.now_s)
        self.given_back += len(stale)
        self.broker.extendleft(reversed(stale))


DURATIONS = st.sampled_from([0.0, 1e-5, 1e-4, 5e-4, 1e-3, 0.0019, 0.0025, 0.005, 0.01, 0.05, 1.0, 30.0])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5),
    st.fixed_dictionaries(dict.fromkeys("abc", DURATIONS)),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=300),
    st.sampled_from([1e-4, 1e-3, 0.01, 0.5]),
    st.lists(st.sampled_from([0.5, 0.9, 1.0, 1.0, 1.0, 1.1, 2.0, 20.0]), min_size=1, max_size=20),
    st.sampled_from([0.0, 1e-4, 1e-3]),
)
# Of two spares the one that was given last has been begun already.
@example(5, {"a": 0.0019, "b": 0.001, "c": 0.0019}, list("abbccaaaacaaaaaaaa"), 0.001, [1.0], 1e-4)
def test_every_message_is_run_once_and_none_waits_behind_a_long_one(
    children: int, durations: dict[str, float], names: list[str], round_trip_s: float, stretched: list[float],
    deaf_s: float,
) -> None:  # fmt: skip
    it = Simulation(children, durations, names, round_trip_s, stretched, deaf_s)
    it.run()
    assert sorted(work.serial for work in it.done) == list(range(len(names)))
    assert len(it.started) == len(names)
    assert not it.dispatcher.ready
    assert it.deepest <= MAX_DEPTH
    # Seen at the next look, which comes within LAG_S; by what was read until then.
    assert it.longest_wait_s <= 2 * LAG_S + deaf_s + 1e-9
    assert it.longest_spare_s <= SOON_S + LAG_S + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), DURATIONS, st.sampled_from([1e-4, 0.01]))
def test_one_child_starts_equal_messages_in_their_order(n: int, duration_s: float, round_trip_s: float) -> None:
    it = Simulation(1, {"a": duration_s}, ["a"] * n, round_trip_s)
    it.run()
    assert [work.serial for work in it.started] == list(range(n))


@pytest.mark.parametrize("children", [1, 2, 10])
@pytest.mark.parametrize("duration_s", [1e-5, 1e-4, 1e-3])
def test_children_that_run_short_tasks_hardly_ever_wait_for_a_round_trip(children: int, duration_s: float) -> None:
    it = Simulation(children, {"a": duration_s}, ["a"] * 20_000, 2e-4)
    it.run()
    shortest_s = 20_000 * duration_s / children
    assert it.now_s - 100 < 1.5 * shortest_s + 0.02
    assert it.given_back == 0


@pytest.mark.parametrize("duration_s", [0.003, 0.01, 0.02])
def test_between_two_tasks_of_some_milliseconds_a_child_need_not_wait_for_the_master(duration_s: float) -> None:
    stretched = [1.0, 1.01, 0.99, 1.02, 1.0, 0.98, 1.01]
    it = Simulation(8, {"a": duration_s}, ["a"] * 1600, 5e-4, stretched, 3e-4)
    it.run()
    assert it.begun_spares > 0.95 * 1600
    assert it.now_s - 100 < 1.02 * 1600 * duration_s / 8 + 2 * duration_s


def test_a_spare_behind_a_task_that_overruns_is_begun_by_the_next_child_that_is_free() -> None:
    stretched = [1.0] * 99 + [500.0]
    it = Simulation(4, {"a": 0.01}, ["a"] * 1000, 5e-4, stretched)
    it.run()
    assert it.spares > it.begun_spares
    assert it.longest_spare_s <= SOON_S + LAG_S + 1e-9
    overtaken = max(serial - at for at, serial in enumerate(work.serial for work in it.started))
    assert overtaken <= 8, "it has its place among those that were claimed with it"


def test_there_are_no_spares_when_nobody_knows_how_long_tasks_take() -> None:
    it = Simulation(4, {"a": 0.01}, ["a"] * 400, 5e-4, [0.1, 5.0, 0.5, 20.0, 0.2])
    it.run()
    assert it.spares < 40


def test_the_spares_of_others_are_taken_back_for_a_child_that_has_nothing() -> None:
    dispatcher, (first, second, third) = idle_ones(3)
    for slot, ends_s in (first, 0.010), (second, 0.011), (third, 5.0):
        slot.handed(ends_s, 0.0)
    dispatcher.add(works(2, 0.010), 0.009)
    assert [slot for slot, _ in dispatcher.assign(0.0095)] == [first, second]
    assert list(dispatcher.hoarding()) == []
    third.answered(5.0, 0.0096)
    assert next(dispatcher.hoarding()) is second
    second.taken_back(0.010)
    dispatcher.add(works(1, 0.010, first=1), 0.0096)
    assert list(dispatcher.hoarding()) == []
    assert [(slot, [work.serial for work in some]) for slot, some in dispatcher.assign(0.0096)] == [(third, [1])]


def test_short_tasks_pass_by_a_child_that_is_stuck() -> None:
    names = ["short"] * 200 + ["long"] + ["short"] * 2000
    it = Simulation(3, {"short": 1e-4, "long": 60.0}, names, 2e-4)
    it.run()
    last_short = max(k for k, work in enumerate(it.done) if work.name == "short")
    assert last_short == len(it.done) - 2
    assert it.done[-1].name == "long"
    assert it.started[-1].serial > it.done[-1].serial


def test_tasks_that_become_long_are_given_back_so_that_other_workers_can_run_them() -> None:
    it = Simulation(2, {"a": 1e-4, "b": 1.0}, ["a"] * 3000 + ["b"] * 100, 2e-4)
    since: dict[int, float] = {}
    longest_s = 0.0
    turn = it.turn

    def watched() -> None:
        nonlocal longest_s
        turn()
        held = {work.serial for work in it.dispatcher.ready if work.name == "b"}
        for serial in held | since.keys():
            longest_s = max(longest_s, it.now_s - since.setdefault(serial, it.now_s))
            if serial not in held:
                del since[serial]

    it.turn = watched  # type: ignore[method-assign]
    it.run()
    assert len(it.done) == 3100
    assert longest_s <= STALE_S + 2 * LAG_S


def test_what_is_ready_does_not_stay_because_a_little_of_it_is_handed_out_now_and_then() -> None:
    """Two children run tasks of 15 ms: 100 claimed ones would keep this worker busy for most of a second."""
    dispatcher, slots = idle_ones(2)
    dispatcher.add(works(100, 0.015), 0.0)
    now_s = 0.0
    while dispatcher.ready and now_s < 0.1:
        for slot in slots:
            if slot.outstanding:
                slot.answered(0.015, now_s)
        dispatcher.assign(now_s)
        if dispatcher.stale(now_s + LAG_S):
            return
        now_s += 0.015
    assert not dispatcher.ready, f"{len(dispatcher.ready)} are still held after {now_s:.3f} s"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_closing_and_opening_children_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    dispatcher, slots = idle_ones(4)
    held: list[deque[Work]] = [deque() for _ in slots]
    seen: list[int] = []
    now_s, number = 0.0, 0
    for _ in range(300):
        now_s += rng.choice([1e-4, 1e-3, 0.01])
        if rng.random() < 0.3:
            n = dispatcher.wanted(rng.choice([1e-5, 1e-3, 1.0, inf]), now_s)
            dispatcher.add(works(n, rng.choice([1e-5, 1e-3, inf]), first=number), now_s)
            number += n
        for slot, some in dispatcher.assign(now_s):
            held[slots.index(slot)].extend(some)
        at = rng.randrange(4)
        if held[at] and rng.random() < 0.7:
            work = held[at].popleft()
            slots[at].answered(work.expected_s, now_s)
            seen.append(work.serial)
        if rng.random() < 0.1:  # the child died: another one takes its place
            dispatcher.add(list(held[at]), now_s)
            held[at].clear()
            slots[at].leave()
            slots[at] = Slot(dispatcher.slots, open=rng.random() < 0.8)
        elif rng.random() < 0.1:
            slots[at].open = not slots[at].open
    rest = [work.serial for work in dispatcher.ready] + [work.serial for some in held for work in some]
    assert sorted(seen + rest) == list(range(number))
