"""A message that is enqueued while a worker waits goes straight to it: active there, and told with the wake-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from prefork.broker import verbs
from tests.broker.bench import PAYLOAD, Bench


@contextmanager
def connected(bench: Bench, *workers: str) -> Iterator[list[tuple[str, bytes]]]:
    """These workers listen. -> what they were given so far: (worker, what came)"""
    heard: list[tuple[str, bytes]] = []
    hub = bench.client.pubsub()
    hub.subscribe(*map(bench.keys.inbox, workers))
    for _ in workers:
        assert hub.get_message(timeout=5)["type"] == "subscribe"
    yield heard
    bench.client.publish(bench.keys.inbox(workers[0]), "end")
    while (said := hub.get_message(timeout=5))["data"] != b"end":
        heard.append((said["channel"].decode().removeprefix(bench.keys.inbox_prefix), said["data"]))
    hub.close()


def wait_for_work(bench: Bench, worker: str, number: int = 7, n: int = 1) -> None:
    """Claim, find too little, and say so."""
    bench.run(verbs.claim(bench.keys, worker, n, number, n))


def heard_by(bench: Bench, worker: str, act: Any) -> list[tuple[str, bytes]]:
    with connected(bench, worker) as heard:
        act()
    return heard


def test_a_worker_that_waits_is_given_the_message_with_the_wake_up(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w", 7)
    ((worker, told),) = heard_by(bench, "w", lambda: bench.put("abc"))
    number, size, rest = told.split(b" ", 2)
    assert (worker, number, size, rest[:3]) == ("w", b"7", b"3", b"abc")
    assert rest[3:] == bench.client.hget(bench.keys.messages, "abc")
    assert bench.places() == {"abc": ["active:w"]}
    assert not bench.awake, "nobody else needs to look"
    assert bench.settle("w", plain=["abc"])[1] == 1
    assert not bench.messages


def test_each_wait_is_good_for_one_message(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    heard = heard_by(bench, "w", lambda: [bench.put(id) for id in "abc"])
    assert len(heard) == 1
    assert bench.places() == {"a": ["active:w"], "b": ["pending"], "c": ["pending"]}
    assert bench.awake


def test_whoever_has_claimed_least_is_first(bench: Bench) -> None:
    bench.lease("v", "w")
    wait_for_work(bench, "v", 9)
    wait_for_work(bench, "w", 8)
    with connected(bench, "v", "w") as heard:
        bench.put("a")
        bench.put("b")
    assert [worker for worker, _ in heard] == ["w", "v"]


@pytest.mark.parametrize("priority", [-3, 0, 5])
def test_of_any_priority_if_nothing_else_waits(bench: Bench, priority: int) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    assert heard_by(bench, "w", lambda: bench.put("a", priority=priority))
    assert bench.places() == {"a": ["active:w"]}


def before(bench: Bench, why: str) -> None:
    """What keeps a message from being handed over."""
    if why == "something waits":
        bench.client.rpush(bench.keys.pending, "earlier")
    elif why == "something of a priority waits":
        bench.client.zadd(bench.keys.ranked, {"earlier": 5})
    elif why == "the queue is paused":
        bench.run(verbs.pause(bench.keys, on=True))
    elif why == "it has claimed since, without room":
        bench.claim("w", 0)
    elif why == "it does not listen":
        bench.claim("w", 1)
    elif why == "it has told what it holds":
        bench.restore("w", "keep")
    elif why == "it was taken over":
        bench.restore("w", "gone")


WHY_NOT = [
    "something waits", "something of a priority waits", "the queue is paused", "it has claimed since, without room",
    "it does not listen", "it has told what it holds", "it was taken over",
]  # fmt: skip


@pytest.mark.parametrize("why", WHY_NOT)
def test_otherwise_it_waits_for_a_claim(bench: Bench, why: str) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    before(bench, why)
    assert not heard_by(bench, "w", lambda: bench.put("a"))
    assert bench.places()["a"] == ["pending"]
    assert bench.awake


def test_a_worker_whose_connection_is_gone_is_passed_over(bench: Bench) -> None:
    bench.lease("v", "w")
    wait_for_work(bench, "v", 1)
    wait_for_work(bench, "w", 2)
    assert [worker for worker, _ in heard_by(bench, "w", lambda: bench.put("a"))] == ["w"]
    assert bench.places() == {"a": ["active:w"]}


def test_where_nobody_listens_any_more_it_is_pending(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    bench.put("a")
    assert bench.places() == {"a": ["pending"]}
    assert bench.awake


def test_many_at_once_and_delayed_ones_are_not_handed_over(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")

    def enqueue() -> None:
        bench.put("a", "b")
        bench.put("c", at="+60000")

    assert not heard_by(bench, "w", enqueue)
    assert bench.places() == {"a": ["pending"], "b": ["pending"], "c": ["scheduled"]}


def test_a_repeat_gives_it_to_nobody(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    entry = verbs.Entry("q", "a", 0, "", PAYLOAD)

    def enqueue() -> None:
        bench.enqueue([entry])
        wait_for_work(bench, "w", 8, n=2)
        bench.run(verbs.enqueue(bench.keys, [entry], again=True))

    assert len(heard_by(bench, "w", enqueue)) == 1
    assert bench.places() == {"a": ["active:w"]}


def test_what_was_handed_over_and_is_not_known_goes_back_to_the_front(bench: Bench) -> None:
    bench.lease("w")
    wait_for_work(bench, "w")
    heard_by(bench, "w", lambda: bench.put("a"))
    bench.put("b")
    assert bench.restore("w", "keep") == 1
    assert bench.pending == ["a", "b"]


@pytest.mark.parametrize("banned", ["-exists", "-zpopmin", "-publish", "resetchannels"])
def test_a_user_who_may_not_hand_over_has_it_claimed(real_bench: Bench, banned: str) -> None:
    bench = real_bench
    bench.lease("w")
    wait_for_work(bench, "w")
    bench.client.execute_command("ACL", "SETUSER", "timid", "reset", "on", "nopass", "~*", "&*", "+@all", banned)
    how = bench.client.connection_pool.connection_kwargs | {"username": "timid", "password": "any"}
    timid = redis.Redis(connection_pool=redis.ConnectionPool(bench.client.connection_pool.connection_class, **how))
    with connected(bench, "w") as heard:
        call = verbs.enqueue(bench.keys, [verbs.Entry("q", "a", 0, "", PAYLOAD)])
        timid.execute_command(*call.command(in_full=True))
    timid.close()
    assert not heard
    assert bench.places() == {"a": ["pending"]}
    assert bench.awake


def test_a_claim_that_found_enough_for_those_who_have_nothing_waits_for_no_more(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a", "b")
    bench.run(verbs.claim(bench.keys, "w", 10, 1, 2))
    assert not heard_by(bench, "w", lambda: bench.put("c"))
    bench.run(verbs.claim(bench.keys, "w", 10, 2, 2))
    assert heard_by(bench, "w", lambda: bench.put("d"))
    assert bench.places() == {id: ["active:w"] for id in "abcd"}
