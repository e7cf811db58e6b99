"""Every script, on a simulated server and on a real one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from prefork.broker import verbs
from prefork.broker.keys import CLAIMED_PER_MS
from prefork.message import State
from tests.broker.bench import DAY_MS, PAYLOAD, Bench
from tests.conftest import until

SOON = "+60000"
FOREVER_MS = 10**14
DONE = b'{"status":"SUCCESSFUL"}'


def ids(n: int, head: str = "m") -> list[str]:
    """Ids that sort in the order of their making, as UUIDv7 do."""
    return [f"{head}{number:06d}" for number in range(n)]


@contextmanager
def unchanged(bench: Bench) -> Iterator[None]:
    before = bench.everything()
    yield
    assert bench.everything() == before


@contextmanager
def listening(bench: Bench) -> Iterator[list[tuple[str, bytes]]]:
    """What is published in the meantime: (id, status)."""
    heard: list[tuple[str, bytes]] = []
    hub = bench.client.pubsub()
    hub.psubscribe(bench.keys.done_prefix + "*")
    assert hub.get_message(timeout=5)["type"] == "psubscribe"
    yield heard
    bench.client.publish(bench.keys.done_prefix + "end", "end")
    while True:
        said = hub.get_message(timeout=5)
        assert said, "not even the closing word was heard"
        if said["type"] == "pmessage":
            id = said["channel"].decode().removeprefix(bench.keys.done_prefix)
            if id == "end":
                break
            heard.append((id, said["data"]))
    hub.close()


# -- enqueue ----------------------------------------------------------------------------------------------------


def test_messages_are_handed_out_first_in_first_out(bench: Bench) -> None:
    bench.lease("w")
    some = ids(50)
    random.shuffle(some)
    for id in some:
        bench.put(id)
    assert bench.claim("w", 20).ids + bench.claim("w", 100).ids == some


def test_a_message_is_stamped_with_version_time_and_priority_and_kept_as_it_came(bench: Bench) -> None:
    payload = b'{"task":"t"}\n[["\x00\xff\r\n 1 2 3 "],{}]'
    now, new = bench.enqueue([verbs.Entry("q", "a", -7, "", payload)])
    assert new == 1
    assert bench.client.hget(bench.keys.messages, "a") == b"1 %d -7 %s" % (now, payload)
    assert abs(now - bench.client.time()[0] * 1000) < 60_000


def test_a_message_is_accepted_once_however_often_it_is_sent(bench: Bench) -> None:
    entries = [
        verbs.Entry("q", "a", 0, "", PAYLOAD),
        verbs.Entry("q", "b", 9, "", PAYLOAD),
        verbs.Entry("q", "c", 0, SOON, PAYLOAD),
    ]
    assert bench.enqueue(entries)[1] == 3
    bench.sleep()
    with unchanged(bench):  # no second wake-up either
        assert bench.enqueue(entries)[1] == 0
    assert bench.enqueue([*entries, verbs.Entry("q", "d", 0, "", PAYLOAD)])[1] == 1
    assert bench.places() == {"a": ["pending"], "b": ["ranked"], "c": ["scheduled"], "d": ["pending"]}


def test_a_repeat_of_enqueue_adds_nothing_while_the_message_runs(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    assert bench.put("a") == 0
    assert bench.places() == {"a": ["active:w"]}


def test_thousands_of_messages_in_one_command(bench: Bench) -> None:
    some = ids(8_600)
    random.shuffle(some)
    assert bench.put(*some) == 8_600
    assert bench.pending == some


def test_thousands_of_messages_for_other_places_in_one_command(real_bench: Bench) -> None:
    assert real_bench.put(*ids(8_600, "ranked"), priority=3) == 8_600
    assert real_bench.put(*ids(8_600, "later"), at=SOON) == 8_600
    assert len(real_bench.messages) == 2 * 8_600


@pytest.mark.parametrize(
    ("at", "delay_ms"), [("", None), ("+0", None), ("+60000", 60_000), ("1", None), ("0", None)]
)  # fmt: skip
def test_when_a_message_is_to_run(bench: Bench, at: str, delay_ms: int | None) -> None:
    now, _ = bench.enqueue([verbs.Entry("q", "a", 0, at, PAYLOAD)])
    if delay_ms is None:
        assert bench.pending == ["a"]
        assert not bench.scheduled
    else:
        assert bench.scheduled == {"a": now + delay_ms}
        assert not bench.pending


def test_a_point_in_time_is_taken_as_it_is(bench: Bench) -> None:
    due = bench.client.time()[0] * 1000 + 3_600_123
    bench.put("a", at=str(due))
    assert bench.scheduled == {"a": due}


# -- claim ------------------------------------------------------------------------------------------------------


def test_higher_priorities_go_first_and_within_one_the_oldest(bench: Bench) -> None:
    bench.lease("w")
    expected: dict[int, list[str]] = {}
    work = [(priority, f"{n:03d}") for n, priority in enumerate([-100, 5, 0, 100, -1, 0, 5, -100, 99, 1] * 3)]
    for priority, id in work:
        bench.put(id, priority=priority)
        expected.setdefault(priority, []).append(id)
    order = [id for priority in sorted(expected, reverse=True) for id in expected[priority]]
    got: list[str] = []
    while some := bench.claim("w", 4).ids:
        got += some
    assert got == order


def test_a_claim_in_one_piece_has_the_same_order(bench: Bench) -> None:
    bench.lease("w")
    for id, priority in (("a", 0), ("b", -3), ("c", 50), ("d", 0), ("e", 50)):
        bench.put(id, priority=priority)
    claimed = bench.claim("w", 10)
    assert claimed.ids == ["c", "e", "a", "d", "b"]
    assert [int(message.split(b" ", 3)[2]) for message in claimed.messages] == [50, 50, 0, 0, -3]


def test_a_claim_takes_what_was_asked_for_and_says_what_is_left(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(10))
    bench.put("x", priority=-1)
    claimed = bench.claim("w", 4)
    assert (claimed.ids, claimed.left) == (ids(10)[:4], 7)
    assert bench.active("w") == claimed.ids
    held = bench.client.zrange(bench.keys.active("w"), 0, -1, withscores=True)
    first, *others = [int(score) for _, score in held]
    assert first // CLAIMED_PER_MS == claimed.now
    assert others == [first + 1, first + 2, first + 3]  # in order, be it into the next millisecond
    assert claimed.messages == [b"1 %d 0 %s" % (int(m.split(b" ")[1]), PAYLOAD) for m in claimed.messages]


def test_a_thousand_at_once(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(2_500))
    bench.put(*ids(700, "ranked"), priority=9)
    first, second = bench.claim("w", 1_000), bench.claim("w", 1_000)
    assert first.ids == ids(700, "ranked") + ids(300)
    assert second.ids == ids(1_300)[300:]
    assert second.left == 1_200
    assert len(bench.active("w")) == 2_000


def test_an_empty_queue_gives_nothing(bench: Bench) -> None:
    bench.lease("w")
    claimed = bench.claim("w", 5)
    assert (claimed.next_due, claimed.left, claimed.ids, claimed.messages, claimed.states) == (-1, 0, [], [], [])
    assert list(bench.everything()) == [bench.keys.leases]


def test_states_come_with_the_messages_that_have_one(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a", "b")
    bench.claim("w", 1)
    bench.settle("w", ("back", "a", b'{"crashes":1}'))
    assert bench.claim("w", 2).states == [b'{"crashes":1}', None]


def test_due_messages_are_promoted_behind_what_waits_and_by_their_priority(bench: Bench) -> None:
    bench.lease("w")
    bench.put("z-late", "a-late", at=SOON)
    bench.put("high", priority=7, at=SOON)
    bench.put("not-yet", at=SOON)
    bench.put("waits")
    bench.make_due("z-late", "a-late", "high")
    claimed = bench.claim("w", 10)
    assert claimed.ids == ["high", "waits", "z-late", "a-late"]
    assert bench.scheduled == {"not-yet": claimed.next_due}


def test_at_most_256_are_promoted_at_a_time(bench: Bench) -> None:
    bench.lease("w")
    some = ids(600)
    bench.put(*some, at=SOON)
    bench.make_due(*some)
    claimed = bench.claim("w", 0)
    assert (claimed.ids, claimed.left) == ([], 256)
    assert bench.pending == some[:256]
    assert 0 < claimed.next_due < claimed.now, "the master comes at once for the rest"
    assert bench.claim("w", 0).left == 512
    assert bench.claim("w", 0).next_due == -1
    assert bench.pending == some


LARGE = PAYLOAD + b" " * 300_000


@pytest.mark.parametrize("priority", [7, 0, -7])
def test_a_claim_holds_no_more_than_some_hundred_kilobytes_and_the_message_that_exceeds_them(
    bench: Bench, priority: int
) -> None:
    bench.lease("w")
    some = ids(10)
    bench.put(*some, priority=priority, payload=LARGE)
    for start in (0, 3, 6):
        claimed = bench.claim("w", 10)
        assert claimed.ids == some[start : start + 3]
        assert claimed.left == 7 - start
        assert bench.awake
    assert bench.claim("w", 10).ids == some[9:]
    assert not bench.awake


def test_what_is_small_before_what_is_large_does_not_make_a_claim_of_hundreds_of_megabytes(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(40))
    bench.put(*ids(90, "n"), payload=LARGE)
    claimed = bench.claim("w", 130)
    assert len(claimed.ids) <= 40 + 64
    assert claimed.ids == [*ids(40), *ids(90, "n")][: len(claimed.ids)]


def test_no_more_than_some_hundred_kilobytes_are_read_to_promote(bench: Bench) -> None:
    bench.lease("w")
    some = ids(10)
    bench.put(*some, at=SOON, payload=LARGE)
    bench.make_due(*some)
    claimed = bench.claim("w", 0)
    assert bench.pending == some[:3]
    assert 0 < claimed.next_due < claimed.now, "the master comes at once for the rest"


def test_a_claim_passes_over_some_hundreds_of_cancelled_messages_and_the_next_one_goes_on(bench: Bench) -> None:
    bench.lease("w")
    some = ids(700)
    bench.put(*some)
    bench.client.hdel(bench.keys.messages, *some[:-1])
    claimed = bench.claim("w", 1)
    assert not claimed.ids
    assert claimed.left > 0
    assert bench.awake
    assert bench.claim("w", 1).ids == some[-1:]


def test_a_short_delay_passes(bench: Bench) -> None:
    bench.lease("w")
    now, _ = bench.enqueue([verbs.Entry("q", "a", 0, "+30", PAYLOAD)])
    claimed = until(lambda: (found := bench.claim("w", 1)).ids and found)
    assert isinstance(claimed, type(bench.claim("w", 1)))
    assert now + 30 <= claimed.now


def test_cancelled_messages_are_passed_over(bench: Bench) -> None:
    bench.lease("w")
    some = ids(30)
    bench.put(*some)
    for id in some[:12] + some[13:25]:
        assert bench.cancel(id) == "cancelled"
    claimed = bench.claim("w", 6)
    assert claimed.ids == [some[12], *some[25:]]
    assert (claimed.left, bench.pending) == (0, [])
    assert bench.places() == {id: ["active:w"] for id in claimed.ids}


def test_a_queue_of_nothing_but_cancelled_messages_is_drained(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(20))
    for id in ids(20):
        bench.cancel(id)
    claimed = bench.claim("w", 1)
    assert (claimed.ids, claimed.left) == ([], 0)
    assert not bench.awake


@pytest.mark.parametrize("between", [0, 1], ids=["claimed together", "claimed one by one"])
def test_an_id_that_was_cancelled_and_enqueued_again_is_handed_out_at_most_once(bench: Bench, between: int) -> None:
    """A repeat of an enqueue whose reply was lost may come after a cancel."""
    bench.lease("w", "v")
    bench.put("a", "b")
    bench.cancel("a")
    accepted = bench.put("a")
    got = bench.claim("w", 1).ids if between else []
    got += bench.claim("v", 10).ids
    assert sorted(got) == [*["a"][:accepted], "b"]
    assert all(len(places) == 1 for places in bench.places().values()), bench.places()


def test_cancelled_messages_in_a_very_long_list_are_passed_over_too(real_bench: Bench) -> None:
    """So long that `cancel` does not look for them."""
    bench = real_bench
    bench.lease("w")
    some = ids(10_600)
    bench.put(*some)
    gone, again = some[5_000:5_500], some[7_000]
    for id in (*gone, again):
        assert bench.cancel(id) == "cancelled"
        assert bench.inspect(id)[:4] == [b"", None, None, None]
        assert bench.cancel(id) == "finished"
    accepted = bench.put(again)
    got: list[str] = []
    while claimed := bench.claim("w", 1_000).ids:
        got += claimed
    assert got == [id for id in some if id not in gone and id != again] + [again] * accepted
    assert bench.client.hlen(bench.keys.messages) == len(got), "nothing of them stays"
    assert not bench.pending


def test_an_id_that_was_cancelled_and_enqueued_again_for_later_does_not_run_now(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.cancel("a")
    accepted = bench.put("a", at=SOON)
    assert bench.claim("w", 10).ids == [], "it was to wait a minute"
    assert bench.places() == {"a": ["scheduled"]} if accepted else not bench.places()


def test_nothing_is_claimed_from_a_paused_queue(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a", "b")
    bench.put("c", at=SOON)
    bench.put("d", at=SOON)
    bench.make_due("c")
    bench.client.set(bench.keys.paused, 1)
    claimed = bench.claim("w", 10)
    assert (claimed.ids, claimed.left) == ([], 0)
    assert claimed.next_due == bench.scheduled["d"]
    bench.client.delete(bench.keys.paused)
    assert bench.claim("w", 10).ids == ["a", "b", "c"]


def test_a_claim_without_a_lease_is_refused_and_changes_nothing(bench: Bench) -> None:
    bench.put("a")
    bench.put("b", at=SOON)
    bench.make_due("b")
    bench.lease("other")
    with unchanged(bench), pytest.raises(redis.ResponseError, match=r"^FENCED the lease of w is gone"):
        bench.claim("w", 1)


# -- the wake marker --------------------------------------------------------------------------------------------


def test_the_marker_is_set_when_something_can_be_claimed(bench: Bench) -> None:
    assert not bench.awake
    bench.put("a")
    assert bench.awake
    bench.sleep()
    bench.put("b", priority=-5)
    assert bench.awake


def test_the_marker_is_set_for_a_delayed_message_only_if_it_is_the_first_to_be_due(bench: Bench) -> None:
    bench.put("a", at="+60000")
    assert bench.awake
    bench.sleep()
    bench.put("b", at="+70000")
    assert not bench.awake
    bench.put("c", at="+50000")
    assert bench.awake
    bench.sleep()
    bench.enqueue([verbs.Entry("q", "d", 0, "+90000", PAYLOAD), verbs.Entry("q", "e", 0, "+40000", PAYLOAD)])
    assert bench.awake


def test_a_claim_leaves_the_marker_for_another_exactly_if_something_is_left(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(3))
    bench.put("later", at=SOON)
    bench.sleep()
    bench.claim("w", 0)  # woken, but without room: another is to come
    assert bench.awake
    bench.sleep()
    bench.claim("w", 2)
    assert bench.awake
    bench.claim("w", 1)
    assert not bench.awake
    bench.put("x", priority=3)
    bench.sleep()
    bench.claim("w", 0)
    assert bench.awake


def test_promotion_wakes_another_for_what_is_left(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a", "b", at=SOON)
    bench.make_due("a", "b")
    bench.sleep()
    bench.claim("w", 1)
    assert bench.awake


@pytest.mark.parametrize(
    ("record", "awake"),
    [
        (("done", "a", 0, b""), False),
        (("dead", "a", b"{}", 0, b""), False),
        (("drop", "a", 0, b"", "expired"), False),
        (("state", "a", b"{}"), False),
        (("retry", "a", 0, b"{}", 1), True),
        (("retry", "a", 30_000, b"{}", 1), True),
        (("retry", "a", 90_000, b"{}", 1), False),
        (("back", "a", b""), True),
        (("follow", "a", "b", 0, "", PAYLOAD), True),
        (("follow", "a", "b", 5, "", PAYLOAD), True),
        (("follow", "a", "b", 0, "+30000", PAYLOAD), True),
        (("follow", "a", "b", 0, "+90000", PAYLOAD), False),
    ],
)
def test_settle_wakes_another_exactly_if_it_has_to_hear(bench: Bench, record: tuple[Any, ...], awake: bool) -> None:
    bench.lease("w")
    bench.put("a")
    bench.put("later", at=SOON)
    bench.claim("w", 1)
    bench.sleep()
    bench.settle("w", record)
    assert bench.awake is awake


def test_restore_wakes_another_only_if_it_has_moved_something(bench: Bench) -> None:
    bench.lease("w", "v")
    bench.put("a")
    bench.claim("w", 1)
    bench.sleep()
    bench.restore("v", "gone")
    assert not bench.awake
    bench.restore("w", "gone")
    assert bench.awake


# -- settle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def held(bench: Bench) -> Bench:
    """Worker w holds a, b and c (of priority 4); x waits."""
    bench.lease("w", "v")
    bench.put("a", "b")
    bench.put("c", priority=4)
    assert sorted(bench.claim("w", 3).ids) == ["a", "b", "c"]
    bench.put("x")
    bench.sleep()
    return bench


def test_done_without_a_result(held: Bench) -> None:
    with listening(held) as heard:
        assert held.settle("w", plain=["a", "c"])[1] == 2
    assert held.places() == {"b": ["active:w"], "x": ["pending"]}
    assert held.messages == {"b", "x"}
    assert held.stats == {"processed": 2}
    assert heard == [], "nobody waits for a task that keeps no result"


def test_done_with_a_result(held: Bench) -> None:
    with listening(held) as heard:
        held.settle("w", ("done", "a", 60_000, DONE), ("done", "b", 0, b""))
    assert heard == [("a", b"SUCCESSFUL"), ("b", b"SUCCESSFUL")]
    assert (held.result("a"), held.result("b")) == (DONE, None)
    assert 50_000 < held.client.pttl(held.keys.result_prefix + "a") <= 60_000
    assert held.messages == {"c", "x"}
    assert held.stats == {"processed": 2}


def test_a_result_expires(held: Bench) -> None:
    held.settle("w", ("done", "a", 30, DONE))
    until(lambda: held.result("a") is None)
    assert held.inspect("a")[0] == b""


def test_done_takes_the_state_with_it(held: Bench) -> None:
    held.settle("w", ("state", "a", b"1"), ("state", "b", b"2"), ("state", "c", b"3"))
    held.settle("w", ("done", "b", 0, b""), plain=["a"])
    assert held.client.hkeys(held.keys.state) == [b"c"]


def test_retry_after_a_delay(held: Bench) -> None:
    now, settled = held.settle("w", ("retry", "a", 5_000, b'{"retried":1}', 1), ("retry", "c", 7_000, b"{}", 0))
    assert settled == 2
    assert held.scheduled == {"a": now + 5_000, "c": now + 7_000}
    assert held.state("a") == b'{"retried":1}'
    assert held.stats == {"processed": 1, "failed": 1}, "only an attempt that failed counts"
    held.make_due("a", "c")
    assert held.claim("v", 10).ids == ["c", "x", "a"]


def test_retry_at_once_goes_to_the_end(held: Bench) -> None:
    held.settle("w", ("retry", "a", 0, b"{}", 1), ("retry", "c", 0, b"{}", 1))
    assert held.pending == ["x", "a"]
    assert held.ranked == ["c"]


def test_back_goes_to_the_front(held: Bench) -> None:
    held.settle("w", ("back", "b", b""), ("back", "a", b'{"crashes":1}'), ("back", "c", b""))
    assert held.pending == ["a", "b", "x"]
    assert held.ranked == ["c"]
    assert (held.state("a"), held.state("b")) == (b'{"crashes":1}', None)
    assert held.stats == {}


def test_back_without_a_state_keeps_the_one_that_is_there(held: Bench) -> None:
    held.settle("w", ("state", "a", b'{"retried":3}'))
    held.settle("w", ("back", "a", b""))
    assert held.state("a") == b'{"retried":3}'


@pytest.mark.parametrize("id", ["a", "c"])
@pytest.mark.parametrize("record", [("retry", 0, b"{}", 1), ("retry", 5_000, b"{}", 1), ("back", b""), ("back", b"{}")])
def test_what_was_to_be_cancelled_runs_no_more(held: Bench, id: str, record: tuple[Any, ...]) -> None:
    """Its worker had decided what becomes of it when it was told."""
    held.run(verbs.cancel(held.keys, id, 60_000, b"waited", b"ran"))
    with listening(held) as heard:
        assert held.settle("w", (record[0], id, *record[1:]))[1] == 1
    assert heard == [(id, b"FAILED")]
    assert id not in {*held.places(), *held.messages}
    assert (held.state(id), held.result(id)) == (None, b"ran")
    assert held.stats["cancelled"] == 1
    assert not held.client.exists(held.keys.stop_prefix + id)
    assert not held.awake


def test_dead_is_kept_with_message_state_and_result(held: Bench) -> None:
    with listening(held) as heard:
        now, _ = held.settle("w", ("dead", "a", b'{"errors":[]}', 60_000, b"record"), ("dead", "b", b"{}", 0, b""))
    assert heard == [("a", b"FAILED"), ("b", b"FAILED")]
    assert held.client.zrange(held.keys.dead, 0, -1, withscores=True) == [(b"a", now), (b"b", now)]
    assert held.messages == {"a", "b", "c", "x"}
    assert (held.state("a"), held.result("a"), held.result("b")) == (b'{"errors":[]}', b"record", None)
    assert held.stats == {"processed": 2, "failed": 2}


def test_drop_counts_under_the_name_that_it_is_given(held: Bench) -> None:
    with listening(held) as heard:
        held.settle("w", ("drop", "a", 60_000, b"record", "expired"), ("drop", "b", 0, b"", "expired"))
    assert heard == [("a", b"FAILED"), ("b", b"FAILED")]
    assert held.messages == {"c", "x"}
    assert (held.result("a"), held.result("b")) == (b"record", None)
    assert held.stats == {"expired": 2}


def test_state_is_written_only_while_the_message_is_held(held: Bench) -> None:
    assert held.settle("w", ("state", "a", b"1"), ("state", "x", b"2"), ("state", "nowhere", b"3"))[1] == 0
    assert held.client.hgetall(held.keys.state) == {b"a": b"1"}


BATCH: list[tuple[Any, ...]] = [
    ("state", "d6", b"gone in a moment"),
    ("follow", "d1", "f1", 0, "", PAYLOAD),
    ("follow", "d1", "f2", -8, "", PAYLOAD),
    ("follow", "d1", "f3", 0, SOON, PAYLOAD),
    ("done", "d1", DAY_MS, DONE),
    ("done", "d2", 0, b""),
    ("retry", "d3", 9_000, b"{}", 1),
    ("retry", "d4", 0, b"{}", 0),
    ("back", "d5", b""),
    ("back", "d6", b"{}"),
    ("dead", "d7", b"{}", DAY_MS, b"dead"),
    ("drop", "d8", DAY_MS, b"dropped", "expired"),
    ("state", "d9", b"half"),
]


def test_a_batch_of_all_verbs_each_of_which_happens_once(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*(f"d{n}" for n in range(12)))
    bench.claim("w", 11)
    assert bench.settle("w", *BATCH, plain=["d0", "d10"])[1] == 10
    assert bench.places() == {
        "d3": ["scheduled"], "d4": ["pending"], "d5": ["pending"], "d6": ["pending"], "d7": ["dead"],
        "d9": ["active:w"], "d11": ["pending"], "f1": ["pending"], "f2": ["ranked"], "f3": ["scheduled"],
    }  # fmt: skip
    assert bench.pending == ["d6", "d5", "d11", "f1", "d4"]
    assert bench.messages == set(bench.places())
    assert bench.stats == {"processed": 6, "failed": 2, "expired": 1}
    bench.sleep()
    with listening(bench) as heard, unchanged(bench):
        assert bench.settle("w", *BATCH, plain=["d0", "d10"])[1] == 0
    assert heard == []


def test_a_repeat_passes_over_what_another_worker_has_claimed_meanwhile(held: Bench) -> None:
    batch = (("back", "a", b""), ("retry", "b", 0, b"{}", 1))
    held.settle("w", *batch)
    assert held.claim("v", 3).ids == ["a", "x", "b"]
    with unchanged(held):
        assert held.settle("w", *batch)[1] == 0


@pytest.mark.parametrize(
    ("plain", "record"),
    [
        (["a"], None),
        ([], ("done", "a", DAY_MS, DONE)),
        ([], ("retry", "a", 0, b"{}", 1)),
        ([], ("back", "a", b"{}")),
        ([], ("dead", "a", b"{}", DAY_MS, b"")),
        ([], ("drop", "a", DAY_MS, b"", "expired")),
        ([], ("state", "a", b"{}")),
        ([], ("follow", "a", "f", 0, "", PAYLOAD)),
    ],
    ids=["plain", "done", "retry", "back", "dead", "drop", "state", "follow"],
)
def test_what_a_worker_does_not_hold_it_cannot_settle(
    held: Bench, plain: list[str], record: tuple[Any, ...] | None
) -> None:
    with unchanged(held):
        assert held.settle("v", *([record] if record else []), plain=plain)[1] == 0


def test_follow_ups_come_with_the_acknowledgement_and_only_once(held: Bench) -> None:
    follow = ("follow", "a", "child", 2, "", PAYLOAD)
    now, _ = held.settle("w", follow, ("done", "a", 0, b""))
    assert held.ranked == ["child"]
    assert held.client.hget(held.keys.messages, "child") == b"1 %d 2 %s" % (now, PAYLOAD)
    assert held.claim("v", 1).ids == ["child"]
    held.settle("v", plain=["child"])
    with unchanged(held):
        held.settle("w", follow, ("done", "a", 0, b""))


def test_follow_ups_of_a_message_that_was_taken_over_are_not_enqueued(held: Bench) -> None:
    held.restore("w", "keep")
    with unchanged(held):
        held.settle("w", ("follow", "a", "child", 0, "", PAYLOAD), ("done", "a", 0, b""))


def test_follow_ups_wait_for_their_time(held: Bench) -> None:
    due = held.client.time()[0] * 1000 + 77_000
    now, _ = held.settle(
        "w", ("follow", "a", "f1", 0, "+5000", PAYLOAD), ("follow", "a", "f2", 0, str(due), PAYLOAD),
        ("follow", "a", "f3", 0, "1", PAYLOAD), ("done", "a", 0, b""),
    )  # fmt: skip
    assert held.scheduled == {"f1": now + 5_000, "f2": due}
    assert held.pending == ["x", "f3"]


def test_a_settlement_without_a_lease_is_refused_and_changes_nothing(held: Bench) -> None:
    held.client.zrem(held.keys.leases, "w")
    with unchanged(held), pytest.raises(redis.ResponseError, match=r"^FENCED the lease of w is gone"):
        held.settle("w", ("done", "a", DAY_MS, DONE), plain=["b"])


def test_a_thousand_outcomes_in_one_batch(bench: Bench) -> None:
    bench.lease("w")
    some = ids(2_000)
    bench.put(*some)
    bench.claim("w", 1_000)
    bench.claim("w", 1_000)
    records = [("done", id, DAY_MS, DONE) for id in some[1_000:]]
    assert bench.settle("w", *records, plain=some[:1_000])[1] == 2_000
    assert not bench.messages
    assert not bench.active("w")
    assert bench.stats == {"processed": 2_000}
    with unchanged(bench):
        assert bench.settle("w", *records, plain=some[:1_000])[1] == 0


def test_thousands_of_follow_ups_in_one_batch(held: Bench) -> None:
    follows = [("follow", "a", id, 0, "", PAYLOAD) for id in ids(5_000, "f")]
    held.settle("w", *follows, ("done", "a", 0, b""))
    assert held.pending == ["x", *ids(5_000, "f")]


def test_dead_letters_are_bounded_by_number(bench: Bench) -> None:
    bench.lease("w")
    some = ids(12)
    bench.put(*some)
    bench.claim("w", 12)
    for n, id in enumerate(some):
        bench.settle("w", ("dead", id, b"{}", 0, b""), dead_max=5, dead_ttl_ms=FOREVER_MS)
        bench.client.zadd(bench.keys.dead, {id: n}, xx=True)  # as if they had died one after the other
        assert len(bench.dead) == min(n + 1, 5)
    assert bench.dead == some[7:]
    assert bench.messages == set(some[7:])
    assert {id.decode() for id in bench.client.hkeys(bench.keys.state)} == set(some[7:])


def test_far_too_many_dead_letters_go_a_hundred_at_a_time(bench: Bench) -> None:
    bench.lease("w")
    some = ids(400)
    bench.put(*some)
    bench.claim("w", 400)
    bench.settle("w", *(("dead", id, b"{}", 0, b"") for id in some[:-2]))
    bench.client.zadd(bench.keys.dead, {id: n for n, id in enumerate(some[:-2])}, xx=True)
    bench.settle("w", ("dead", some[-2], b"{}", 0, b""), dead_max=10, dead_ttl_ms=FOREVER_MS)
    assert bench.dead == some[100:-1]
    bench.settle("w", ("dead", some[-1], b"{}", 0, b""), dead_max=10, dead_ttl_ms=FOREVER_MS)
    assert bench.dead == some[200:]
    assert bench.messages == set(some[200:])


def test_dead_letters_are_bounded_by_age(bench: Bench) -> None:
    bench.lease("w")
    bench.put("old", "older", "young", "new")
    bench.claim("w", 4)
    now, _ = bench.settle("w", *(("dead", id, b"{}", 0, b"") for id in ("old", "older", "young")))
    bench.client.zadd(bench.keys.dead, {"old": now - 60_001, "older": now - 90_000, "young": now - 1_000}, xx=True)
    bench.settle("w", ("dead", "new", b"{}", 0, b""), dead_ttl_ms=60_000)
    assert bench.dead == ["young", "new"]
    assert bench.messages == {"young", "new"}


# -- restore ----------------------------------------------------------------------------------------------------


def test_restore_puts_all_of_a_gone_worker_back_to_the_front_in_order(bench: Bench) -> None:
    bench.lease("w", "v")
    bench.put(*ids(6))
    bench.put("r1", "r2", priority=3)
    bench.put("r0", priority=-3)
    first = bench.claim("w", 5).ids
    assert first == ["r1", "r2", *ids(3)]
    assert bench.restore("w", "gone") == 5
    assert bench.pending == ids(6)
    assert bench.ranked == ["r1", "r2", "r0"]
    assert not bench.active("w")
    assert bench.client.zrange(bench.keys.leases, 0, -1) == [b"v"]
    assert bench.claim("v", 5).ids == first
    assert bench.restore("w", "gone") == 0


def test_a_restore_that_is_broken_off_leaves_the_lease_so_that_another_takes_over(bench: Bench) -> None:
    bench.lease("w")
    for id, priority in ("a", 5), ("b", 0), ("c", 5):
        bench.put(id, priority=priority)
    bench.claim("w", 3)
    bench.client.hset(bench.keys.pending, "of", "another type")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        bench.restore("w", "gone")
    assert bench.client.zscore(bench.keys.leases, "w")
    assert sorted(bench.active("w")) == ["a", "b", "c"]
    assert not bench.ranked
    bench.client.delete(bench.keys.pending)
    assert bench.restore("w", "gone") == 3
    assert bench.client.zscore(bench.keys.leases, "w") is None
    assert bench.places() == {"a": ["ranked"], "b": ["pending"], "c": ["ranked"]}


def test_restore_goes_by_the_time_of_the_claim(bench: Bench) -> None:
    bench.lease("w")
    bench.put("b", "c", "a")
    for number, id in enumerate(("b", "c", "a")):
        assert bench.claim("w", 1).ids == [id]
        bench.client.zadd(bench.keys.active("w"), {id: number}, xx=True)
    bench.restore("w", "gone")
    assert bench.pending == ["b", "c", "a"]


def test_restore_keeps_the_order_of_one_claim(bench: Bench) -> None:
    """Retries and delayed messages stand in the list in another order than that of their ids."""
    bench.lease("w")
    bench.put("c", "a", "b")
    assert bench.claim("w", 3).ids == ["c", "a", "b"]
    bench.restore("w", "gone")
    assert bench.pending == ["c", "a", "b"]


def test_restore_keeps_the_order_of_claims_within_a_millisecond(bench: Bench) -> None:
    bench.lease("w")
    for _ in range(10):
        bench.put("c", "a", "b")
        ask = bench.client.pipeline(transaction=False)
        for n in (1, 2):
            ask.execute_command(*verbs.claim(bench.keys, "w", n).command(in_full=True))
        ask.execute()
        assert bench.active("w") == ["c", "a", "b"]
        bench.settle("w", plain=["c", "a", "b"])


def test_restore_of_an_expired_lease_only(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    with unchanged(bench):
        assert bench.restore("w", "expired") == -1
    bench.lease("w", ms=20)
    until(lambda: bench.restore("w", "expired") == 1)
    assert bench.places() == {"a": ["pending"]}
    assert not bench.client.exists(bench.keys.leases)
    assert bench.restore("w", "expired") == 0


def test_restore_of_a_lease_that_stands_unmoved(bench: Bench) -> None:
    bench.lease("w", ms=60_000)
    bench.put("a")
    bench.claim("w", 1)
    seen = str(int(bench.client.zscore(bench.keys.leases, "w") or 0))
    bench.lease("w", ms=90_000)
    with unchanged(bench):
        assert bench.restore("w", "unmoved", seen) == -1
    seen = str(int(bench.client.zscore(bench.keys.leases, "w") or 0))
    assert bench.restore("w", "unmoved", seen) == 1
    assert bench.places() == {"a": ["pending"]}
    with unchanged(bench):
        assert bench.restore("w", "unmoved", seen) == -1


def test_restore_of_a_worker_that_never_had_a_lease(bench: Bench) -> None:
    with unchanged(bench):
        assert bench.restore("nobody", "expired") == 0
        assert bench.restore("nobody", "gone") == 0
        assert bench.restore("nobody", "keep") == 0


def test_restore_leaves_a_living_worker_what_it_says_it_holds(bench: Bench) -> None:
    bench.lease("w")
    bench.put(*ids(3_000))
    for _ in range(3):
        bench.claim("w", 1_000)
    kept = ids(3_000)[::2]
    assert bench.restore("w", "keep", *kept) == 1_500
    assert bench.active("w") == kept
    assert bench.pending == ids(3_000)[1::2]
    assert bench.claim("w", 1).ids == [ids(2)[1]], "its lease is not taken away"


def test_restore_does_not_touch_states(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    bench.settle("w", ("state", "a", b'{"retried":2}'))
    bench.restore("w", "gone")
    assert bench.state("a") == b'{"retried":2}'


# -- beat -------------------------------------------------------------------------------------------------------


def test_beat_takes_a_lease_and_tells_of_the_others(bench: Bench) -> None:
    now, next_due, waiting, holds, *leases = bench.run(verbs.beat(bench.keys, "w", 5_000, first=True))
    assert (next_due, waiting, holds, leases) == (-1, 0, 0, [b"w", now + 5_000])
    bench.lease("v", ms=90_000)
    bench.put("a", "b")
    bench.put("c", priority=1)
    bench.put("d", at=SOON)
    bench.claim("w", 1)
    now, next_due, waiting, holds, *leases = bench.run(verbs.beat(bench.keys, "w", 7_000, first=False))
    assert waiting, "pending ones and ranked ones"
    assert holds == 1
    assert next_due == bench.scheduled["d"]
    assert leases[:2] == [b"w", now + 7_000]
    assert leases[2] == b"v"


def test_beat_says_that_nothing_waits_in_a_paused_queue(bench: Bench) -> None:
    bench.put("a")
    bench.client.set(bench.keys.paused, 1)
    assert bench.run(verbs.beat(bench.keys, "w", 5_000, first=True))[2] == 0


def test_a_lease_that_is_gone_is_not_renewed(bench: Bench) -> None:
    bench.lease("v")
    with unchanged(bench), pytest.raises(redis.ResponseError, match=r"^FENCED the lease of w is gone"):
        bench.run(verbs.beat(bench.keys, "w", 5_000, first=False))


def test_a_lease_that_has_ended_but_was_not_taken_away_is_renewed(bench: Bench) -> None:
    bench.lease("w", ms=1)
    until(lambda: bench.client.time()[0] * 1000 + bench.client.time()[1] // 1000
          > int(bench.client.zscore(bench.keys.leases, "w")))  # fmt: skip
    bench.run(verbs.beat(bench.keys, "w", 60_000, first=False))
    assert bench.restore("w", "expired") == -1


# -- cancel, inspect, census ------------------------------------------------------------------------------------


def everywhere(bench: Bench) -> None:
    """One message in each place, named after it."""
    bench.lease("w", "v")
    bench.put("active", "dead", "finished")
    bench.claim("w", 3)
    bench.settle("w", ("dead", "dead", b"dead state", 0, b""), ("done", "finished", DAY_MS, DONE))
    bench.settle("w", ("state", "active", b"active state"))
    bench.put("pending")
    bench.put("ranked", priority=4)
    bench.put("scheduled", at=SOON)


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("pending", "cancelled"),
        ("ranked", "cancelled"),
        ("scheduled", "cancelled"),
        ("active", "running"),
        ("dead", "finished"),
        ("finished", "finished"),
        ("nowhere", "finished"),
    ],
)
def test_cancel(bench: Bench, id: str, said: str) -> None:
    everywhere(bench)
    if said != "cancelled":
        with unchanged(bench), listening(bench) as heard:
            assert bench.cancel(id, DAY_MS) == said
        assert heard == []
        return
    with listening(bench) as heard:
        assert bench.cancel(id, 60_000) == "cancelled"
    assert heard == [(id, b"FAILED")]
    assert bench.result(id) == b'{"status":"FAILED"}'
    assert 50_000 < bench.client.pttl(bench.keys.result_prefix + id) <= 60_000
    assert bench.stats["cancelled"] == 1
    assert bench.inspect(id)[0] == b"finished"
    assert id not in {*bench.messages, *bench.ranked, *bench.scheduled}
    assert bench.cancel(id, 60_000) == "finished"
    assert id not in bench.claim("v", 10).ids


def test_a_repeat_of_a_cancel_says_so_of_what_it_has_cancelled_itself(bench: Bench) -> None:
    bench.put("a")
    bench.cancel("a", 60_000)
    for record, again, said in ((b"other", True, b"finished"), (b'{"status":"FAILED"}', False, b"finished"),
                                (b'{"status":"FAILED"}', True, b"cancelled")):  # fmt: skip
        assert bench.run(verbs.cancel(bench.keys, "a", 60_000, record, again=again)) == said
    assert bench.stats["cancelled"] == 1


def test_cancel_keeps_no_result_if_none_is_wanted(bench: Bench) -> None:
    bench.put("a")
    bench.cancel("a", 0)
    assert bench.result("a") is None
    assert bench.inspect("a")[0] == b""


def test_cancel_takes_the_state_of_a_retry_with_it(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    bench.settle("w", ("retry", "a", 60_000, b"{}", 1))
    assert bench.cancel("a") == "cancelled"
    assert not bench.client.exists(bench.keys.state, bench.keys.scheduled, bench.keys.messages)


def test_inspect_each_place(bench: Bench) -> None:
    everywhere(bench)
    due = bench.scheduled["scheduled"]
    for id in ("pending", "ranked"):
        place, message, state, result, worker, _ = bench.inspect(id)
        assert (place, state, result, worker) == (b"pending", None, None, b"")
        assert message.endswith(PAYLOAD)
    place, _, _, _, _, score = bench.inspect("scheduled")
    assert (place, int(float(score))) == (b"scheduled", due)
    place, _, state, _, worker, score = bench.inspect("active")
    assert (place, state, worker) == (b"active", b"active state", b"w")
    assert int(float(score)) == int(bench.client.zscore(bench.keys.active("w"), "active")) // CLAIMED_PER_MS
    place, message, state, _, _, score = bench.inspect("dead")
    assert (place, state) == (b"dead", b"dead state")
    assert int(float(score)) == int(bench.client.zscore(bench.keys.dead, "dead"))
    assert bench.inspect("finished") == [b"finished", None, None, DONE, b"", b"0"]
    assert bench.inspect("nowhere") == [b"", None, None, None, b"", b"0"]


def test_inspect_of_a_dead_letter_has_its_result_too(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    bench.settle("w", ("dead", "a", b"s", DAY_MS, b"record"))
    assert (bench.inspect("a")[0], bench.inspect("a")[3]) == (b"dead", b"record")


def test_census(bench: Bench) -> None:
    everywhere(bench)
    bench.claim("v", 1)
    bench.put("next", "after")
    now, *counts, stats, leases, first, message, state = bench.run(verbs.census(bench.keys))
    assert counts == [3, 1, 2, 1, 0, 7]
    assert abs(now - bench.client.time()[0] * 1000) < 60_000
    assert dict(zip(stats[::2], stats[1::2], strict=True)) == {b"processed": b"2", b"failed": b"1"}
    assert sorted(leases[::2]) == [b"v", b"w"]
    assert int(leases[1]) > now
    assert (first, message[-len(PAYLOAD) :], state) == (b"pending", PAYLOAD, None)
    bench.client.set(bench.keys.paused, 1)
    assert bench.run(verbs.census(bench.keys))[1:7] == [3, 1, 2, 1, 1, 7]


def test_census_of_an_empty_queue(bench: Bench) -> None:
    assert bench.run(verbs.census(bench.keys))[1:] == [0, 0, 0, 0, 0, 0, [], []]


def test_census_does_not_count_what_was_cancelled(bench: Bench) -> None:
    bench.put(*ids(3))
    bench.put(*ids(3, "r"), priority=1)
    for id in (*ids(2), *ids(2, "r")):
        bench.cancel(id)
    counted = bench.run(verbs.census(bench.keys))
    assert counted[1] == 2
    assert counted[9] == ids(3)[2].encode()


def test_queues_do_not_touch_each_other(bench: Bench) -> None:
    other = Bench(bench.client, "other")
    other.lease("w")
    other.put("a", "b")
    other.claim("w", 1)
    before = {key: value for key, value in bench.everything().items() if "{other}" in key}
    everywhere(bench)
    bench.restore("w", "gone")
    assert {key: value for key, value in bench.everything().items() if "{other}" in key} == before


# -- a server that is out of memory -----------------------------------------------------------------------------


@pytest.fixture
def full(real_bench: Bench) -> Iterator[Bench]:
    """Worker w holds a and b; c waits, d is delayed; then the server has no memory left."""
    bench = real_bench
    bench.lease("w")
    bench.put("a", "b", "c")
    bench.put("d", at=SOON)
    bench.claim("w", 2)
    bench.client.config_set("maxmemory-policy", "noeviction")
    bench.client.config_set("maxmemory", 1)
    yield bench
    bench.client.config_set("maxmemory", 0)


def test_a_full_server_accepts_nothing(full: Bench) -> None:
    with unchanged(full), pytest.raises(redis.exceptions.OutOfMemoryError):
        full.put("e")


def test_a_full_server_lets_workers_keep_their_leases(full: Bench) -> None:
    before = full.client.zscore(full.keys.leases, "w")
    full.run(verbs.beat(full.keys, "w", 120_000, first=False))
    assert full.client.zscore(full.keys.leases, "w") > before


@pytest.mark.parametrize("n", [0, 1])
def test_a_full_server_lets_workers_claim(full: Bench, n: int) -> None:
    assert full.claim("w", n).ids == ["c"][:n]


@pytest.mark.parametrize(
    "record",
    [
        ("done", "a", DAY_MS, DONE),
        ("retry", "a", 5_000, b"{}", 1),
        ("back", "a", b"{}"),
        ("dead", "a", b"{}", DAY_MS, b"{}"),
        ("drop", "a", DAY_MS, b"{}", "expired"),
    ],
    ids=lambda record: record[0],
)
@pytest.mark.parametrize("before", [None, ("state", "b", b"{}")], ids=["alone", "after a progress report"])
def test_a_full_server_takes_outcomes(full: Bench, before: tuple[Any, ...] | None, record: tuple[Any, ...]) -> None:
    records = [before, record] if before else [record]
    assert full.settle("w", *records)[1] == 1
    assert full.active("w") == ["b"]


def test_a_full_server_takes_outcomes_with_follow_ups(full: Bench) -> None:
    full.settle("w", ("follow", "a", "child", 0, "", PAYLOAD), ("done", "a", DAY_MS, DONE))
    assert "child" in full.pending


def test_a_full_server_lets_messages_be_restored(full: Bench) -> None:
    assert full.restore("w", "gone") == 2
    assert full.pending == ["a", "b", "c"]


# -- takeovers --------------------------------------------------------------------------------------------------------


def die(bench: Bench, n: int, mode: str = "gone", most: int = 3) -> Any:
    """Let a worker claim all there is and die, n times. -> what the last takeover said"""
    for _ in range(n):
        bench.lease("w")
        bench.claim("w", 10)
        said = bench.run(verbs.restore(bench.keys, "w", mode, (), most))
    return said


def test_what_takes_every_worker_down_is_a_dead_letter_in_the_end(bench: Bench) -> None:
    bench.put("a", "b")
    assert die(bench, 2) == 2
    bench.lease("v")
    assert bench.claim("v", 10).ids == ["a", "b"]
    bench.settle("v", plain=["b"])
    bench.restore("v", "left")
    assert die(bench, 1) == [1, 1]
    assert bench.client.zrange(bench.keys.dead, 0, -1) == [b"a"]
    assert bench.client.llen(bench.keys.pending) == 0
    state = State.decode(bench.client.hget(bench.keys.state, "a"))
    assert [error["class"] for error in state.errors] == ["prefork.WorkerDied"]
    assert "held by a worker that died, 3 times; the last one was w" in state.errors[0]["message"]


def test_the_count_of_takeovers_expires_from_the_first_one_on(bench: Bench) -> None:
    bench.put("a")
    die(bench, 1)
    assert 0 < bench.client.pttl(bench.keys.takeovers) <= 7 * 86_400_000


def test_a_takeover_keeps_what_is_known_and_who_leaves_by_itself_charges_nothing(bench: Bench) -> None:
    bench.put("a")
    before = State(
        attempts=2, retried=1, started_ms=1764000000000, errors=[{"class": "x", "ran_s": 0.25}], workers=["u"]
    )
    bench.client.hset(bench.keys.state, "a", before.encode())
    die(bench, 9, "left")
    die(bench, 2)
    assert bench.client.llen(bench.keys.pending) == 1
    die(bench, 1)
    after = State.decode(bench.client.hget(bench.keys.state, "a"))
    assert after.errors.pop()["class"] == "prefork.WorkerDied"
    assert after == before


def test_a_dead_letter_that_is_retried_has_all_its_chances_again(bench: Bench) -> None:
    bench.put("a")
    die(bench, 3)
    bench.run(verbs.revive(bench.keys, ["a"]))
    assert die(bench, 2) == 1
    assert 0 < bench.client.pttl(bench.keys.takeovers) <= 7 * 86_400_000


# -- revive -----------------------------------------------------------------------------------------------------------

SPENT = State(
    attempts=7, retried=5, crashes=2, unknown=1, due_ms=1764000000000, started_ms=1763000000000, workers=["u"],
    errors=[{"class": "x", "message": '"retried":9, "crashes":9}', "ran_s": 0.1}], progress=[1, 2, "[half]}"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SPENT.encode(), replace(SPENT, retried=0, crashes=0, unknown=0, due_ms=0, progress=None)),
        (b'{"due_ms":5,"retried":1,"attempts":2,"crashes":3}', State(attempts=2)),
        (State().encode(), State()),
        (b"{ }", State()),
        (b"[1]", State()),
        (b"\xff garbage", State()),
        (None, State()),
    ],
    ids=["all", "another order", "nothing", "nothing but a space", "a list", "garbage", "none"],
)
def test_a_revived_message_is_forgiven_and_keeps_its_history(bench: Bench, before: bytes | None, after: State) -> None:
    bench.put("a")
    bench.client.lrem(bench.keys.pending, 1, "a")
    bench.client.zadd(bench.keys.dead, {"a": 1})
    if before is not None:
        bench.client.hset(bench.keys.state, "a", before)
    assert bench.run(verbs.revive(bench.keys, ["a", "a", "b"])) == [3, 1]
    assert bench.pending == ["a"]
    raw = bench.client.hget(bench.keys.state, "a")
    assert State.decode(raw) == after
    assert (raw is None) == (before is None)


def test_a_revival_stops_after_a_quarter_of_a_megabyte(bench: Bench) -> None:
    ids = [f"{n:02}" for n in range(30)]
    bench.put(*ids, payload=PAYLOAD + b" " * 100_000)
    bench.client.delete(bench.keys.pending)
    bench.client.zadd(bench.keys.dead, dict.fromkeys(ids, 1))
    assert bench.run(verbs.revive(bench.keys, ids)) == [3, 3]
    assert bench.pending == ids[:3]
