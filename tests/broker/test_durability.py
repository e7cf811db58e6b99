"""What an enqueue waits for: real servers, one of them with a replica."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefork import EnqueueUncertain, InvalidOption, Prefork
from prefork.broker import verbs
from prefork.broker.durability import Durability, parse
from prefork.errors import BrokerError
from tests.broker.bench import Bench
from tests.broker.wires import free_port
from tests.conftest import SLACK_S, Project, Server, until
from tests.process.proxy import Network
from tests.process.scene import counts

LIMIT_S = 10.0  # of which replicas get a third


def app_on(server: Server, durability: str, limit_s: float = 5.0) -> Prefork:
    app = Prefork("test", broker=server.url, durability=durability, limit_s=limit_s)
    app.task(name="add")(add)
    return app


def add(a: int) -> int:
    return a


@pytest.fixture
def with_replica(server_binary: str) -> Iterator[tuple[Server, Server]]:
    port = free_port()
    primary = Server(server_binary, "--port", str(port))
    replica = Server(server_binary, "--replicaof", "127.0.0.1", str(port))
    until(lambda: replica.client.info("replication")["master_link_status"] == "up")
    yield primary, replica
    replica.close()
    primary.close()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [(None, None), ("fsync", Durability(fsync=True)), ("replicas:1", Durability(1)), ("replicas:12", Durability(12))],
)
def test_what_may_be_asked_for(text: str | None, meaning: Durability | None) -> None:
    assert parse(text) == meaning


@pytest.mark.parametrize("text", ["", "disk", "replicas", "replicas:0", "replicas:-1", "replicas:100", 7])
def test_what_may_not(text: str) -> None:
    with pytest.raises(InvalidOption, match="durability must be 'fsync' or 'replicas:N'"):
        Prefork("test", durability=text)


def test_on_disk(own_server: Server) -> None:
    app = app_on(own_server, "fsync")
    if tuple(map(int, own_server.client.info("server")["redis_version"].split(".")[:2])) < (7, 2):
        with pytest.raises(BrokerError, match="cannot say what is on its disk"):
            app.tasks["add"].enqueue(1)
        return
    result = app.tasks["add"].enqueue(1)
    app.enqueue_many(app.tasks["add"].s(n) for n in range(100))
    own_server.kill()
    own_server.start()
    result.refresh()
    assert result.status == "READY"
    assert own_server.client.llen("prefork:{default}:pending") == 101


def test_a_server_without_an_append_only_file_is_refused_with_the_remedy(server: Server) -> None:
    with pytest.raises(BrokerError, match=r"CONFIG SET appendonly yes|cannot say what is on its disk"):
        app_on(server, "fsync").tasks["add"].enqueue(1)


def test_a_repeat_of_what_was_accepted_waits_for_the_replicas_too(with_replica: tuple[Server, Server]) -> None:
    primary, replica = with_replica
    client = app_on(primary, "replicas:1", LIMIT_S).client
    entries = [verbs.Entry("default", "a", 0, "", b'{"task":"t"}\n[[],{}]')]
    client.enqueue("default", [])
    assert replica.process
    replica.process.send_signal(signal.SIGSTOP)
    Bench(primary.client, "default").run(verbs.enqueue(client.keys("default"), entries))  # its reply was lost
    with pytest.raises(EnqueueUncertain, match="has accepted the task, but it has reached 0 of 1 replicas"):
        client.enqueue("default", entries)
    replica.process.send_signal(signal.SIGCONT)
    client.enqueue("default", entries)
    assert replica.client.lrange("prefork:{default}:pending", 0, -1) == [b"a"]


def test_on_a_replica(with_replica: tuple[Server, Server]) -> None:
    primary, replica = with_replica
    app = app_on(primary, "replicas:1", LIMIT_S)
    primary.client.script_flush()
    result = app.tasks["add"].enqueue(1)
    assert replica.client.lrange("prefork:{default}:pending", 0, -1) == [result.id.encode()]


def test_what_does_not_reach_its_replicas_in_time_is_said_so_and_stands_all_the_same(
    with_replica: tuple[Server, Server],
) -> None:
    primary, replica = with_replica
    add = app_on(primary, "replicas:1", LIMIT_S).tasks["add"]
    add.enqueue(1)
    assert replica.process
    replica.process.send_signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    with pytest.raises(EnqueueUncertain, match="has accepted the task, but it has reached 0 of 1 replicas"):
        add.enqueue(2)
    assert time.monotonic() - begun_s < LIMIT_S + SLACK_S
    replica.process.send_signal(signal.SIGCONT)
    assert primary.client.llen("prefork:{default}:pending") == 2
    add.enqueue(3)


def test_a_wait_that_a_failover_breaks_off_is_begun_again(with_replica: tuple[Server, Server]) -> None:
    primary, replica = with_replica
    add = app_on(primary, "replicas:1", LIMIT_S).tasks["add"]
    add.enqueue(1)
    assert replica.process
    replica.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor() as threads:
        second = threads.submit(add.enqueue, 2)
        (waiting,) = until(
            lambda: [it for it in primary.client.client_list() if it["cmd"] == "wait" and "b" in it["flags"]]
        )
        primary.client.execute_command("CLIENT", "UNBLOCK", waiting["id"], "ERROR")
        replica.process.send_signal(signal.SIGCONT)
        id = second.result().id
    assert primary.client.lrange("prefork:{default}:pending", -1, -1) == [id.encode()]
    assert primary.client.llen("prefork:{default}:pending") == 2


def test_what_was_accepted_before_the_wait_was_refused_is_said_to_be(own_server: Server) -> None:
    app = app_on(own_server, "replicas:1")
    own_server.client.execute_command("ACL", "SETUSER", "default", "-wait")
    with pytest.raises(EnqueueUncertain, match="has accepted the task, and then refused more"):
        app.tasks["add"].enqueue(1)
    assert own_server.client.llen("prefork:{default}:pending") == 1


def test_a_primary_that_has_too_few_replicas_to_accept_is_asked_again(own_server: Server) -> None:
    app = Prefork("test", broker=own_server.url, limit_s=60.0)
    task = app.task(name="add")(add)
    own_server.client.config_set("min-replicas-to-write", 1)
    with ThreadPoolExecutor() as threads:
        result = threads.submit(task.enqueue, 1)
        until(lambda: own_server.client.info("errorstats").get("errorstat_NOREPLICAS"))
        own_server.client.config_set("min-replicas-to-write", 0)
        assert result.result().id
    own_server.client.config_set("min-replicas-to-write", 1)
    app.client.limit_s = 0.1

    def said() -> str:
        with pytest.raises(BrokerError) as caught:
            task.enqueue(1)
        return str(caught.value)

    # On a busy machine it may hear nothing in so short a time.
    until(lambda: "has too few replicas to accept writes; see its min-replicas-to-write" in said())


def test_a_repeat_waits_for_what_another_connection_has_written(with_replica: tuple[Server, Server]) -> None:
    primary, replica = with_replica
    with Network(primary.path) as network:
        app = Prefork("test", broker=f"redis://127.0.0.1:{network.port}/0", durability="replicas:1", limit_s=LIMIT_S)
        task = app.task(name="add")(add)
        task.enqueue(1)
        assert replica.process
        replica.process.send_signal(signal.SIGSTOP)
        network.lose(verbs.script("enqueue").sha.encode())
        with pytest.raises(EnqueueUncertain, match="has reached 0 of 1 replicas"):
            task.enqueue(2)
        assert network.lost == 1
        replica.process.send_signal(signal.SIGCONT)
        app.client.close()


# -- outcomes ---------------------------------------------------------------------------------------------------------


def test_an_outcome_that_a_failover_would_have_lost_is_settled_by_the_new_primary(
    server_binary: str, tmp_path: Path
) -> None:
    primary = Server(server_binary)
    with Network(primary.path) as replication, Network(primary.path) as network:
        replica = Server(server_binary, "--replicaof", "127.0.0.1", str(replication.port))
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        project = Project(tmp_path, primary, f"tasks_lasting_{network.port}")
        try:
            worker = project.worker(f"broker = redis://127.0.0.1:{network.port}/0\ndurability = replicas:1")
            result = project.tasks.hold.enqueue(1)
            until(lambda: project.lines("started"))
            assert primary.client.execute_command("WAIT", 1, 60_000) == 1
            replication.set("drop")
            project.let_go()
            worker.wait_for("does not take outcomes of queue default: what was written has reached 0 of 1 replicas")
            primary.kill()
            network.target = replica.path
            replica.client.execute_command("REPLICAOF", "NO", "ONE")
            other = Server(server_binary, "--replicaof", f"127.0.0.1 {replication.port}")
            replication.target = replica.path
            replication.heal()
            project.tasks.app.client.url = replica.url
            project.tasks.app.client.close()
            assert result.wait(timeout=60) == 1
            worker.wait_for("the broker is back after")
            assert counts(project, "ended") == {"1": 1}
            assert worker.stop() == 0
            other.close()
        finally:
            project.close()
            replica.close()
            primary.close()


def test_outcomes_on_disk(own_project: Project) -> None:
    server = own_project.server
    if tuple(map(int, server.client.info("server")["redis_version"].split(".")[:2])) < (7, 2):
        pytest.skip("needs WAITAOF")
    worker = own_project.worker("durability = fsync")
    results = own_project.tasks.app.enqueue_many(own_project.tasks.add.s(n) for n in range(100))
    assert [result.wait(timeout=60) for result in results] == list(range(2, 102))
    assert server.client.info("commandstats")["cmdstat_waitaof"]["calls"] > 1
    server.client.script_flush()  # what has to be sent in full comes behind the wait that was for it
    assert own_project.tasks.add.enqueue(1).wait(timeout=60) == 3
    until(lambda: not server.client.hlen("prefork:{default}:m"))
    server.client.config_set("appendonly", "no")
    own_project.tasks.add.enqueue(1)
    worker.wait_for("does not take outcomes of queue default")
    server.client.config_set("appendonly", "yes")
    worker.wait_for("the broker is back after")
    assert worker.stop() == 0


@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_a_worker_is_refused_at_its_start_where_the_server_lacks_it(project: Project, flags: tuple[str, ...]) -> None:
    worker = project.worker("durability = fsync", *flags, wait=False)
    assert worker.wait() == 69
    assert "CONFIG SET appendonly yes" in worker.log or "cannot say what is on its disk" in worker.log
    assert worker.log.count("\n") == 1
