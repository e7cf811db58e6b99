"""How a worker is tied to its broker, against a broker whose replies the test gives."""

from __future__ import annotations

import logging
from typing import Any

import hiredis
import pytest

from prefork.broker.channel import Lost
from prefork.broker.keys import Keys
from prefork.broker.verbs import Call
from prefork.worker.claims import Claims
from prefork.worker.clock import ServerClock
from prefork.worker.lease import Lease
from prefork.worker.link import Link
from prefork.worker.queues import Queue
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import Phase
from tests.worker.test_claims import Loop, Wire

NOW_MS = 1764000000000
BROKEN = "the server closed the connection"
REFUSED = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'")


class Work:
    """Holds these messages."""

    def __init__(self) -> None:
        self.known: dict[str, set[str]] = {"mail": set(), "print": set()}

    def known_ids(self, queue: str = "") -> set[str]:
        return set().union(*(ids for name, ids in self.known.items() if queue in ("", name)))

    def drop_all(self) -> tuple[int, int]:
        dropped = len(self.known_ids())
        for ids in self.known.values():
            ids.clear()
        return 1, dropped - 1


class Shutdown:
    """One that has not begun, until the test says so."""

    begun = False
    phase = Phase.RUNNING

    def ids(self) -> set[str]:
        return {"back"} if self.begun else set()


class Server(Wire):
    """Both connections end here. Answers what stands first, by what it is."""

    def verbs(self) -> list[tuple[str, str]]:
        """What waits for a reply: verb or command, and its queue."""
        return [
            (asked.verb, asked.keys[0].split("{")[1].split("}")[0]) if isinstance(asked, Call) else (asked[0], "")
            for asked, _ in self.due
        ]

    def calls(self, verb: str) -> list[Call]:
        return [asked for asked, _ in self.due if isinstance(asked, Call) and asked.verb == verb]

    def beats(self, *leases: Any) -> None:
        """Reply to all that was asked until now; each lease is there."""
        for _ in range(len(self.due)):
            is_beat = isinstance(self.due[0][0], Call) and self.due[0][0].verb == "beat"
            self.reply([NOW_MS, -1, 0, 0, *leases] if is_beat else 1)

    def says(self, reply: Any, queue: str) -> None:
        """Reply to the oldest that was asked of this queue."""
        at = [name for _, name in self.verbs()].index(queue)
        self.due.pop(at)[1](reply)


class Tied:
    """A link with what it needs: leases, claims and outcomes are those of a worker, of queues `mail` and `print`."""

    def __init__(self) -> None:
        self.loop, self.server, self.blocker = Loop(), Server(), Server()
        self.held: list[None] = []
        self.work, self.shutdown, clock = Work(), Shutdown(), ServerClock()
        self.link = link = Link(self.loop, "redis://127.0.0.1:1/0", "p", lambda: self.held.append(None))  # type: ignore[arg-type]
        self.restarts: list[str] = []
        link.channel, link.blocker = self.server, self.blocker  # type: ignore[assignment]
        self.blocker.restart = lambda: self.restarts.append("blocker")  # type: ignore[method-assign]
        link.work, link.shutdown = self.work, self.shutdown  # type: ignore[assignment]
        link.settlement = self.settlement = Settlement(
            {}, lambda: NOW_MS, prefix="p", dead_max=9, dead_ttl_s=9, max_crashes=3, fenced=link.fenced,
            later=self.loop.call_later,
        )  # fmt: skip
        self.queues = [Queue(Keys("p", name), 1) for name in ("mail", "print")]
        for queue in self.queues:
            self.settlement.add_queue(queue.keys)
        link.claims = self.claims = Claims(
            self.loop, self.server, self.blocker, clock, self.queues, strict=True,  # type: ignore[arg-type]
            claimed=lambda *come: None, fenced=link.fenced, requested=lambda said: None, keep=link.reconcile,
        )  # fmt: skip
        link.lease = self.lease = Lease(
            self.loop, self.server, self.claims, clock, 9.0, 10, link.fenced, link.known,  # type: ignore[arg-type]
        )  # fmt: skip
        self.settlement.outage = self.claims.outage = self.lease.outage = link.outage

    def up(self) -> None:
        """The connection comes, for the first time, and all leases are held."""
        self.link._up()
        self.server.beats()

    def down_and_up(self, said: str = BROKEN) -> None:
        """It breaks, and comes back; the leases are there still."""
        self.link._down(said)
        self.server.restart()
        self.link._up()
        self.server.beats()

    def keeps(self) -> dict[str, set[object]]:
        """What it tells the broker that it holds, by queue."""
        return {
            call.keys[0].split("{")[1].split("}")[0]: set(call.arguments[6:])
            for call in self.server.calls("restore")
            if call.arguments[1] == "keep"
        }


@pytest.fixture
def it() -> Tied:
    return Tied()


# -- it comes and goes ------------------------------------------------------------------------------------------------


def test_nothing_is_claimed_before_all_leases_are_held(it: Tied) -> None:
    it.link._up()
    assert it.server.verbs() == [("SADD", ""), ("beat", "mail"), ("beat", "print")]
    assert it.server.due[0][0] == ("SADD", "p:queues", "mail", "print")
    assert it.claims.worker == it.settlement.worker == it.lease.worker
    it.server.reply(2)
    it.server.reply([NOW_MS, -1, 0, 0])
    assert not it.claims.open
    assert not it.link.held
    assert it.held == []
    it.server.reply([NOW_MS, -1, 0, 0])
    assert it.claims.open
    assert it.link.held
    assert len(it.held) == 1


def test_a_worker_that_has_been_told_to_stop_claims_nothing_when_its_leases_come(it: Tied) -> None:
    it.shutdown.begun = True
    it.up()
    assert it.link.held
    assert not it.claims.open


def test_a_connection_that_is_back_is_told_what_is_held_here_before_anything_is_claimed(it: Tied) -> None:
    it.up()
    it.work.known["mail"] = {"running", "ready"}
    it.settlement.outboxes["print"].plain.append("decided")
    it.down_and_up()
    assert not it.claims.open
    assert it.keeps() == {"mail": {"running", "ready"}, "print": {"running", "ready", "decided"}}
    it.server.says(0, "print")
    assert not it.claims.open
    it.server.says(0, "mail")
    assert it.claims.open
    assert len(it.held) == 1
    it.link._down(BROKEN)
    assert not it.claims.open


def test_what_a_stop_has_not_put_back_yet_is_held(it: Tied) -> None:
    it.up()
    it.shutdown.begun = True
    it.down_and_up()
    assert it.keeps() == {"mail": {"back"}, "print": {"back"}}
    it.server.says(0, "mail")
    it.server.says(0, "print")
    assert not it.claims.open


def test_what_was_decided_is_said_again_when_the_broker_knows_what_is_held(
    it: Tied, monkeypatch: pytest.MonkeyPatch
) -> None:
    resent: list[bool] = []
    monkeypatch.setattr(it.settlement, "resend", lambda: resent.append(it.claims.open))
    it.up()
    it.down_and_up()
    assert resent == []
    it.server.says(0, "mail")
    it.server.says(0, "print")
    assert resent == [True]


def test_the_trouble_begins_when_the_connection_breaks_and_ends_when_messages_may_be_claimed(
    it: Tied, caplog: pytest.LogCaptureFixture
) -> None:
    it.up()
    it.down_and_up("the broker does not take the password")
    assert [record.message.partition(";")[0] for record in caplog.records] == ["the broker does not take the password"]
    it.server.says(0, "mail")
    it.server.says(0, "print")
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "the broker is back after" in caplog.text


def test_a_server_that_does_not_answer_is_not_waited_for_on_the_other_connection_too(it: Tied) -> None:
    late = "the broker at redis://127.0.0.1:1/0 does not answer in time"
    it.link._down(late)  # it never came
    assert it.restarts == []
    it.up()
    it.link._down(BROKEN)
    assert it.restarts == []
    it.link._up()
    it.link._down(late)
    assert it.restarts == ["blocker"]


# -- what is held is told ---------------------------------------------------------------------------------------------


def test_what_a_claim_on_its_way_brings_is_not_put_back(it: Tied) -> None:
    it.up()
    it.claims.turn(1, 1)
    assert it.claims.in_flight
    it.link.reconcile()
    assert it.keeps() == {}
    while it.server.due:  # both queues are asked, one after the other
        it.server.reply([NOW_MS, -1, 0, [], [], []])
    it.claims.keep_if_due()
    assert it.keeps() == {"mail": set(), "print": set()}
    assert not it.claims.open


def test_a_queue_that_takes_nothing_back_is_asked_again_and_holds_up_no_other(
    it: Tied, caplog: pytest.LogCaptureFixture
) -> None:
    it.up()
    it.down_and_up()
    it.server.says(REFUSED, "mail")
    assert not it.claims.open
    it.server.says(0, "print")
    assert it.claims.open
    assert [queue.unkept for queue in it.queues] == [True, False]
    assert caplog.text.count("the broker does not take messages of queue mail back: OOM") == 1
    it.loop.fire()
    it.server.beats()
    assert set(it.keeps()) == {"mail", "print"}
    it.server.says(0, "mail")
    it.server.says(0, "print")
    assert not any(queue.unkept for queue in it.queues)
    assert it.claims.open


def test_nothing_is_claimed_while_no_queue_takes_anything_back(it: Tied) -> None:
    it.up()
    it.down_and_up()
    it.server.says(REFUSED, "mail")
    it.server.says(REFUSED, "print")
    assert not it.claims.open
    it.loop.fire()
    it.server.beats()
    it.server.says(0, "mail")
    it.server.says(0, "print")
    assert it.claims.open


def test_a_connection_that_breaks_before_the_broker_knows_what_is_held_begins_it_anew(it: Tied) -> None:
    it.up()
    it.down_and_up()
    it.server.says(0, "mail")
    it.down_and_up()
    assert set(it.keeps()) == {"mail", "print"}
    assert not it.claims.open
    assert not any(queue.unkept for queue in it.queues)
    it.server.says(0, "mail")
    assert not it.claims.open
    it.server.says(0, "print")
    assert it.claims.open


def test_what_is_held_of_a_queue_is_what_runs_waits_or_is_decided(it: Tied) -> None:
    it.work.known["mail"] = {"a", "b"}
    it.settlement.outboxes["mail"].plain.append("b")
    it.settlement.outboxes["mail"].held_back.add("c")
    assert it.link.known("mail") == 3
    assert it.link.known("print") == 0


# -- the fence --------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_fenced_drops_all_and_begins_as_another_one(
    it: Tied, caplog: pytest.LogCaptureFixture
) -> None:
    it.up()
    before = it.lease.worker
    it.work.known["mail"] = {"running", "ready"}
    it.settlement.outboxes["print"].plain.append("decided")
    it.queues[0].unkept = True
    it.link.fenced(f"FENCED the lease of {before} is gone")
    assert not it.claims.open
    assert it.lease.worker != before
    assert it.settlement.is_empty
    given_up = it.server.calls("restore")
    assert [call.arguments[:2] for call in given_up] == [(before, "left")] * 2
    assert [call.arguments[0] for call in it.server.calls("beat")] == [it.lease.worker] * 2
    assert "Stopped 1 running tasks, dropped 1 outcomes and 1 messages that had not started" in caplog.text
    it.server.beats()
    assert it.claims.open
    assert it.claims.worker == it.settlement.worker == it.lease.worker
    assert not it.queues[0].unkept
    assert len(it.held) == 2


def test_the_fence_that_is_said_of_who_this_worker_was_is_nothing_new(it: Tied) -> None:
    it.up()
    before = it.lease.worker
    it.link.fenced(f"FENCED the lease of {before} is gone")
    it.server.beats()
    now = it.lease.worker
    it.link.fenced(f"FENCED the lease of {before} is gone")
    assert it.lease.worker == now
    assert it.claims.open
    assert it.server.due == []


def test_a_worker_that_has_left_is_fenced_off_from_nothing(it: Tied) -> None:
    it.up()
    before, it.shutdown.phase = it.lease.worker, Phase.LEFT
    it.link.fenced(f"FENCED the lease of {before} is gone")
    assert it.lease.worker == before
    assert it.server.due == []


@pytest.mark.parametrize("reply", [0, REFUSED, Lost("connection")])
def test_what_was_asked_by_who_this_worker_was_decides_nothing(it: Tied, reply: object) -> None:
    it.up()
    it.down_and_up()
    asked = [it.server.due.pop(0) for _ in range(len(it.server.due))]
    it.link.fenced(f"FENCED the lease of {it.lease.worker} is gone")
    for _, callback in asked:
        callback(reply)
    assert not it.claims.open
    assert not any(queue.unkept for queue in it.queues)
    it.server.beats()
    assert it.claims.open
