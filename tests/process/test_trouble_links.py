"""Connections that fail in ways of their own: replies that are lost or trickle, servers that accept and break off.

And what holds in any trouble: the master's loop goes on, and what is kept for the broker is bounded.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from prefork import Prefork
from prefork.worker.dispatch import MAX_DEPTH
from prefork.worker.outbox import MOST_RECORDS, MOST_REFUSED
from tests.conftest import SLACK_S, Project, Server, until
from tests.process import test_trouble
from tests.process.scene import Clock, active, counts, gone, key
from tests.process.test_trouble import BEAT, CLAIM, SETTLE, SHORT_LIMITS, Scene, Stall

BIG = """
@app.task(name="big", result_ttl=600)
def big(n, ballast):
    note("big", n)
    return n
"""

MANY = 2 * MOST_REFUSED + 2000

SPLIT = """
@app.task(name="split", result_ttl=600, takes_context=True)
def split(context, n):
    note("split", n)
    context.enqueue(add.using(queue_name="other").s(n))
"""


def allow(what: str) -> Callable[[Scene], None]:
    return lambda scene: scene.client.execute_command("ACL", "SETUSER", "bob", what)


def spoil(scene: Scene) -> None:
    scene.client.rename(key("m", "other"), "aside")
    scene.client.set(key("m", "other"), "no hash")


# What begins it, and what ends it.
REFUSALS: dict[str, tuple[Callable[[Scene], object], Callable[[Scene], object]]] = {
    "outcomes": (allow("-set"), allow("+set")),
    "follow_ups": (spoil, lambda scene: scene.client.rename("aside", key("m", "other"))),
}

# In the master: what is kept for the broker, told when it is asked.
WATCHED = """
from prefork.worker.outbox import Outboxes

watched = []
add_queue = Outboxes.add_queue

def add_and_watch(self, keys):
    watched.append(self)
    add_queue(self, keys)

Outboxes.add_queue = add_and_watch
signal.signal(signal.SIGURG, lambda number, frame: note("kept", sum(it.unsettled() for it in watched)))
"""

NOTHING = """
@app.task(name="nothing", result_ttl=600)
def nothing():
    pass
"""


@pytest.fixture
def scene(own_project: Project) -> Iterator[Scene]:
    yield from test_trouble.staged(own_project)


@pytest.mark.parametrize("keep", [0, 5], ids=["whole", "in_the_middle"])
@pytest.mark.parametrize("mark", [CLAIM, SETTLE, BEAT], ids=["claim", "settle", "beat"])
def test_a_reply_that_is_lost_costs_nothing(scene: Scene, mark: bytes, keep: int) -> None:
    worker = scene.worker("lease = 1")
    quick = scene.project.tasks.quick
    scene.network.lose(mark, 3, keep=keep)
    results = [quick.enqueue(n) for n in range(300)]
    assert [result.wait(timeout=60) for result in results] == list(range(300))
    until(lambda: scene.network.lost == 3, what="three replies are lost")
    assert set(counts(scene.project, "quick").values()) == {1}
    until(lambda: active(scene.project) == 0)
    assert worker.stop() == 0
    assert int(scene.client.hget(key("stats"), "processed")) == 300, "none is settled twice"


def test_what_trickles_is_waited_for_as_long_as_it_moves(scene: Scene) -> None:
    """Half a megabyte that takes several times the limit of a reply."""
    scene.project.add(BIG + SHORT_LIMITS)
    worker = scene.worker()
    scene.project.tasks.quick.enqueue(0).wait(timeout=60)
    scene.network.chunk, scene.network.delay_s = 1 << 13, 0.12
    clock = Clock()
    result = scene.project.tasks.big.enqueue(1, "x" * 500_000)
    assert result.wait(timeout=60) == 1
    assert clock.s > 4.5, "it took longer than the limit"
    assert scene.project.lines("big") == ["1"]
    assert "ERROR" not in worker.log
    assert worker.stop() == 0


def test_a_server_that_welcomes_and_breaks_off_is_not_asked_in_a_hurry(scene: Scene) -> None:
    worker = scene.worker("lease = 1")
    scene.project.tasks.quick.enqueue(0).wait(timeout=60)
    scene.network.lose(BEAT, 1_000_000)
    scene.network.cut()
    before = scene.network.accepted
    clock = Clock()
    until(lambda: clock.s > 2.5)
    assert scene.network.accepted - before < 25, "two connections, with pauses that grow to a second"
    scene.network.heal()
    assert scene.project.tasks.quick.enqueue(1).wait(timeout=60) == 1
    assert worker.stop() == 0


def test_the_loop_goes_on_while_the_server_stands_still(scene: Scene) -> None:
    """It reaps a child that died, kills a task at its deadline, and stops, all on time."""
    worker = scene.worker("concurrency = 3\nshutdown_timeout = 1")
    nap = scene.project.tasks.nap
    late, dying = nap.using(timeout=1.5).enqueue(1, 60), nap.enqueue(2, 60)
    nap.enqueue(3, 60)
    until(lambda: len(scene.project.lines("started")) == 3)
    pids = dict(map(int, line.split()) for line in scene.project.lines("started"))
    clock, stall = Clock(), Stall()
    stall.begin(scene)
    os.kill(pids[2], signal.SIGKILL)
    until(lambda: gone(pids[2]) and len(worker.children()) == 3, SLACK_S, "another child is there")
    until(lambda: gone(pids[1]), 1.5 + SLACK_S - clock.s, "it is killed at its deadline")
    until(lambda: len(worker.children()) == 3, SLACK_S, "another child is there")
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < 1.0 + SLACK_S
    until(lambda: gone(*pids.values()))
    stall.end(scene)
    assert {late.id, dying.id} <= {id.decode() for id in scene.client.hkeys(key("m"))}, "nothing is lost"


def test_a_server_that_lost_everything_is_worked_for_again(scene: Scene) -> None:
    """FLUSHALL: leases and queues are gone, and the scripts with them."""
    worker = scene.worker("lease = 1")
    quick, nap = scene.project.tasks.quick, scene.project.tasks.nap
    quick.enqueue(0).wait(timeout=60)
    nap.enqueue(1, 60)
    until(lambda: scene.project.lines("started"))
    scene.client.flushall()
    scene.client.script_flush()
    clock = Clock()
    results = [quick.enqueue(n) for n in range(10, 30)]
    assert [result.wait(timeout=60) for result in results] == list(range(10, 30))
    assert clock.s < 1.0 + test_trouble.BACK_S + SLACK_S
    assert worker.log.count("lost the lease") == 1
    assert scene.client.zcard(key("leases")) == 1
    assert worker.stop() == 0


def kept(scene: Scene, pid: int) -> int:
    seen = len(scene.project.lines("kept"))
    os.kill(pid, signal.SIGURG)
    until(lambda: len(scene.project.lines("kept")) > seen)
    return max(map(int, scene.project.lines("kept")[seen:]))


def test_what_is_kept_for_the_broker_is_bounded_by_what_was_claimed(scene: Scene) -> None:
    """No claims without a broker: so no more outcomes than a batch on its way, and what the two children had been
    handed, or were to be, and what was claimed for them at the last."""
    scene.project.add(WATCHED)
    worker = scene.worker("lease = 30")
    app, quick = scene.project.tasks.app, scene.project.tasks.quick
    app.enqueue_many(quick.s(n) for n in range(6000))
    until(lambda: len(scene.project.lines("quick")) > 500)
    stall = Stall()
    stall.begin(scene)
    seen = -1
    clock = Clock()
    while clock.s < 0.5:  # until nothing more is run
        if (now := len(scene.project.lines("quick"))) != seen:
            seen, clock = now, Clock()
    assert 0 < kept(scene, worker.pid) <= MOST_RECORDS + 3 * 2 * MAX_DEPTH
    stall.end(scene)
    until(lambda: len(scene.project.lines("quick")) == 6000)
    until(lambda: active(scene.project) == 0)
    assert set(counts(scene.project, "quick").values()) == {1}
    assert worker.stop() == 0


def test_what_is_not_settled_yet_does_not_grow_while_the_broker_is_slower_than_the_children(scene: Scene) -> None:
    """A claim brings more than a batch of outcomes takes. Each that a killed master has with it is run once more."""
    scene.project.add(WATCHED + NOTHING)
    app, nothing = scene.project.tasks.app, scene.project.tasks.nothing
    app.enqueue_many(nothing.s() for _ in range(30_000))
    worker = scene.worker("lease = 30\nconcurrency = 8")
    most = 0
    while scene.client.hlen(key("m")):
        most = max(most, kept(scene, worker.pid))
    assert 0 < most <= MOST_RECORDS + 3 * 8 * MAX_DEPTH
    assert worker.stop() == 0


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_kept_for_a_broker_that_takes_no_outcomes_is_bounded(scene: Scene, name: str) -> None:
    """It still hands out messages; but what they come to would pile up in the master."""
    begin, end = REFUSALS[name]
    scene.client.execute_command("ACL", "SETUSER", "bob", "on", ">old", "~*", "&*", "+@all")
    scene.project.add(SPLIT)
    worker = scene.worker("lease = 30", userinfo="bob:old@")
    app, split = scene.project.tasks.app, scene.project.tasks.split
    split.enqueue(0).wait(timeout=60)
    begin(scene)
    app.enqueue_many(split.s(n) for n in range(1, MANY))
    worker.wait_for("does not take")
    seen = -1
    clock = Clock()
    while clock.s < 1.2:  # until nothing more is run, nor because of what is tried meanwhile
        if (now := len(scene.project.lines("split"))) != seen:
            seen, clock = now, Clock()
    assert 0 < seen < MOST_REFUSED + 2 * 2 * MAX_DEPTH
    assert len(test_trouble.troubles(worker)) == 1, "said once"
    end(scene)
    until(lambda: len(scene.project.lines("split")) == MANY, 120)
    until(lambda: active(scene.project) == 0, 120)
    assert set(counts(scene.project, "split").values()) == {1}, "also of those that a broken-off script has put back"
    assert scene.client.llen(key("pending", "other")) == MANY
    assert worker.stop() == 0


def test_a_user_without_channels_is_refused_at_the_start_and_costs_nothing_later(scene: Scene) -> None:
    """As Redis 7 makes users, unless it is told otherwise."""
    scene.client.execute_command("ACL", "SETUSER", "bob", "on", ">old", "~*", "+@all", "resetchannels")
    worker = scene.worker(userinfo="bob:old@", wait=False)
    assert worker.wait() == 69
    assert "does not permit this user what prefork needs" in worker.log
    assert worker.log.count("\n") == 1
    scene.client.execute_command("ACL", "SETUSER", "bob", "allchannels")
    worker = scene.worker(userinfo="bob:old@")
    scene.client.execute_command("ACL", "SETUSER", "bob", "resetchannels")
    quick = scene.project.tasks.quick
    results = [quick.enqueue(n) for n in range(100)]
    assert [result.wait(timeout=60) for result in results] == list(range(100))
    # The server ends the connection that hears what is handed over; the next one does without.
    assert all("closed the connection" in it or "is back" in it for it in test_trouble.troubles(worker))
    assert worker.stop() == 0


def test_a_worker_goes_to_where_the_address_leads_after_a_failover(scene: Scene, server_binary: str) -> None:
    """The old primary lives on, as a replica, and the connections to it stay open."""
    worker = scene.worker("lease = 2")
    scene.project.tasks.quick.enqueue(0).wait(timeout=60)
    other = Server(server_binary)
    scene.more.append(other)
    scene.network.target = other.path
    scene.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    app = Prefork("producer", broker=other.url)
    app.task(name="quick")(lambda n: n).enqueue(1)
    until(lambda: "1" in scene.project.lines("quick"), test_trouble.BACK_S + SLACK_S, worker.log)
    app.client.close()
    assert worker.stop() == 0
