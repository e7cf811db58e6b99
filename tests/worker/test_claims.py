from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hiredis
import pytest

from prefork.broker.channel import Lost
from prefork.broker.verbs import Call
from prefork.worker.claims import LARGEST_CLAIM, Claims
from prefork.worker.clock import ServerClock
from tests.worker.test_queues import queues_of

NOW_MS = 1764000000000


@dataclass
class Timer:
    delay_s: float
    callback: Any
    live: bool = True

    def cancel(self) -> None:
        self.live = False


@dataclass
class Loop:
    """Timers that fire when the test says so."""

    timers: list[Timer] = field(default_factory=list)

    def call_later(self, delay_s: float, callback: Any) -> Timer:
        self.timers.append(Timer(delay_s, callback))
        return self.timers[-1]

    def live(self) -> list[Timer]:
        return [timer for timer in self.timers if timer.live]

    def fire(self) -> None:
        timers = self.live()
        self.timers.clear()
        for timer in timers:
            timer.callback()


class Wire:
    """Stands for a Channel: keeps what is sent until the test replies."""

    def __init__(self) -> None:
        self.ready = True
        self.hears_pushes = False
        self.due: list[tuple[Any, Any]] = []

    def send(self, call: Call, callback: Any, limit_s: float = 10) -> None:
        self.due.append((call, callback))

    def send_words(self, words: tuple[Any, ...], callback: Any, limit_s: float = 10) -> None:
        self.due.append((words, callback))

    def flush(self) -> None: ...

    def restart(self) -> None:
        lost, self.due = self.due, []
        for _, callback in lost:
            callback(Lost("restarted"))

    def reply(self, reply: Any) -> None:
        """To the oldest command."""
        self.due.pop(0)[1](reply)


class Worker:
    """Claims, with what they need and what they have said."""

    def __init__(self, *weights: int, strict: bool = True) -> None:
        self.loop, self.wire, self.blocker = Loop(), Wire(), Wire()
        self.queues = queues_of(*(weights or (1,)))
        self.claimed: list[tuple[str, list[bytes]]] = []
        self.fenced: list[str] = []
        self.requested: list[str] = []
        self.kept: list[None] = []
        self.serials: list[int] = []
        self.claims = Claims(
            self.loop, self.wire, self.blocker, ServerClock(), self.queues, strict=strict,  # type: ignore[arg-type]
            claimed=self.take, fenced=self.fenced.append,
            requested=self.requested.append, keep=self.keep,
        )  # fmt: skip
        self.claims.worker = "w"
        self.claims.open = True
        self.claims.blocker_up()
        self.blocker.reply(17)  # CLIENT ID

    def take(self, queue: str, ids: list[bytes], messages: Any, states: Any, serial: int) -> None:
        self.claimed.append((queue, ids))
        self.serials += range(serial, serial + len(ids))

    def keep(self) -> None:
        self.kept.append(None)
        self.claims.begin_to_keep()

    def asks(self) -> list[tuple[str, int]]:
        """The claims that wait for a reply: (queue, n)."""
        return [
            (call.keys[2].split("{")[1].split("}")[0], int(call.arguments[1]))
            for call, _ in self.wire.due
            if isinstance(call, Call)
        ]

    def blocks_on(self) -> set[str] | None:
        """The markers of which queues it blocks on."""
        if not self.blocker.due:
            return None
        words = self.blocker.due[0][0]
        assert words[0] == "BZPOPMIN"
        return {word.split("{")[1].split("}")[0] for word in words[1:-1] if word.endswith(":wake")}

    def hears(self) -> set[str]:
        """In which queues it hears what is asked of it."""
        words = self.blocker.due[0][0]
        return {
            word.split("{")[1].split("}")[0] for word in words[1:-1] if word.endswith(f":requests:{self.claims.worker}")
        }

    def found(self, n: int = 0, left: int = 0, next_due_ms: int = -1) -> None:
        """The broker replies to the oldest claim."""
        ids = [b"%032d" % k for k in range(n)]
        self.wire.reply([NOW_MS, next_due_ms, left, ids, [b"m"] * n, []])

    def woken(self, at: int = 0) -> None:
        """The blocking connection has popped a marker."""
        self.blocker.reply([self.queues[at].keys.wake.encode(), b"0", b"0"])

    def asleep(self) -> None:
        """Claim until everything is drained."""
        self.claims.turn(1, 1)
        while self.wire.due:
            if isinstance(self.wire.due[0][0], Call):
                self.found()
            else:  # CLIENT UNBLOCK
                self.wire.reply(1)
                self.blocker.reply(None)
            self.claims.turn(1, 1)
        assert self.blocks_on() == {queue.keys.queue for queue in self.queues}


def test_it_asks_for_what_there_is_room_for_and_hands_on_what_comes() -> None:
    it = Worker()
    it.claims.turn(5, 5)
    assert it.asks() == [("q0", 5)]
    it.claims.turn(5, 5)
    assert it.asks() == [("q0", 5)]  # one at a time
    it.found(5, left=3)
    assert [(queue, len(ids)) for queue, ids in it.claimed] == [("q0", 5)]
    it.claims.turn(2, 2)
    assert it.asks() == [("q0", 2)]
    assert it.blocks_on() is None


def test_it_asks_for_no_more_than_a_script_should_carry() -> None:
    it = Worker()
    it.claims.turn(10**6, 10**6)
    assert it.asks() == [("q0", LARGEST_CLAIM)]


def test_without_room_it_asks_for_nothing_and_does_not_sleep_on_what_is_not_drained() -> None:
    it = Worker()
    it.claims.turn(0, 0)
    it.found(0, left=9)  # the claim that the start owes
    it.claims.turn(0, 0)
    assert it.asks() == []
    assert it.blocks_on() == set()


def test_an_idle_worker_sleeps_on_the_marker_and_asks_nothing() -> None:
    it = Worker()
    it.asleep()
    for _ in range(5):
        it.claims.turn(3, 3)
    assert it.asks() == []
    assert len(it.blocker.due) == 1
    assert it.claims.all_drained


def test_a_full_reply_may_have_left_more_behind() -> None:
    it = Worker()
    it.claims.turn(3, 3)
    it.found(3, left=0)
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]


def test_a_short_reply_that_left_something_is_asked_again() -> None:
    it = Worker()
    it.claims.turn(3, 3)
    it.found(1, left=2)
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]


def test_who_is_woken_asks() -> None:
    it = Worker()
    it.asleep()
    it.woken()
    it.claims.turn(4, 4)
    assert it.asks() == [("q0", 4)]


def test_who_is_woken_without_room_claims_nothing_so_that_the_marker_is_set_again() -> None:
    it = Worker()
    it.asleep()
    it.woken()
    it.claims.turn(0, 0)
    assert it.asks() == [("q0", 0)]
    it.found(0, left=5)
    it.claims.turn(0, 0)
    assert it.asks() == []  # once is enough: the script has woken another
    it.claims.turn(2, 2)
    assert it.asks() == [("q0", 2)]


def test_a_claim_for_nothing_that_found_nothing_sleeps_again() -> None:
    it = Worker()
    it.asleep()
    it.woken()
    it.claims.turn(0, 0)
    it.found(0, left=0)
    it.claims.turn(0, 0)
    assert it.blocks_on() == {"q0"}


def test_a_wake_up_that_comes_while_a_claim_is_on_its_way_is_not_lost() -> None:
    it = Worker(1, 1)
    it.asleep()
    it.claims.wake(it.queues[0])
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]
    it.woken(0)
    it.found(0)  # what this one found is older than the wake-up
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]
    it.found(0)
    it.claims.turn(3, 3)
    assert it.asks() == []
    assert it.claims.all_drained


def test_a_wake_up_while_a_claim_is_on_its_way_is_paid_for_also_without_room() -> None:
    it = Worker()
    it.asleep()
    it.claims.wake(it.queues[0])
    it.claims.turn(3, 3)
    it.woken()
    it.found(3, left=0)
    it.claims.turn(0, 0)
    assert it.asks() == [("q0", 0)]


def test_nil_from_the_marker_blocks_again_and_asks_nothing() -> None:
    it = Worker()
    it.asleep()
    it.blocker.reply(None)
    it.claims.turn(3, 3)
    assert it.asks() == []
    assert it.blocks_on() == {"q0"}


def test_a_queue_that_runs_dry_later_is_slept_on_as_well() -> None:
    it = Worker(1, 1, strict=False)
    for queue in it.queues:
        queue.owes_claim = False
    it.queues[1].drained = True
    it.claims.turn(2, 2)
    assert it.blocks_on() == {"q1"}
    it.found(0)
    it.claims.turn(2, 2)
    assert it.wire.due[0][0] == ("CLIENT", "UNBLOCK", 17)
    it.claims.turn(2, 2)
    assert len(it.wire.due) == 1  # once
    it.wire.reply(1)
    it.blocker.reply(None)
    it.claims.turn(2, 2)
    assert it.blocks_on() == {"q0", "q1"}


def test_who_was_to_be_woken_before_it_slept_is_woken_again() -> None:
    it = Worker(1, 1, strict=False)
    for queue in it.queues:
        queue.owes_claim = False
    it.queues[1].drained = True
    it.claims.turn(2, 2)
    it.found(0)
    it.claims.turn(2, 2)
    it.wire.reply(0)  # it slept not yet: the server has read this connection first
    it.claims.turn(2, 2)
    assert it.wire.due[0][0] == ("CLIENT", "UNBLOCK", 17)
    it.wire.reply(1)
    it.blocker.reply(None)
    it.claims.turn(2, 2)
    assert it.blocks_on() == {"q0", "q1"}


# -- asked by operators -----------------------------------------------------------------------------------------------


def test_it_hears_what_is_asked_of_it_asleep_or_busy() -> None:
    it = Worker(1, 1)
    it.asleep()
    assert it.hears() == {"q0", "q1"}
    it.blocker.reply([it.queues[1].keys.requests("w").encode(), b"cancel 0123", b"0"])
    assert it.requested == ["cancel 0123"]
    it.claims.turn(1, 1)
    assert it.blocks_on() == {"q0", "q1"}
    assert it.asks() == []
    it.woken()
    it.claims.turn(1, 1)
    it.found(1, left=5)
    it.claims.turn(0, 0)  # everybody is busy, and more waits
    assert it.blocks_on() == {"q1"}
    assert it.hears() == {"q0", "q1"}


def test_while_a_claim_is_on_its_way_it_waits_for_the_reply_before_it_sleeps() -> None:
    it = Worker()
    it.claims.turn(1, 1)
    assert it.blocker.due == []


def test_paused_it_claims_nothing_but_passes_on_the_markers_it_pops() -> None:
    it = Worker()
    it.asleep()
    it.claims.paused = True
    it.woken()
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 0)]
    it.found(0, left=7)
    it.claims.turn(3, 3)
    assert it.asks() == []
    assert it.blocks_on() == set()  # else it would pop the marker at once, again and again
    it.claims.paused = False
    it.claims.wake_all()
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]


def test_under_a_new_name_it_is_asked_by_that_name() -> None:
    it = Worker()
    it.asleep()
    it.claims.worker = "w2"
    it.claims.turn(1, 1)
    assert it.wire.due[0][0] == ("CLIENT", "UNBLOCK", 17)
    it.blocker.reply(None)
    it.claims.turn(1, 1)
    assert it.hears() == {"q0"}


def test_while_nothing_is_claimed_it_hears_what_is_asked_of_it_and_pops_no_markers() -> None:
    it = Worker()
    it.asleep()
    it.blocker.reply(None)  # its time is over
    it.claims.listen()
    assert it.hears() == {"q0"}
    assert it.blocks_on() == set()
    it.claims.turn(1, 1)
    assert it.wire.due[-1][0][:2] == ("CLIENT", "UNBLOCK"), "it may sleep on markers again"


def test_after_the_end_it_hears_what_is_asked_of_it_and_pops_no_markers() -> None:
    it = Worker()
    it.asleep()
    it.claims.close()
    it.claims.blocker_up()
    it.blocker.reply(18)
    it.claims.listen()
    assert it.blocks_on() == set()
    assert it.hears() == {"q0"}


def test_the_first_queue_is_asked_as_soon_as_it_wakes() -> None:
    it = Worker(1, 1)
    it.asleep()
    it.claims.wake(it.queues[1])
    it.claims.turn(2, 2)
    assert it.asks() == [("q1", 2)]
    it.woken(0)
    it.claims.turn(2, 2)
    it.found(2, left=5)  # q1's
    it.claims.turn(2, 2)
    assert it.asks()[0][0] == "q0"


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_claim_whose_reply_is_lost_is_asked_again_when_the_connection_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    it = Worker()
    it.claims.turn(3, 3)
    it.claims.open = False
    it.wire.reply(Lost("gone"))
    assert not it.claims.in_flight
    assert not it.fenced
    assert not caplog.records
    it.claims.turn(3, 3)
    assert it.asks() == []
    it.claims.open = True
    it.claims.wake_all()
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]


def test_a_claim_that_is_refused_is_asked_again_after_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    it = Worker()
    it.claims.turn(3, 3)
    it.wire.reply(hiredis.ReplyError("OOM command not allowed"))
    assert caplog.text.count("OOM command not allowed") == 1
    it.claims.turn(3, 3)
    assert it.asks() == []
    it.loop.fire()
    it.claims.turn(3, 3)
    assert it.asks() == [("q0", 3)]


@pytest.mark.parametrize("strict", [True, False])
def test_a_queue_whose_claims_are_refused_does_not_hold_up_the_others(strict: bool) -> None:
    it = Worker(1, 1, strict=strict)
    it.claims.turn(1, 1)
    assert it.asks() == [("q0", 1), ("q1", 0)]
    it.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    it.found(left=4)
    for _ in range(3):
        it.claims.turn(1, 1)
        assert it.asks() == [("q1", 1)]
        it.found(1)
    it.loop.fire()
    it.claims.turn(1, 1)
    assert "q0" in dict(it.asks())


def test_of_a_queue_in_which_something_may_be_held_that_is_not_here_nothing_is_claimed() -> None:
    it = Worker(1, 1)
    it.queues[0].unkept = True
    for _ in range(3):
        it.claims.turn(1, 1)
        assert it.asks() == [("q1", 1)]
        it.found(1)
    it.queues[1].unkept = True
    it.claims.turn(1, 1)
    assert it.asks() == []
    assert it.blocks_on() is None
    it.queues[0].unkept = False
    it.claims.turn(1, 1)
    assert it.asks() == [("q0", 1)]


def test_from_a_queue_whose_outcomes_are_refused_nothing_is_claimed_until_they_are_taken() -> None:
    it = Worker(1, 1)
    it.claims.bar({"q0"})
    it.claims.turn(1, 1)
    assert it.asks() == [("q1", 1), ("q0", 0)], "the latter for its marker, which this worker has popped"
    it.found()
    it.found(left=2)
    it.claims.turn(1, 1)
    assert it.blocks_on() == {"q1"}, "of what it could not claim another is to hear"
    it.blocker.reply(None)
    it.claims.bar({"q0", "q1"})
    it.claims.turn(1, 1)
    assert it.asks() == []
    assert it.blocks_on() == set()
    assert it.hears() == {"q0", "q1"}
    it.claims.bar(set())
    it.claims.turn(1, 1)
    assert ("q0", 1) in it.asks()


def test_who_was_asleep_when_its_queue_was_barred_passes_the_wake_up_on() -> None:
    it = Worker(1, 1)
    it.asleep()
    it.claims.bar({"q0"})
    it.claims.turn(1, 1)
    it.woken(0)
    it.claims.turn(1, 1)
    assert it.asks() == [("q0", 0)]
    it.found(left=1)
    it.claims.turn(1, 1)
    assert it.asks() == []
    assert it.blocks_on() == {"q1"}


def test_what_has_been_claimed_is_below_the_next_serial() -> None:
    it = Worker()
    for _ in range(3):
        it.claims.turn(2, 2)
        before = it.claims.next_serial
        it.found(2)
        assert max(it.serials) < before
        it.claims.turn(2, 2)
        assert it.claims.next_serial > before
        it.found(2)
        assert min(it.serials[-2:]) >= before


def test_the_claim_that_a_popped_marker_owes_is_still_owed_after_a_refusal() -> None:
    it = Worker()
    it.asleep()
    it.woken()
    it.claims.turn(0, 0)
    assert it.asks() == [("q0", 0)]
    it.wire.reply(hiredis.ReplyError("LOADING"))
    it.loop.fire()
    it.claims.turn(0, 0)
    assert it.asks() == [("q0", 0)]


def test_a_worker_without_its_lease_is_told_so() -> None:
    it = Worker()
    it.claims.turn(3, 3)
    it.wire.reply(hiredis.ReplyError("FENCED the lease of w is gone"))
    assert it.fenced == ["FENCED the lease of w is gone"]


def test_after_the_blocking_connection_broke_everything_is_asked_once() -> None:
    it = Worker(1, 1)
    it.asleep()
    it.blocker.reply(Lost("gone"))
    it.blocker.ready = False
    it.claims.turn(1, 1)
    assert it.blocker.due == []
    it.blocker.ready = True
    it.claims.blocker_up()
    it.blocker.reply(18)
    it.claims.turn(0, 0)
    assert it.asks() == [("q0", 0), ("q1", 0)]


def test_a_refused_block_is_not_repeated_without_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    it = Worker()
    it.asleep()
    it.blocker.reply(hiredis.hiredis.ReplyError("NOPERM"))
    assert "NOPERM" in caplog.text
    it.claims.turn(1, 1)
    it.claims.listen()
    assert it.blocker.due == []
    it.loop.fire()
    it.asleep()  # what was not heard was looked for
    assert len(it.blocker.due) == 1


def test_nothing_is_asked_before_the_lease_is_held_or_while_the_connection_is_down() -> None:
    it = Worker()
    it.claims.open = False
    it.claims.turn(3, 3)
    it.claims.open = True
    it.wire.ready = False
    it.claims.turn(3, 3)
    assert it.asks() == []
    it.wire.ready = True
    it.claims.close()
    it.claims.turn(3, 3)
    assert it.asks() == []


# -- delayed messages -------------------------------------------------------------------------------------------------


def test_a_delayed_message_is_claimed_when_it_is_due() -> None:
    it = Worker()
    it.claims.turn(1, 1)
    it.found(0, next_due_ms=NOW_MS + 5000)
    (timer,) = it.loop.live()
    assert 4.9 < timer.delay_s <= 5.01
    it.claims.turn(1, 1)
    assert it.asks() == []
    it.loop.fire()
    it.claims.turn(1, 1)
    assert it.asks() == [("q0", 1)]


def test_what_is_overdue_is_claimed_at_once() -> None:
    it = Worker()
    it.claims.turn(1, 1)
    it.found(0, next_due_ms=NOW_MS - 5000)
    assert 0 <= it.loop.live()[0].delay_s <= 0.01


def test_each_reply_says_anew_when_the_next_one_is_due() -> None:
    it = Worker()
    for delay_ms in (5000, 3000, 9000, -1):
        it.claims.wake(it.queues[0])
        it.claims.turn(1, 1)
        it.found(0, next_due_ms=NOW_MS + delay_ms if delay_ms >= 0 else -1)
        assert [round(timer.delay_s) for timer in it.loop.live()] == [delay_ms // 1000] * (delay_ms >= 0)


def test_a_busy_worker_does_not_set_a_timer_for_each_reply_that_says_the_same() -> None:
    it = Worker()
    for _ in range(1000):
        it.claims.turn(1, 1)
        it.found(1, left=1, next_due_ms=NOW_MS + 10**9)
    assert len(it.loop.live()) == 1
    assert len(it.loop.timers) <= 50


def test_after_the_end_no_timer_is_left() -> None:
    it = Worker()
    it.claims.turn(1, 1)
    it.found(0, next_due_ms=NOW_MS + 5000)
    it.claims.close()
    assert it.loop.live() == []


# -- handed over ------------------------------------------------------------------------------------------------------


class Listener(Worker):
    """A worker whose second connection hears what the server says unasked."""

    def __init__(self, *weights: int) -> None:
        super().__init__(*weights)
        self.blocker.hears_pushes = True
        self.claims.turn(1, 1)
        for _ in self.queues:
            self.wire.reply([1, -1, 0, [], [], []])  # the first claims, which are made before anybody listens
        self.claims.turn(1, 1)
        for queue in self.queues:
            self.blocker.reply([b"subscribe", queue.keys.inbox("w").encode(), 1])

    def numbers(self) -> list[int]:
        """Of the claims that wait for a reply: with which number they may be answered later; 0 for not at all."""
        return [int(call.arguments[2]) * (call.arguments[3] > 0) for call, _ in self.wire.due if isinstance(call, Call)]

    def wait_for_work(self) -> int:
        """Claim, and find nothing. -> the number of that claim"""
        self.claims.turn(1, 1)
        (number,) = self.numbers()
        self.wire.reply([1, -1, 0, [], [], []])
        return number

    def give(self, number: int, id: bytes = b"m1", worker: str = "w") -> None:
        self.claims.handed_over([b"message", self.queues[0].keys.inbox(worker).encode(), b"%d 2 %bbody" % (number, id)])


def test_who_listens_says_so_with_each_claim_that_has_room() -> None:
    it = Listener()
    it.claims.turn(1, 1)
    assert it.numbers() == [2]
    it.wire.reply([1, -1, 0, [], [], []])
    it.claims.wake(it.queues[0])
    it.claims.turn(0, 0)
    assert it.numbers() == [0], "without room nothing may be handed over"


def test_what_is_handed_over_is_taken_and_the_worker_says_again_that_it_waits() -> None:
    it = Listener()
    it.give(it.wait_for_work())
    assert it.claimed == [("q0", [b"m1"])]
    it.claims.turn(1, 1)
    assert it.numbers() == [3]


def test_what_comes_before_the_reply_of_its_claim_is_not_forgotten_by_it() -> None:
    it = Listener()
    it.claims.turn(1, 1)
    it.give(2)
    it.wire.reply([1, -1, 0, [], [], []])
    it.claims.turn(1, 1)
    assert it.numbers() == [3]


@pytest.mark.parametrize("push_first", [True, False])
@pytest.mark.parametrize("of_latest", [True, False])
def test_who_was_handed_something_while_it_says_that_it_waits_declines_if_it_waits_for_more_and_is_full(
    push_first: bool, of_latest: bool
) -> None:
    """It goes by the claim for which the message was handed over, not by which of the two is read first."""
    it = Listener()
    number = it.wait_for_work()
    it.claims.wake(it.queues[0])
    it.claims.turn(2, 2)
    (latest,) = it.numbers()
    steps = [lambda: it.give(latest if of_latest else number), lambda: it.wire.reply([1, -1, 0, [], [], []])]
    for step in steps if push_first else reversed(steps):
        step()
    it.claims.turn(0, 0)
    assert it.numbers() == ([] if of_latest else [0])


def test_what_was_handed_over_to_what_this_worker_was_before_is_not_taken() -> None:
    it = Listener()
    number = it.wait_for_work()
    it.give(number, worker="old")
    it.claims.worker = "new"
    it.give(number)
    assert it.claimed == []


@pytest.mark.parametrize("why", ["the connection broke", "it stops", "it was voided"])
def test_what_is_on_its_way_then_is_not_taken_but_put_back(why: str) -> None:
    it = Listener()
    number = it.wait_for_work()
    {"the connection broke": it.claims.blocker_up, "it stops": it.claims.close, "it was voided": it.claims.void}[why]()
    it.give(number)
    assert it.claimed == []
    it.claims.keep_if_due()
    it.claims.keep_if_due()
    assert len(it.kept) == 1


def test_it_is_put_back_only_when_no_claim_is_on_its_way() -> None:
    """Its reply would bring what is not known yet, and would be taken for lost."""
    it = Listener()
    it.wait_for_work()
    it.claims.wake(it.queues[0])
    it.claims.turn(1, 1)
    it.claims.void()
    it.claims.keep_if_due()
    assert not it.kept
    it.wire.reply([1, -1, 0, [], [], []])
    it.claims.keep_if_due()
    assert it.kept


def test_what_is_to_be_put_back_waits_for_a_claim_that_is_on_its_way() -> None:
    it = Worker()
    it.claims.turn(1, 1)
    it.claims.keep_soon()
    it.claims.keep_if_due()
    assert not it.kept
    it.found(1)
    it.claims.keep_if_due()
    assert it.kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("NOPERM No permissions. script: f_1, on @user_script:116.", True),
        ("MISCONF can't save", False),
        ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", False),
    ],
)
def test_what_a_claim_may_have_taken_that_was_broken_off_is_put_back(said: str, kept: bool) -> None:
    it = Worker()
    it.claims.turn(1, 1)
    it.wire.reply(hiredis.ReplyError(said))
    it.claims.keep_if_due()
    assert bool(it.kept) is kept


def test_where_nothing_may_have_been_handed_over_nothing_is_put_back() -> None:
    it = Worker()
    it.claims.void()
    it.claims.keep_if_due()
    assert not it.kept


def test_a_refused_subscription_is_not_asked_for_again() -> None:
    it = Worker()
    it.blocker.hears_pushes = True
    it.claims.turn(1, 1)
    it.wire.reply([1, -1, 0, [], [], []])
    it.claims.turn(1, 1)
    it.blocker.reply(hiredis.ReplyError("NOPERM"))
    it.blocker.reply(None)  # BZPOPMIN
    it.claims.turn(1, 1)
    assert [words[0] for words, _ in it.blocker.due] == ["BZPOPMIN"]
    assert it.claims._heard_as == ""


def test_a_worker_whose_last_child_got_work_waits_in_no_other_queue() -> None:
    it = Listener(1, 1)
    for _ in range(2):
        it.claims.turn(1, 1)
        it.wire.reply([1, -1, 0, [], [], []])
    assert all(queue.waits for queue in it.queues)
    it.claims.turn(0, 1)
    assert it.asks() == []
    it.give(it.queues[0].waits)
    it.claims.turn(0, 0)
    assert it.asks() == [("q1", 0)]
    it.wire.reply([1, -1, 0, [], [], []])
    it.claims.turn(0, 0)
    assert it.asks() == []


def test_what_is_handed_over_has_its_place_behind_its_claim_though_it_comes_before_the_reply() -> None:
    it = Listener()
    it.claims.turn(9, 9)
    it.give(2)
    it.wire.reply([1, -1, 0, [b"a", b"b"], [b"", b""], []])
    it.claims.turn(9, 9)
    it.wire.reply([1, -1, 0, [b"c"], [b""], []])
    ids = [id for _, some in it.claimed for id in some]
    assert ids == [b"m1", b"a", b"b", b"c"]
    assert [id for _, id in sorted(zip(it.serials, ids, strict=True))] == [b"a", b"b", b"m1", b"c"]
