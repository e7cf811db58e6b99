"""Whatever happens to it, a message is in exactly one place: random scripts against a simple model of a queue.

By hand, far longer: `PREFORK_EXAMPLES=5000 pytest tests/broker/test_places.py`. That the machine would see a broken
script is what `python -m tests.broker.mutants` shows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from prefork.broker import verbs
from tests.broker.bench import DAY_MS, PAYLOAD, Bench
from tests.broker.model import Model

DEAD_MAX, MAX_TAKEOVERS = 2, 2
FAR = 3  # in a half of the runs a pending list is "too long to search" from here on
ROOM = 3  # messages that a worker takes at a time
LEASE_MS = 60_000
PICK = st.integers(0, 1000)  # no draw depends on what a server with a clock has said
PRIORITIES = st.sampled_from([0, 0, 0, 7, -7])
DELAYS = st.sampled_from([0, 0, 2, 60_000, -1])  # ms; -1: at a moment that is near
VERBS = ("plain", "done", "retry", "again", "back", "dead", "drop", "state", "follow")
CANCELLED_RECORD = b'{"status":"FAILED"}'
STOPPED_RECORD = b'{"status":"FAILED","stopped":1}'
Edit = Callable[[str, bytes], bytes]


@dataclass
class Worker:
    """What one master knows, besides what it holds."""

    drained: bool = False  # it blocks on the marker
    next_due: int = -1  # when its timer will claim


class EditedBench(Bench):
    """A queue whose scripts are changed before they are run."""

    def __init__(self, client: Any, edit: Edit) -> None:
        super().__init__(client)
        self._edit = edit

    def run(self, call: verbs.Call) -> Any:
        _, text, *rest = call.command(in_full=True)
        assert isinstance(text, bytes)
        return self.client.execute_command("EVAL", self._edit(call.verb, text), *rest)


def nearer(verb: str, text: bytes) -> bytes:
    """A script with a bound that a test can reach."""
    return text.replace(b"<= 10000", b"<= %d" % FAR)


class Queue(RuleBasedStateMachine):
    """A queue, some workers, a producer and an operator."""

    def __init__(self, client: Any, workers: int, edit: Edit | None, far: bool) -> None:
        super().__init__()
        client.flushall()
        if edit or far:
            self.bench: Bench = EditedBench(client, lambda verb, text: _changed(verb, text, edit, far))
        else:
            self.bench = Bench(client)
        self.k = self.bench.keys
        self.model = Model(DEAD_MAX, 180 * DAY_MS, MAX_TAKEOVERS, *([FAR] if far else []))
        self.names = ("v", "w", "x")[:workers]
        self.workers = {name: Worker() for name in self.names}
        self.serial = 0
        self.enqueued: list[list[verbs.Entry]] = []
        self.settled: list[tuple[str, list[str], list[tuple[Any, ...]]]] = []

    # -- both at once -------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        self.serial += 1
        return f"m{self.serial:04d}"

    def now(self) -> int:
        seconds, micros = self.bench.client.time()
        return int(seconds * 1000 + micros // 1000)

    def refused(self, name: str, call: verbs.Call) -> bool:
        """Whether the lease is gone; then the server has to say so, and to do nothing: see the invariant."""
        if name in self.model.leases:
            return False
        with pytest.raises(redis.ResponseError, match="FENCED"):
            self.bench.run(call)
        return True

    def held(self, name: str) -> list[str]:
        return list(self.model.active.get(name, ()))

    def pick(self, n: int) -> str | None:
        """One of the ids that there are or were."""
        ids = [f"m{i:04d}" for i in range(1, self.serial + 1)]
        likely = self.model.messages() or ids
        some = likely if n % 4 else ids
        return some[n % len(some)] if some else None

    # -- producers ----------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        """Mostly all workers are there, and something to do."""
        for name in self.names:
            self.beat(name, True, False)
        self.enqueue([(0, 0), (7, 0), (0, 2), (0, 0), (-7, 0)], None, False)
        self.claim("w", 3)

    def send(self, entries: list[verbs.Entry], again: bool) -> int:
        now, new = self.bench.run(verbs.enqueue(self.k, entries, again=again))
        records = [(e.id, e.priority, e.at, e.payload) for e in entries]
        assert new == self.model.enqueue(records, now, again=again)
        return int(new)

    @rule(some=st.lists(st.tuples(PRIORITIES, DELAYS), max_size=4), known=st.none() | PICK, twice=st.booleans())
    def enqueue(self, some: list[tuple[int, int]], known: int | None, twice: bool) -> None:
        entries = []
        for priority, delay in some:
            at = "" if not delay else f"+{delay}" if delay > 0 else str(self.now() + 2)
            entries.append(verbs.Entry("q", self.new_id(), priority, at, PAYLOAD))
        if known is not None and (id := self.pick(known)):  # an id of the user's own, which is there or was
            entries.append(verbs.Entry("q", id, 0, "", PAYLOAD))
        self.send(entries, False)
        self.enqueued.append(entries)
        if twice:  # its reply was lost
            assert self.send(entries, True) == 0

    @rule(n=PICK)
    def enqueue_late(self, n: int) -> None:
        """A repeat that comes when much has happened."""
        self.send(self.enqueued[n % len(self.enqueued)], True)

    @rule(n=PICK, ttl_ms=st.sampled_from([0, DAY_MS]), stop=st.booleans(), twice=st.booleans())
    def cancel(self, n: int, ttl_ms: int, stop: bool, twice: bool) -> None:
        if id := self.pick(n):
            stopped = STOPPED_RECORD if stop else None
            for _ in range(1 + twice):
                said = self.bench.run(verbs.cancel(self.k, id, ttl_ms, CANCELLED_RECORD, stopped)).decode()
                assert said == self.model.cancel(id, ttl_ms, CANCELLED_RECORD, stopped, self.now())
            assert said != "cancelled" or not twice

    # -- workers ------------------------------------------------------------------------------------------------

    @rule(which=PICK, first=st.booleans(), twice=st.booleans())
    def some_beat(self, which: int, first: bool, twice: bool) -> None:
        self.beat(self.name(which), first, twice)

    def name(self, which: int) -> str:
        return self.names[which % len(self.names)]

    def beat(self, name: str, first: bool, twice: bool) -> None:
        for _ in range(1 + twice):
            call = verbs.beat(self.k, name, LEASE_MS, first=first)
            if not first and self.refused(name, call):
                return
            reply = self.bench.run(call)
            assert reply == self.model.beat(name, LEASE_MS, reply[0], first=first)
            worker = self.workers[name]
            worker.next_due = reply[1]
            worker.drained = worker.drained and not first and not reply[2]

    @rule(which=PICK, n=st.integers(0, 6))
    def some_claim(self, which: int, n: int) -> None:
        self.claim(self.name(which), n)

    def claim(self, name: str, n: int) -> None:
        worker = self.workers[name]
        if self.refused(name, verbs.claim(self.k, name, n)):
            return
        n = min(n, self.room(name))
        claimed = self.bench.claim(name, n)
        states = dict(self.model.states)
        next_due, left, ids = self.model.claim(name, n, claimed.now)
        assert (claimed.next_due, claimed.left, claimed.ids) == (next_due, left, ids)
        assert claimed.messages == [self.model.bodies[id] for id in ids]
        found = claimed.states or [None] * len(ids)
        assert [_read(state) for state in found] == [_read(states.get(id)) for id in ids]
        worker.next_due = next_due
        # As `Claims` judges it; what is left may be ids of cancelled messages only.
        worker.drained = left == 0 and (n == 0 or len(ids) < n)

    def room(self, name: str) -> int:
        return max(0, ROOM - len(self.held(name)))

    @rule(n=st.integers(0, 3))
    def wake(self, n: int) -> None:
        """A master that blocks on the marker takes it, and so owes a claim."""
        for name in self.names:
            if name in self.model.leases and self.workers[name].drained and self.model.wake:
                self.bench.sleep()
                self.model.wake = False
                self.claim(name, n)
                return

    @rule(which=PICK, chosen=st.lists(st.sampled_from(VERBS), min_size=1, max_size=5), stranger=st.none() | PICK,
          twice=st.booleans())  # fmt: skip
    def settle(self, which: int, chosen: list[str], stranger: int | None, twice: bool) -> None:
        name = self.name(which)
        plain: list[str] = []
        records: list[tuple[Any, ...]] = []
        for verb, id in zip(chosen, self.held(name), strict=False):
            if verb == "plain":
                plain.append(id)
            else:
                records += self.records(verb, id)
        if stranger is not None and (other := self.pick(stranger)) and other not in self.held(name):
            verb = VERBS[stranger % len(VERBS)]
            if verb == "plain":
                plain.append(other)
            else:
                records += self.records(verb, other)
        self.settled.append((name, plain, records))
        self.send_settled(name, plain, records)
        if twice and name in self.model.leases:  # its reply was lost
            before = self.model.stats.copy(), self.model.line()
            assert self.send_settled(name, plain, records) == 0
            assert before == (self.model.stats, self.model.line())

    @rule(which=st.none() | PICK, n=PICK)
    def settle_late(self, which: int | None, n: int) -> None:
        """What a master kept through trouble, or another had: it counts for what that worker still holds only."""
        if self.settled:
            name, plain, records = self.settled[n % len(self.settled)]
            self.send_settled(name if which is None else self.name(which), plain, records)

    def send_settled(self, name: str, plain: list[str], records: list[tuple[Any, ...]]) -> int:
        words = [word for record in records for word in record]
        call = verbs.settle(self.k, name, DEAD_MAX, 180 * DAY_MS, plain, words)
        if self.refused(name, call):
            return 0
        now, settled = self.bench.run(call)
        assert settled == self.model.settle(name, plain, records, now)
        return int(settled)

    def records(self, verb: str, id: str) -> list[tuple[Any, ...]]:
        done = ("done", id, DAY_MS, b"result of " + id.encode())
        if verb == "follow":
            first, second = self.new_id(), self.new_id()
            return [("follow", id, first, 0, "", PAYLOAD), ("follow", id, second, 7, "+2", PAYLOAD),
                    ("follow", id, first, 0, "", PAYLOAD), done]  # fmt: skip
        return {
            "done": [done],
            "retry": [("retry", id, 2, b'{"retried":1}', 1)],
            "again": [("retry", id, 0, b'{"unknown":1}', 0)],
            "back": [("back", id, b"" if len(id) % 2 else b'{"crashes":1}')],
            "dead": [("dead", id, b'{"errors":[]}', DAY_MS, b"died")],
            "drop": [("drop", id, DAY_MS, b"dropped", "expired")],
            "state": [("state", id, b"no json")],
        }[verb]

    @rule(which=PICK, mode=st.sampled_from(["left", "gone", "expired", "expired", "keep"]), keep=PICK,
          twice=st.booleans())  # fmt: skip
    def restore(self, which: int, mode: str, keep: int, twice: bool) -> None:
        name = self.name(which)
        kept = [id for n, id in enumerate(self.held(name)) if keep >> n & 1]
        for again in range(1 + twice):
            reply = self.bench.run(verbs.restore(self.k, name, mode, kept, MAX_TAKEOVERS))
            assert reply == self.model.restore(name, mode, kept, self.now())
            assert not again or reply in (0, -1)
            self.adopt_deaths()
        if name not in self.model.leases:
            self.workers[name] = Worker()
            for other in self.names:  # within a third of a lease the others beat, and hear what this one knew
                if other in self.model.leases:
                    self.beat(other, False, False)

    def adopt_deaths(self) -> None:
        """`restore` does not say the time."""
        now = self.now()
        for id, died in self.bench.client.zrange(self.k.dead, 0, -1, withscores=True):
            if id.decode() in self.model.dead and abs(died - self.model.dead[id.decode()]) < 5000 and died <= now:
                self.model.dead[id.decode()] = int(died)

    @rule(which=PICK)
    def a_lease_ends(self, which: int) -> None:
        """By the server's clock; until another takes over, nothing is lost."""
        name = self.name(which)
        if name in self.model.leases:
            self.model.leases[name] = self.now() - 1
            self.bench.client.zadd(self.k.leases, {name: self.model.leases[name]})

    @rule(which=PICK)
    def finish_all(self, which: int) -> None:
        self.send_settled(self.name(which), self.held(self.name(which)), [])

    # -- operators ----------------------------------------------------------------------------------------------

    @rule(which=PICK, twice=st.booleans())
    def ask(self, which: int, twice: bool) -> None:
        for _ in range(1 + twice):
            reply = self.bench.run(verbs.ask(self.k, self.name(which), "report"))
            assert reply == self.model.ask(self.name(which), "report", self.now())

    @rule(on=st.booleans(), twice=st.booleans())
    def pause(self, on: bool, twice: bool) -> None:
        for again in range(1 + twice):
            changed = self.bench.run(verbs.pause(self.k, on=on))
            assert changed == self.model.pause(on)
            assert not (again and changed)

    @rule(n=PICK, stranger=PICK, twice=st.booleans())
    def revive(self, n: int, stranger: int, twice: bool) -> None:
        ids = [id for i, id in enumerate(self.model.by_death()) if n >> i & 1]
        if other := self.pick(stranger):
            ids.append(other)
        for again in range(1 + twice):
            looked, revived = self.bench.run(verbs.revive(self.k, ids))
            assert [looked, revived] == self.model.revive(ids)
            assert not (again and revived)

    @rule(n=PICK, twice=st.booleans())
    def delete(self, n: int, twice: bool) -> None:
        if id := self.pick(n):
            for again in range(1 + twice):
                said = self.bench.run(verbs.delete(self.k, id)).decode()
                assert said == self.model.delete(id)
                assert not (again and said == "deleted")

    @rule(place=st.sampled_from(["pending", "ranked", "scheduled", "dead"]), n=st.integers(1, 2))
    def purge(self, place: str, n: int) -> None:
        assert self.bench.run(verbs.purge(self.k, place, n)) == self.model.purge(place, n)

    @rule(n=PICK)
    def a_result_expires(self, n: int) -> None:
        if ids := sorted(self.model.results):
            id = ids[n % len(ids)]
            self.model.results.pop(id)
            self.bench.client.delete(self.k.result_prefix + id)

    @rule()
    def pass_time(self) -> None:
        time.sleep(0.003)  # more than the short delays

    # -- what always holds --------------------------------------------------------------------------------------

    @invariant()
    def the_server_holds_what_the_model_does(self) -> None:
        wanted = self.model.dump(self.k)
        ends = self.model.ends(self.k)
        ask = self.bench.client.pipeline(transaction=False)
        ask.keys("*")
        for key, value in wanted.items():
            self.read(ask, key, value)
        for key in ends:
            ask.pttl(key)
        found, *rest = ask.execute(raise_on_error=False)
        assert {key.decode() for key in found} == set(wanted)
        for (key, value), real in zip(wanted.items(), rest, strict=False):
            assert _plain(real, value, key == self.k.state) == (_states(value) if key == self.k.state else value), key
        now = self.now()
        for (key, end), left_ms in zip(ends.items(), rest[len(wanted) :], strict=True):
            assert abs(now + left_ms - end) < 5000, key

    def read(self, ask: Any, key: str, value: Any) -> None:
        if key in (self.k.messages, self.k.state, self.k.stats, self.k.takeovers):
            ask.hgetall(key)
        elif isinstance(value, bytes):
            ask.get(key)
        elif key == self.k.pending:
            ask.lrange(key, 0, -1)
        elif isinstance(value, list):
            ask.zrange(key, 0, -1)
        else:
            ask.zrange(key, 0, -1, withscores=True)

    @invariant()
    def every_message_is_in_exactly_one_place(self) -> None:
        m = self.model
        waiting = [id for id in m.pending if m.waits(id)]
        places = [*waiting, *m.ranked, *m.scheduled, *m.dead, *(id for ids in m.active.values() for id in ids)]
        assert sorted(places) == sorted(m.messages())
        assert set(m.states) <= set(places)

    @invariant()
    def nobody_sleeps_while_there_is_work(self) -> None:
        living = [name for name in self.names if name in self.model.leases]
        if not living or self.model.wake or any(self.comes_by_itself(name) for name in living):
            return
        if any(self.room(name) for name in living):
            assert self.model.paused or not self.model.line(), "there is room, and nothing wakes who has it"
        if self.model.scheduled:
            known = [self.workers[name].next_due for name in living if self.workers[name].next_due >= 0]
            assert known, "nobody knows of the delayed messages"
            assert min(known) <= self.model.next_due(), "nobody will come in time for the first one"

    def comes_by_itself(self, name: str) -> bool:
        """Whether it will claim without being woken."""
        return not self.workers[name].drained and self.room(name) > 0


def _changed(verb: str, text: bytes, edit: Edit | None, far: bool) -> bytes:
    text = nearer(verb, text) if far else text
    return edit(verb, text) if edit else text


def _read(state: Any) -> Any:
    """A state as it counts: the server writes JSON in its own order."""
    if isinstance(state, bytes):
        try:
            return json.loads(state)
        except ValueError:
            return state
    return state


def _states(states: dict[str, Any]) -> dict[str, Any]:
    return {id: _read(state) for id, state in states.items()}


def _plain(real: Any, like: Any, are_states: bool) -> Any:
    """A reply in the words of the model."""
    if isinstance(like, list):
        return [id.decode() for id in real]
    if isinstance(like, dict):
        pairs = real.items() if isinstance(real, dict) else real
        found = {id.decode(): int(it) if isinstance(it, float) else it for id, it in pairs}
        return _states(found) if are_states else found
    return real


def run(client: Any, examples: int, *, workers: int, far: bool, edit: Edit | None = None, shrink: bool = False) -> None:
    """Run the machine so many times; raises what it finds."""
    run_state_machine_as_test(
        lambda: Queue(client, workers, edit, far),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),  # to shrink takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(("workers", "far"), [(2, False), (3, True)])
def test_every_message_is_in_exactly_one_place(
    bench: Bench, request: pytest.FixtureRequest, workers: int, far: bool
) -> None:
    by_hand = int(os.environ.get("PREFORK_EXAMPLES", "0"))
    run(bench.client, by_hand or (50 if "real" in request.node.name else 8), workers=workers, far=far)
