"""Whatever happens to it, a message is in exactly one place: random scripts against a simple model of a queue."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from prefork.broker import verbs
from tests.broker.bench import DAY_MS, PAYLOAD, Bench

WORKERS = ("v", "w")
DEAD_MAX = 1
ROOM = 2  # messages that a worker takes at a time
PICK = st.integers(0, 1000)  # no draw depends on what a server with a clock has said
VERBS = ("plain", "done", "retry", "again", "back", "dead", "drop", "state", "follow")


@dataclass
class Worker:
    """What one master knows."""

    leased: bool = False
    held: list[str] = field(default_factory=list)
    drained: bool = False  # it blocks on the marker
    next_due: int = -1  # when its timer will claim

    @property
    def room(self) -> int:
        return max(0, ROOM - len(self.held))

    @property
    def comes_by_itself(self) -> bool:
        """Whether it will claim without being woken."""
        return self.leased and not self.drained and self.room > 0


class Queue(RuleBasedStateMachine):
    """A queue, two workers and a producer."""

    def __init__(self, client: Any) -> None:
        super().__init__()
        client.flushall()
        self.bench = Bench(client)
        self.workers = {name: Worker() for name in WORKERS}
        self.serial = 0
        self.pending: list[str] = []
        self.ranked: dict[str, int] = {}
        self.scheduled: dict[str, int] = {}
        self.dead: dict[str, int] = {}
        self.priorities: dict[str, int] = {}  # of all that are accepted and not finished
        self.states: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self.stats = dict.fromkeys(("processed", "failed", "expired", "cancelled"), 0)
        self.paused = self.awake = False

    # -- the model's moves --------------------------------------------------------------------------------------

    def new_id(self) -> str:
        self.serial += 1
        return f"m{self.serial:04d}"

    def push(self, id: str, *, front: bool = False) -> None:
        if self.priorities[id]:
            self.ranked[id] = -self.priorities[id]
        else:
            self.pending.insert(0 if front else len(self.pending), id)

    def accept(self, id: str, priority: int, delay_ms: int, now: int) -> None:
        self.priorities[id] = priority
        if delay_ms > 0:
            self.scheduled[id] = now + delay_ms
        else:
            self.push(id)

    def forget(self, id: str) -> None:
        del self.priorities[id]
        self.states.pop(id, None)

    def promote(self, now: int) -> None:
        for id, due in sorted(self.scheduled.items(), key=lambda item: (item[1], item[0])):
            if due <= now:
                del self.scheduled[id]
                self.push(id)

    def line(self) -> list[str]:
        """What would be claimed, in its order."""
        ranked = sorted(self.ranked, key=lambda id: (self.ranked[id], id))
        return [*(r for r in ranked if self.ranked[r] < 0), *self.pending, *(r for r in ranked if self.ranked[r] > 0)]

    def hears(self, name: str) -> None:
        """The worker's heartbeat."""
        _, next_due, waiting, *leases = self.bench.run(verbs.beat(self.bench.keys, name, 60_000, first=False))
        worker = self.workers[name]
        worker.next_due = next_due
        worker.drained = worker.drained and not waiting
        assert set(leases[::2]) == {other.encode() for other in WORKERS if self.workers[other].leased}
        assert next_due == min(self.scheduled.values(), default=-1)

    @initialize()
    def begin(self) -> None:
        """Mostly both workers are there, and something to do."""
        for name in WORKERS:
            self.take_a_lease(name)
        self.enqueue([(0, 0), (7, 0), (0, 2), (0, 0), (-7, 0)], False)
        self.claim("w", 3)

    # -- what may happen ----------------------------------------------------------------------------------------

    @rule(some=st.lists(st.tuples(st.sampled_from([0, 0, 0, 7, -7]), st.sampled_from([0, 0, 2, 60_000])), max_size=4),
          twice=st.booleans())  # fmt: skip
    def enqueue(self, some: list[tuple[int, int]], twice: bool) -> None:
        entries = [
            verbs.Entry("q", self.new_id(), priority, f"+{delay}" if delay else "", PAYLOAD) for priority, delay in some
        ]
        now, new = self.bench.enqueue(entries)
        assert new == len(entries)
        for entry, (priority, delay) in zip(entries, some, strict=True):
            self.accept(entry.id, priority, delay, now)
        if twice:  # its reply was lost
            assert self.bench.enqueue(entries)[1] == 0

    @rule(name=st.sampled_from(WORKERS))
    def take_a_lease(self, name: str) -> None:
        self.bench.lease(name)
        self.workers[name].leased = True
        self.hears(name)

    @rule(name=st.sampled_from(WORKERS), n=st.integers(0, 6))
    def claim(self, name: str, n: int) -> None:
        worker = self.workers[name]
        if not worker.leased:
            with pytest.raises(redis.ResponseError, match="FENCED"):
                self.bench.claim(name, n)
            return
        n = min(n, worker.room)
        claimed = self.bench.claim(name, n)
        self.promote(claimed.now)
        expected = [] if self.paused else self.line()[:n]
        assert claimed.ids == expected
        assert claimed.states == [self.states.get(id) for id in expected] or not claimed.states
        assert claimed.next_due == min(self.scheduled.values(), default=-1)
        for id in expected:
            if self.ranked.pop(id, None) is None:
                self.pending.remove(id)
        worker.held += expected
        worker.next_due = claimed.next_due
        # As `Claims` judges it; what is left may be ids of cancelled messages only.
        worker.drained = claimed.left == 0 and (n == 0 or len(expected) < n)
        assert self.paused or claimed.left >= len(self.line())

    @rule(n=st.integers(0, 3))
    def wake(self, n: int) -> None:
        """A master that blocks on the marker takes it, and so owes a claim."""
        for name in WORKERS:
            if self.workers[name].leased and self.workers[name].drained and self.awake:
                self.bench.sleep()
                self.claim(name, n)
                return

    @rule(name=st.sampled_from(WORKERS), chosen=st.lists(st.sampled_from(VERBS), min_size=1, max_size=5),
          stranger=st.none() | PICK, twice=st.booleans())  # fmt: skip
    def settle(self, name: str, chosen: list[str], stranger: int | None, twice: bool) -> None:
        worker = self.workers[name]
        plain: list[str] = []
        records: list[tuple[Any, ...]] = []
        moves: list[tuple[str, str, str]] = []
        for verb, id in zip(chosen, worker.held, strict=False):
            follow = self.new_id()
            moves.append((verb, id, follow))
            if verb == "plain":
                plain.append(id)
            else:
                records += self.records(verb, id, follow)
        others = sorted(set(self.priorities) - set(worker.held))
        if stranger is not None and others:
            verb = VERBS[1 + stranger % (len(VERBS) - 1)]
            records += self.records(verb, others[stranger % len(others)], "stranger")
        if not worker.leased:
            with pytest.raises(redis.ResponseError, match="FENCED"):
                self.bench.settle(name, *records, plain=plain, dead_max=DEAD_MAX)
            return
        now, settled = self.bench.settle(name, *records, plain=plain, dead_max=DEAD_MAX)
        assert settled == sum(verb != "state" for verb, _, _ in moves)
        for verb, id, follow in sorted(moves, key=lambda move: move[0] != "plain"):
            self.apply(worker, verb, id, follow, now)
        if twice:  # its reply was lost
            assert self.bench.settle(name, *records, plain=plain, dead_max=DEAD_MAX)[1] == 0

    def records(self, verb: str, id: str, follow: str) -> list[tuple[Any, ...]]:
        done = ("done", id, DAY_MS, b"result of " + id.encode())
        return {
            "done": [done],
            "follow": [("follow", id, follow, 0, "", PAYLOAD), ("follow", id, follow + "d", 7, "+2", PAYLOAD), done],
            "retry": [("retry", id, 2, b"retried", 1)],
            "again": [("retry", id, 0, b"again", 0)],
            "back": [("back", id, b"")],
            "dead": [("dead", id, b"died", 0, b"")],
            "drop": [("drop", id, DAY_MS, b"dropped", "expired")],
            "state": [("state", id, b"progress")],
        }[verb]

    def apply(self, worker: Worker, verb: str, id: str, follow: str, now: int) -> None:
        if verb == "state":
            self.states[id] = b"progress"
            return
        worker.held.remove(id)
        self.stats["processed"] += verb not in ("again", "back", "drop")
        if verb in ("plain", "done", "follow", "drop"):
            self.forget(id)
        if verb in ("done", "follow"):
            self.results[id] = b"result of " + id.encode()
        if verb == "follow":
            self.accept(follow, 0, 0, now)
            self.accept(follow + "d", 7, 2, now)
        elif verb == "drop":
            self.results[id] = b"dropped"
            self.stats["expired"] += 1
        elif verb == "retry":
            self.stats["failed"] += 1
            self.states[id] = b"retried"
            self.scheduled[id] = now + 2
        elif verb == "again":
            self.states[id] = b"again"
            self.push(id)
        elif verb == "back":
            self.push(id, front=True)
        elif verb == "dead":
            self.stats["failed"] += 1
            self.states[id] = b"died"
            self.dead[id] = now
            for old in sorted(self.dead, key=lambda dead: (self.dead[dead], dead))[:-DEAD_MAX]:
                del self.dead[old]
                self.forget(old)

    @rule(name=st.sampled_from(WORKERS), mode=st.sampled_from(["left", "gone", "expired", "keep"]), keep=PICK)
    def restore(self, name: str, mode: str, keep: int) -> None:
        worker = self.workers[name]
        if mode == "expired" and worker.leased:
            assert self.bench.restore(name, mode) == -1
            return
        kept = [id for n, id in enumerate(worker.held) if mode == "keep" and keep >> n & 1]
        moved = [id for id in worker.held if id not in kept]
        assert self.bench.restore(name, mode, *kept) == len(moved)
        worker.held = [id for id in worker.held if id in kept]
        listed = [id for id in moved if not self.priorities[id]]
        front = [id for id in self.bench.pending if id in self.priorities][: len(listed)]
        assert set(front) == set(listed)
        self.pending = front + self.pending
        for id in moved:
            if self.priorities[id]:
                self.push(id)
        if mode != "keep":
            worker.leased, worker.drained, worker.next_due = False, False, -1
            for other in WORKERS:  # within a third of a lease the others beat, and hear what this one knew
                if self.workers[other].leased:
                    self.hears(other)

    @rule(pick=PICK, tried=st.booleans())
    def cancel(self, pick: int, tried: bool) -> None:
        ids = sorted(set(self.states) - set(self.dead) if tried else self.priorities)
        if not ids:
            return
        id = ids[pick % len(ids)]
        said = self.bench.cancel(id, DAY_MS)
        if any(id in worker.held for worker in self.workers.values()):
            assert said == "running"
        elif id in self.dead:
            assert said == "finished"
        else:
            assert said == "cancelled"
            self.forget(id)
            self.results[id] = b'{"status":"FAILED"}'
            self.stats["cancelled"] += 1
            self.scheduled.pop(id, None)
            if self.ranked.pop(id, None) is None and id in self.pending:
                self.pending.remove(id)

    @rule(name=st.sampled_from(WORKERS))
    def finish_all(self, name: str) -> None:
        if self.workers[name].leased:
            self.settle(name, ["plain"] * len(self.workers[name].held), None, False)

    @rule()
    def pause_or_go_on(self) -> None:
        self.paused = not self.paused
        if self.paused:
            self.bench.client.set(self.bench.keys.paused, 1)
        else:
            self.bench.client.delete(self.bench.keys.paused)
            self.bench.client.zadd(self.bench.keys.wake, {"0": 0})

    @rule()
    def pass_time(self) -> None:
        time.sleep(0.003)  # more than the short delays

    # -- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def every_message_is_in_exactly_one_place_and_nothing_else_is_there(self) -> None:
        keys = self.bench.keys
        ask = self.bench.client.pipeline(transaction=False)
        ask.hkeys(keys.messages).lrange(keys.pending, 0, -1).hgetall(keys.state).hgetall(keys.stats).keys("*")
        for key in (keys.ranked, keys.scheduled, keys.dead, *map(keys.active, WORKERS)):
            ask.zrange(key, 0, -1, withscores=True)
        bodies, listed, states, stats, found, *sorted_sets = ask.execute()
        messages = {id.decode() for id in bodies}
        pending = [id.decode() for id in listed if id.decode() in messages]  # the others were cancelled
        ranked, scheduled, dead, *held = ({id.decode(): int(score) for id, score in some} for some in sorted_sets)
        assert messages == set(self.priorities)
        assert pending == self.pending
        assert (ranked, scheduled) == (self.ranked, self.scheduled)
        assert set(dead) == set(self.dead)
        assert [set(some) for some in held] == [set(self.workers[name].held) for name in WORKERS]
        assert sorted([*pending, *ranked, *scheduled, *dead, *(id for some in held for id in some)]) == sorted(messages)
        assert states == {id.encode(): state for id, state in self.states.items()}
        assert stats == {name.encode(): b"%d" % n for name, n in self.stats.items() if n}
        names = {key.decode() for key in found}
        known = {keys.messages, keys.state, keys.pending, keys.ranked, keys.scheduled, keys.dead, keys.leases,
                 keys.stats, keys.wake, keys.paused, keys.takeovers, *map(keys.active, WORKERS)}  # fmt: skip
        assert names - known == {keys.result_prefix + id for id in self.results}
        self.awake = keys.wake in names

    @invariant()
    def nobody_sleeps_while_there_is_work(self) -> None:
        living = [worker for worker in self.workers.values() if worker.leased]
        if not living or self.awake or any(worker.comes_by_itself for worker in living):
            return
        if any(worker.room for worker in living):
            assert self.paused or not self.line(), "there is room, and nothing wakes who has it"
        if self.scheduled:
            known = [worker.next_due for worker in living if worker.next_due >= 0]
            assert known, "nobody knows of the delayed messages"
            assert min(known) <= min(self.scheduled.values()), "nobody will come in time for the first one"


def test_every_message_is_in_exactly_one_place(bench: Bench, request: pytest.FixtureRequest) -> None:
    real = "real" in request.node.name
    run_state_machine_as_test(
        lambda: Queue(bench.client),
        settings=settings(
            max_examples=100 if real else 15,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # add Phase.shrink to look into a failure: it takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
