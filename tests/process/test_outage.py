"""The broker goes away, comes back, stands still, or refuses: the worker goes on with what it can, and says so once."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from prefork import BrokerError
from prefork.broker import verbs
from prefork.broker.client import Client
from tests.conftest import PATIENCE_S, SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, active, counts, gone, key, place

QUICK = """
@app.task(name="quick", result_ttl=0)
def quick(n):
    note("quick", n)

@app.task(name="big")
def big(n):
    note("big", n)
    return str(n % 10) * 900_000
"""


def test_a_broker_that_is_restarted_under_load_costs_nothing(own_project: Project) -> None:
    project = own_project
    project.add(QUICK)
    worker = project.worker("lease = 30")
    app, quick = project.tasks.app, project.tasks.quick
    app.client.limit_s = PATIENCE_S
    app.enqueue_many(quick.s(n) for n in range(12_000))
    for seen in (1500, 5000):
        until(lambda seen=seen: len(project.lines("quick")) > seen)  # type: ignore[misc]
        project.server.kill()
        until(lambda: worker.log.count("ERROR") == (1 if seen == 1500 else 2), what="the outage is logged")  # noqa: B023
        project.server.start()
        until(lambda: worker.log.count("is back after") == (1 if seen == 1500 else 2))  # noqa: B023
    until(lambda: len(set(project.lines("quick"))) == 12_000)
    until(lambda: active(project) == 0)
    assert worker.log.count("ERROR") == 2
    assert worker.log.count("is back after") == 2
    again = [n for n, times in counts(project, "quick").items() if times > 1]
    assert again == [], "the worker lived on: it knows what it has run"
    assert worker.stop() == 0
    assert project.server.client.hlen(key("m")) == 0


def test_what_ends_while_the_broker_is_away_is_settled_when_it_is_back(own_project: Project) -> None:
    project = own_project
    worker = project.worker()
    result = project.tasks.nap.enqueue(1, 1.0)
    until(lambda: project.lines("started"))
    project.server.kill()
    until(lambda: project.lines("ended"))
    until(lambda: "ERROR" in worker.log)
    project.server.start()
    assert result.wait(timeout=60) == 1
    assert counts(project, "ended") == {"1": 1}
    assert worker.stop() == 0


def test_a_long_outage_is_said_once_and_its_length_once(own_project: Project) -> None:
    project = own_project
    worker = project.worker()
    project.server.kill()
    until(lambda: "ERROR" in worker.log)
    clock = Clock()
    until(lambda: clock.s > 2)
    assert worker.log.count("trying again") == 1
    project.server.start()
    until(lambda: "is back after" in worker.log)
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert len([line for line in worker.log.splitlines() if "broker" in line]) == 2
    assert worker.stop() == 0


@pytest.mark.parametrize("busy", [False, True])
def test_a_stop_while_the_broker_is_down_is_bounded(own_project: Project, busy: bool) -> None:
    project = own_project
    worker = project.worker("shutdown_timeout = 1")
    if busy:
        project.tasks.nap.enqueue(1, 60)
        until(lambda: project.lines("started"))
    children = worker.children()
    project.server.kill()
    until(lambda: "ERROR" in worker.log)
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < 1 + SLACK_S
    until(lambda: gone(*children))
    project.server.start()
    worker = project.worker("shutdown_timeout = 0")
    until(lambda: len(project.lines("started")) == (2 if busy else 0))
    assert worker.stop() == 0


def test_a_broker_that_stands_still_keeps_no_child_from_its_deadline(own_project: Project) -> None:
    project = own_project
    worker = project.worker("shutdown_timeout = 1")
    result = project.tasks.nap.using(timeout=3.0, max_retries=0).enqueue(1, 60)
    until(lambda: project.lines("started"))
    pid = int(project.lines("started")[0].split()[1])
    server: Any = project.server.process
    server.send_signal(signal.SIGSTOP)
    try:
        until(lambda: gone(pid), 3 + SLACK_S, "it is killed at its deadline")
        until(lambda: len(worker.children()) == 2)
    finally:
        server.send_signal(signal.SIGCONT)
    until(lambda: place(project, result) == "dead")
    assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_while_the_broker_stands_still_is_bounded(own_project: Project, number: int) -> None:
    project = own_project
    worker = project.worker("shutdown_timeout = 1\nlease = 60")
    result = project.tasks.nap.enqueue(1, 60)
    until(lambda: project.lines("started"))
    # A server that still has a reply for a client that is gone drops what it has not read of it.
    until(lambda: project.server.client.exists(key("idle")), what="its latest claim is carried out")
    project.server.client.ping()  # and answered
    children = worker.children()
    server: Any = project.server.process
    server.send_signal(signal.SIGSTOP)
    try:
        clock = Clock()
        assert worker.stop(number) == 0
        assert clock.s < 1 + SLACK_S
        until(lambda: gone(*children))
    finally:
        server.send_signal(signal.SIGCONT)
    until(lambda: place(project, result) == "pending")
    until(lambda: not project.server.client.exists(key("leases")), what="what it was told it has done")
    worker = project.worker("shutdown_timeout = 0")
    until(lambda: len(project.lines("started")) == 2)
    assert worker.stop() == 0


def test_a_broker_killed_amid_large_results_costs_nothing(own_project: Project) -> None:
    project = own_project
    project.add(QUICK)
    worker = project.worker()
    results = [project.tasks.big.enqueue(n) for n in range(12)]
    until(lambda: len(project.lines("big")) >= 2)
    server: Any = project.server.process
    server.send_signal(signal.SIGSTOP)
    # Now more waits to be sent than a socket holds.
    clock = Clock()
    until(lambda: len(project.lines("big")) >= 4 or clock.s > 0.5)
    project.server.kill()
    project.server.start()
    assert [result.wait(timeout=60)[0] for result in results] == [str(n % 10) for n in range(12)]
    assert worker.process.poll() is None
    assert worker.stop() == 0


def test_a_broker_that_is_out_of_memory_still_takes_what_has_ended(own_project: Project) -> None:
    project = own_project
    worker = project.worker()
    results = [project.tasks.nap.enqueue(n, 0.5) for n in range(4)]
    until(lambda: len(project.lines("started")) >= 2)
    project.server.client.config_set("maxmemory", "1")
    assert [result.wait(timeout=60) for result in results] == [0, 1, 2, 3]
    with pytest.raises(BrokerError, match="is out of memory"):
        project.tasks.add.enqueue(1)
    project.server.client.config_set("maxmemory", "0")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_broker_that_is_out_of_memory_takes_no_lease_away(own_project: Project) -> None:
    project = own_project
    workers, client = [project.worker("lease = 9"), project.worker("lease = 9")], project.server.client
    results = [project.tasks.hold.enqueue(n) for n in range(4)]
    until(lambda: len(project.lines("started")) == 4)
    client.config_set("maxmemory", "1")
    before = dict(client.zrange(key("leases"), 0, -1, withscores=True))
    until(lambda: all(client.zscore(key("leases"), name) > ends for name, ends in before.items()), what="beats")
    client.config_set("maxmemory", "0")
    project.let_go()
    assert [result.wait(timeout=60) for result in results] == [0, 1, 2, 3]
    assert len(project.lines("started")) == 4
    assert not [worker.log for worker in workers if "took over" in worker.log or "lost the lease" in worker.log]
    assert [worker.stop() for worker in workers] == [0, 0]


def test_a_broker_that_turns_read_only_is_said_once_in_a_while_and_nothing_is_lost(own_project: Project) -> None:
    project = own_project
    worker = project.worker("lease = 30")
    results = [project.tasks.nap.enqueue(n, 0.5) for n in range(4)]
    until(lambda: len(project.lines("started")) >= 2)
    project.server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    clock = Clock()
    until(lambda: clock.s > 3)
    assert worker.process.poll() is None
    said = [line for line in worker.log.splitlines() if "ERROR" in line]
    assert 1 <= len(said) <= 5, said
    project.server.client.execute_command("REPLICAOF", "NO", "ONE")
    assert [result.wait(timeout=60) for result in results] == [0, 1, 2, 3]
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert counts(project, "ended") == {str(n): 1 for n in range(4)}
    assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_while_the_broker_is_read_only_is_bounded(own_project: Project, number: int) -> None:
    project = own_project
    worker = project.worker("shutdown_timeout = 1")
    project.tasks.nap.enqueue(1, 60)
    until(lambda: project.lines("started"))
    project.server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    children = worker.children()
    clock = Clock()
    assert worker.stop(number) == 0
    assert clock.s < 1 + SLACK_S
    until(lambda: gone(*children))


def test_a_claim_that_is_carried_out_when_nobody_waits_for_its_reply_strands_nothing(project: Project) -> None:
    """What a network has held up may arrive when the worker has long been on another connection."""
    worker = project.worker("lease = 6")
    project.tasks.add.enqueue(0).wait(timeout=60)
    (name,) = (it.decode() for it in project.server.client.zrange(key("leases"), 0, -1))
    worker.send(signal.SIGSTOP)
    results = project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(10))
    late = Client(project.server.url, "prefork")
    late.call(verbs.claim(late.keys("default"), name, 5))
    late.close()
    assert active(project) == 5
    worker.send(signal.SIGCONT)
    assert [result.wait(timeout=60) for result in results] == [*range(2, 12)]
    assert "for this worker, of which 0 have come; the others go back" in worker.log
    until(lambda: active(project) == 0)
    assert worker.stop() == 0
    assert "ERROR" not in worker.log


def test_a_queue_that_takes_nothing_back_holds_up_no_other(project: Project) -> None:
    worker = project.worker("lease = 6\nqueues = mail, default")
    add, client = project.tasks.add, project.server.client
    add.enqueue(0).wait(timeout=60)
    (name,) = (it.decode() for it in client.zrange(key("leases"), 0, -1))
    worker.send(signal.SIGSTOP)
    mails = project.tasks.app.enqueue_many(add.using(queue_name="mail").s(n) for n in range(6))
    late = Client(project.server.url, "prefork")
    late.call(verbs.claim(late.keys("mail"), name, 3))
    pending = late.keys("mail").pending
    late.close()
    client.rename(pending, "elsewhere")
    client.set(pending, "spoiled")
    worker.send(signal.SIGCONT)
    worker.wait_for("WRONGTYPE")
    results = project.tasks.app.enqueue_many(add.s(n) for n in range(50))
    assert [result.wait(timeout=60) for result in results] == [*range(2, 52)]
    client.rename("elsewhere", pending)  # in one step: what is put back between two would be overwritten
    assert [result.wait(timeout=60) for result in mails] == [*range(2, 8)]
    assert worker.stop() == 0


def test_a_connection_that_is_cut_costs_nothing(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker()
    step = project.tasks.step
    results = project.tasks.app.enqueue_many(step.s(n) for n in range(3000))
    client = project.server.client
    cuts = 0
    while len(project.lines("steps")) < 3000 and cuts < 40:
        for connection in client.client_list():
            if connection["name"].startswith("prefork-") and connection["name"] != "prefork-producer":
                client.execute_command("CLIENT", "KILL", "ID", connection["id"])
        cuts += 1
        seen = len(project.lines("steps"))
        until(lambda seen=seen: len(project.lines("steps")) > seen or seen >= 3000)  # type: ignore[misc]
    for result in results:
        result.wait(timeout=60)
    assert set(counts(project, "steps").values()) == {1}
    assert worker.stop() == 0


def test_a_broker_without_our_scripts_is_given_them_again(project: Project) -> None:
    worker = project.worker()
    project.tasks.add.enqueue(1).wait(timeout=60)
    project.server.client.script_flush()
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_broker_that_lost_its_data_is_worked_for_again(project: Project) -> None:
    worker = project.worker("lease = 1")
    project.tasks.add.enqueue(1).wait(timeout=60)
    project.server.client.flushall()
    until(lambda: "lost the lease" in worker.log)
    project.tasks.app.client.close()
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_worker_needs_a_broker_to_start_and_says_so_in_one_line(project: Project) -> None:
    worker = project.worker("broker = unix:///nonexistent/socket", wait=False)
    assert worker.wait() == 69
    assert len(worker.log.splitlines()) == 1
    assert "/nonexistent/socket" in worker.log
    assert not os.path.exists("/nonexistent")
