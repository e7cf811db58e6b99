"""What the broker refuses in the middle of a script, as with a key of the wrong type: nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from prefork.broker import verbs
from prefork.broker.client import Client
from prefork.errors import BrokerError
from tests.broker.bench import DAY_MS, PAYLOAD, Bench
from tests.conftest import Server

SOON = "+60000"


@contextmanager
def spoiled(bench: Bench, key: str) -> Iterator[None]:
    """What is in a key is elsewhere, and something of another type in its place."""
    was = bench.client.exists(key)
    if was:
        bench.client.rename(key, key + "?")
    bench.client.set(key, "spoiled")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        yield
    bench.client.delete(key)
    if was:
        bench.client.rename(key + "?", key)


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("pending", (0, "")), ("ranked", (3, "")), ("scheduled", (0, SOON)), ("wake", (0, "")), ("wake", (-3, "")),
        ("wake", (0, SOON)),
    ],
)  # fmt: skip
def test_what_could_not_be_placed_is_not_accepted(bench: Bench, key: str, entry: tuple[int, str]) -> None:
    entries = [verbs.Entry("q", id, *entry, PAYLOAD) for id in "abc"]
    spoiled_key = getattr(bench.keys, key)
    with spoiled(bench, spoiled_key):
        bench.enqueue(entries)
    assert bench.messages == set()
    assert bench.run(verbs.enqueue(bench.keys, entries, again=True))[1] == 3
    bench.lease("w")
    if not entry[1]:
        assert sorted(bench.claim("w", 9).ids) == ["a", "b", "c"]


def test_a_producer_is_told_so_each_time(server: Server) -> None:
    bench, client = Bench(server.client), Client(server.url, "t", 5.0)
    client.enqueue("q", [verbs.Entry("q", "a", 0, "", PAYLOAD)])
    server.client.delete("t:{q}:pending")
    server.client.set("t:{q}:pending", "spoiled")
    for id in "bcd":
        with pytest.raises(BrokerError, match="WRONGTYPE"):
            client.enqueue("q", [verbs.Entry("q", id, 0, "", PAYLOAD)])
    assert bench.client.hkeys("t:{q}:m") == [b"a"]
    server.client.delete("t:{q}:pending")
    client.enqueue("q", [verbs.Entry("q", "e", 0, "", PAYLOAD)])
    client.close()


RECORDS = {
    "retry": ("retry", "a", 60_000, b"{}", 1),
    "again": ("retry", "a", 0, b"{}", 1),
    "back": ("back", "a", b'{"crashes":1}'),
    "dead": ("dead", "a", b"{}", DAY_MS, b"died"),
    "done": ("done", "a", DAY_MS, b"done"),
    "follow": ("follow", "a", "child", 0, SOON, PAYLOAD),
}


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("retry", "scheduled"), ("retry", "state"), ("again", "pending"), ("back", "pending"), ("back", "state"),
        ("dead", "dead"), ("follow", "scheduled"),
    ],
)  # fmt: skip
def test_an_outcome_that_was_refused_is_settled_when_it_is_said_again(bench: Bench, verb: str, key: str) -> None:
    """And those beside it at once."""
    bench.lease("w")
    bench.put("a", "b", "c", "d")
    bench.claim("w", 4)
    batch = [RECORDS[verb], ("done", "b", DAY_MS, b"done b"), ("drop", "c", DAY_MS, b"late", "expired")]
    if verb == "follow":
        batch.append(RECORDS["done"])
    for _ in range(3):
        with spoiled(bench, getattr(bench.keys, key)):
            bench.settle("w", *batch, plain=["d"])
        # Where the histories are spoiled, nothing can be forgotten either.
        assert bench.active("w") == (["a", "b", "c", "d"] if key == "state" else ["a"])
        assert bench.messages >= {"a"}
    settled = bench.settle("w", *batch, plain=["d"])[1]
    assert settled == (4 if key == "state" else 1)
    assert bench.active("w") == []
    assert (bench.result("b"), bench.result("c")) == (b"done b", b"late")
    assert bench.stats["processed"] == (2 if verb == "back" else 3)
    where = {"retry": "scheduled", "again": "pending", "back": "pending", "dead": "dead"}
    if verb == "follow":
        assert bench.places() == {"child": ["scheduled"]}
        assert bench.messages == {"child"}
    else:
        assert bench.places() == {"a": [where[verb]]}


def test_what_was_to_be_cancelled_stays_so_while_it_is_refused(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a")
    bench.claim("w", 1)
    bench.run(verbs.cancel(bench.keys, "a", DAY_MS, b"waited", b"ran"))
    for _ in range(2):
        with spoiled(bench, bench.keys.state):
            bench.settle("w", ("back", "a", b""))
    bench.settle("w", ("back", "a", b""))
    assert (bench.places(), bench.messages, bench.result("a")) == ({}, set(), b"ran")
    assert bench.stats["cancelled"] == 1


@pytest.mark.parametrize("key", ["active", "idle", "state"])
@pytest.mark.parametrize("priority", [0, 5, -5])
def test_a_claim_that_is_refused_leaves_all_where_they_are_or_active(bench: Bench, key: str, priority: int) -> None:
    bench.put("a", "b", "c", priority=priority)
    bench.put("d", at="+1")
    bench.make_due("d")
    bench.lease("w")
    broken = bench.keys.active("w") if key == "active" else getattr(bench.keys, key)
    for _ in range(3):
        with spoiled(bench, broken):
            bench.run(verbs.claim(bench.keys, "w", 1, 1, 9))
        bench.restore("w", "keep")
    assert sorted(bench.claim("w", 9).ids) == ["a", "b", "c", "d"]


def test_who_may_not_trim_a_list_claims_nothing_from_it(server: Server) -> None:
    bench = Bench(server.client)
    bench.put("a", "b")
    bench.lease("w")
    server.client.execute_command("ACL", "SETUSER", "half", "on", "nopass", "~*", "&*", "+@all", "-ltrim")
    with redis.Redis(unix_socket_path=str(server.path), username="half", password="x") as client:
        half = Bench(client)
        for _ in range(3):
            with pytest.raises(redis.ResponseError, match=r"NOPERM|can't run this command|no permissions"):
                half.claim("w", 9)
            half.restore("w", "keep")
    assert bench.pending == ["a", "b"]
    server.client.execute_command("ACL", "DELUSER", "half")


@pytest.mark.parametrize("key", ["pending", "ranked"])
def test_a_restore_that_is_refused_again_and_again_makes_no_copies_and_charges_nothing(bench: Bench, key: str) -> None:
    bench.put("a", "b")
    bench.put("c", "d", priority=3)
    bench.lease("w", "v")
    bench.claim("w", 9)
    for _ in range(4):
        with spoiled(bench, getattr(bench.keys, key)):
            bench.run(verbs.restore(bench.keys, "w", "gone", (), 2))
    assert bench.run(verbs.restore(bench.keys, "w", "gone", (), 2)) == (4 if key == "pending" else 2)
    assert bench.claim("v", 9).ids == ["c", "d", "a", "b"]
    assert bench.dead == []


def test_what_a_refused_restore_has_moved_is_charged_and_does_not_move_again(bench: Bench) -> None:
    bench.put("x")
    bench.lease("w", "v", "u")
    bench.claim("w", 9)
    bench.client.hset(bench.keys.takeovers, "x", 1)
    bench.put("f")
    bench.put("r", priority=3)
    bench.claim("w", 9)
    bench.sleep()
    with spoiled(bench, bench.keys.dead):
        bench.run(verbs.restore(bench.keys, "w", "gone", (), 2))
    assert bench.awake
    assert bench.claim("v", 9).ids == ["r", "f"]
    with spoiled(bench, bench.keys.dead):
        bench.run(verbs.restore(bench.keys, "w", "gone", (), 2))
    assert bench.claim("u", 9).ids == []
    assert bench.active("w") == ["x"]
    assert bench.client.hgetall(bench.keys.takeovers) == {b"x": b"1", b"f": b"1", b"r": b"1"}
    assert bench.run(verbs.restore(bench.keys, "w", "gone", (), 2)) == [1, 1]
    assert bench.dead == ["x"]


def test_a_worker_starts_although_one_of_its_queues_is_spoiled(server: Server) -> None:
    server.client.set("t:{q}:pending", "spoiled")
    client = Client(server.url, "t")
    client.rehearse(["q", "other"])
    client.close()


def test_counters_that_are_spoiled_hold_up_no_outcome_and_none_is_counted_twice(bench: Bench) -> None:
    bench.lease("w")
    bench.put("a", "b", "c")
    bench.claim("w", 3)
    bench.client.set(bench.keys.stats, "spoiled")
    assert bench.settle("w", ("drop", "a", 0, b"", "expired"))[1] == 1
    bench.client.delete(bench.keys.stats)
    for _ in range(3):
        with spoiled(bench, bench.keys.state):
            bench.settle("w", ("drop", "b", 0, b"", "expired"), ("done", "c", 0, b""))
    bench.settle("w", ("drop", "b", 0, b"", "expired"), ("done", "c", 0, b""))
    assert bench.stats == {"expired": 1, "processed": 1}


@pytest.mark.parametrize("priority", [0, 5])
def test_dead_letters_that_cannot_be_revived_stay_dead(bench: Bench, priority: int) -> None:
    bench.lease("w")
    bench.put("a", "b", priority=priority)
    bench.claim("w", 2)
    bench.settle("w", ("dead", "a", b"{}", 0, b""), ("dead", "b", b"{}", 0, b""))
    with spoiled(bench, bench.keys.ranked if priority else bench.keys.pending):
        bench.run(verbs.revive(bench.keys, ["a", "b"]))
    assert bench.dead == ["a", "b"]
    assert bench.run(verbs.revive(bench.keys, ["a", "b", "a"])) == [3, 2]
    assert bench.claim("w", 9).ids == ["a", "b"]


def test_a_cancellation_is_told_even_if_nobody_may_hear_of_it(server: Server) -> None:
    bench = Bench(server.client)
    bench.put("a")
    server.client.execute_command("ACL", "SETUSER", "deaf", "on", "nopass", "~*", "resetchannels", "+@all")
    with redis.Redis(unix_socket_path=str(server.path), username="deaf", password="x") as client:
        assert Bench(client).cancel("a", DAY_MS) == "cancelled"
    server.client.execute_command("ACL", "DELUSER", "deaf")
