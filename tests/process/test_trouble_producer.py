"""Redis in trouble, as producers see it: tried again within the limit, accepted once; else an error that says whether
the task may have been accepted.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from prefork import BrokerError, EnqueueUncertain, Prefork
from prefork.broker import verbs
from tests.conftest import SLACK_S, Project, Server, until
from tests.process import test_trouble
from tests.process.scene import Clock, key
from tests.process.test_trouble import FAULTS, Fault, MaxClients, NoPermission, Password, Refusal, Restart, Scene

LIMIT_S = 20.0
ENQUEUE = verbs.script("enqueue").sha.encode()

PASSING = {name: fault for name, fault in FAULTS.items() if not isinstance(fault, NoPermission | Password)}
del PASSING["NOAUTH"], PASSING["MISCONF"], PASSING["failover"], PASSING["LOADING"]
# They take longer than a limit to be arranged, but for the refusal itself.
PASSING["READONLY_failover"] = Refusal(b"-READONLY You can't write against a read only replica.", "", kick=True)
PASSING["LOADING"] = Refusal(b"-LOADING Redis is loading the dataset in memory", "", kick=True)
PASSING["MASTERDOWN"] = Refusal(b"-MASTERDOWN Link with MASTER is down", "", kick=False)
PASSING["TRYAGAIN"] = Refusal(b"-TRYAGAIN Multiple keys request during rehashing of slot", "", kick=False)
LASTING = {"OOM", "MISCONF", "NOAUTH", "WRONGPASS", "NOPERM"}


class OutOfMemory(Fault):
    """It has no room for more."""

    def begin(self, scene: Scene) -> None:
        scene.client.config_set("maxmemory", "1")

    def end(self, scene: Scene) -> None:
        scene.client.config_set("maxmemory", "0")


class Producer:
    """An app of its own, behind the network."""

    def __init__(self, url: str, limit_s: float = LIMIT_S) -> None:
        self.app = Prefork("producer", broker=url, limit_s=limit_s)
        self.task: Any = self.app.task(name="noted")(lambda n: n)

    def enqueue_later(self, n: int) -> Callable[[], Any]:
        """Enqueue in a thread. -> waits for it, and returns its result, or raises its error"""
        results: list[Any] = []

        def run() -> None:
            try:
                results.append(self.task.enqueue(n))
            except BrokerError as error:
                results.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def outcome() -> Any:
            thread.join(60)
            if isinstance(results[0], Exception):
                raise results[0]
            return results[0]

        return outcome


@pytest.fixture
def scene(own_project: Project) -> Iterator[Scene]:
    yield from test_trouble.staged(own_project)


def messages(server: Server) -> int:
    return int(server.client.hlen(key("m")))


@pytest.mark.parametrize("name", PASSING)
def test_an_enqueue_outlives_trouble_that_is_shorter_than_its_limit(scene: Scene, name: str) -> None:
    fault = PASSING[name]
    fault.prepare(scene)
    producer = Producer(scene.url())
    producer.task.enqueue(0)
    fault.begin(scene)
    if isinstance(fault, MaxClients):
        scene.network.cut()
    waits = [producer.enqueue_later(n) for n in range(1, 4)]
    clock = Clock()
    until(lambda: clock.s > 0.7)
    fault.end(scene)
    assert len({wait().id for wait in waits}) == 3
    assert messages(scene.server) == 4, "each once"
    assert scene.client.llen(key("pending")) == 4
    producer.app.client.close()


@pytest.mark.parametrize("name", ["SIGKILL", "READONLY", "CLUSTERDOWN", "BUSY", "half_open", "stall", "partition"])
def test_trouble_that_is_longer_is_an_error_that_says_what_may_be(scene: Scene, name: str) -> None:
    fault = FAULTS[name]
    producer, patient = Producer(scene.url(), limit_s=4.0), Producer(scene.url(), limit_s=60.0)
    until(lambda: connected(producer))
    before = messages(scene.server)
    fault.begin(scene)
    clock = Clock()
    with pytest.raises(BrokerError) as caught:
        producer.task.enqueue(1)
    assert clock.s < 4.0 + SLACK_S
    # A request that went into the silence may be carried out when it ends. Whether one went to a server that was killed
    # depends on when its connections ended.
    open_end = isinstance(caught.value, EnqueueUncertain)
    assert name == "SIGKILL" or open_end is (name in ("half_open", "stall", "partition")), caught.value
    assert ("may have been accepted" in str(caught.value)) is open_end
    fault.end(scene)
    until(lambda: messages(scene.server) >= before)
    patient.task.enqueue(2)
    assert messages(scene.server) - before in ((1, 2) if open_end else (1,))
    for it in (producer, patient):
        it.app.client.close()


def connected(producer: Producer) -> bool:
    """Let it enqueue something, however often it takes on a busy machine."""
    with contextlib.suppress(BrokerError):
        producer.task.enqueue(0)
        return True
    return False


@pytest.mark.parametrize("name", sorted(LASTING))
def test_what_does_not_pass_by_itself_is_an_error_at_once(scene: Scene, name: str) -> None:
    fault = OutOfMemory() if name == "OOM" else FAULTS[name]
    fault.prepare(scene)
    producer = Producer(scene.url(fault.userinfo), limit_s=20.0)
    producer.task.enqueue(0)
    fault.begin(scene)
    scene.network.cut()
    clock = Clock()
    with pytest.raises(BrokerError) as caught:
        producer.task.enqueue(1)
    assert clock.s < SLACK_S
    assert not isinstance(caught.value, EnqueueUncertain)
    fault.end(scene)
    producer.task.enqueue(2)
    assert messages(scene.server) == 2
    producer.app.client.close()


@pytest.mark.parametrize("keep", [0, 5])
def test_a_lost_reply_does_not_double_a_task(scene: Scene, keep: int) -> None:
    producer = Producer(scene.url())
    producer.task.enqueue(0)
    scene.network.lose(ENQUEUE, 2, keep=keep)
    producer.app.enqueue_many(producer.task.s(n) for n in range(50))
    assert scene.network.lost == 2
    assert messages(scene.server) == scene.client.llen(key("pending")) == 51


def test_a_lost_reply_does_not_run_again_what_has_run_meanwhile(scene: Scene) -> None:
    worker = scene.project.worker()
    quick = scene.project.tasks.quick
    app = Prefork("producer", broker=scene.url(), limit_s=LIMIT_S)
    task = app.task(name="quick", result_ttl=600)(lambda n: n)
    quick.enqueue(0).wait(timeout=60)
    scene.network.lose(ENQUEUE, then=lambda: until(lambda: scene.project.lines("quick") == ["0", "1"]))
    assert task.enqueue(1).wait(timeout=60) == 1
    assert scene.network.lost == 1
    assert quick.enqueue(2).wait(timeout=60) == 2
    assert scene.project.lines("quick") == ["0", "1", "2"]
    app.client.close()
    assert worker.stop() == 0


def test_the_limit_is_one_for_all_that_an_enqueue_does(scene: Scene) -> None:
    """Its first one asks for the version, and makes the queue known; each reply is late, and none too late."""
    producer = Producer(scene.url(), limit_s=1.0)
    scene.network.delay_s = 0.4
    clock = Clock()
    with pytest.raises(BrokerError, match="does not answer in time") as caught:
        producer.task.enqueue(1)
    assert clock.s < 1.0 + SLACK_S
    assert not isinstance(caught.value, EnqueueUncertain)
    assert messages(scene.server) == 0, "nothing was sent"


def test_a_producer_goes_to_where_the_address_leads_after_a_failover(scene: Scene, server_binary: str) -> None:
    """The old primary lives on, as a replica, and the connection to it stays open."""
    producer = Producer(scene.url())
    producer.task.enqueue(0)
    other = Server(server_binary)
    scene.more.append(other)
    scene.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    scene.network.target = other.path
    producer.task.enqueue(1)
    assert messages(other) == 1
    scene.client.execute_command("REPLICAOF", "NO", "ONE")
    producer.app.client.close()


def test_many_producers_wait_out_a_restart(scene: Scene) -> None:
    producers = [Producer(scene.url(), limit_s=30.0) for _ in range(4)]
    for producer in producers:
        producer.task.enqueue(-1)
    accepted: list[str] = []
    stop = threading.Event()

    def produce(producer: Producer) -> None:
        while not stop.is_set():
            accepted.append(producer.task.enqueue(1).id)

    threads = [threading.Thread(target=produce, args=(producer,), daemon=True) for producer in producers]
    for thread in threads:
        thread.start()
    for number in (signal.SIGKILL, signal.SIGTERM):
        seen = len(accepted)
        until(lambda seen=seen: len(accepted) > seen + 20)  # type: ignore[misc]
        fault = Restart(number)
        fault.begin(scene)
        fault.end(scene)
    seen = len(accepted)
    until(lambda: len(accepted) > seen + 20)
    stop.set()
    for thread in threads:
        thread.join(60)
    stored = {id.decode() for id in scene.client.hkeys(key("m"))}
    assert set(accepted) <= stored
    assert len(stored) == len(set(accepted)) + 4, "and none twice"
