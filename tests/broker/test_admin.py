"""What operators do to queues: in bounded steps, also with large messages, odd ids, and producers that go on."""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from typing import Any

import orjson
import pytest
import redis

from prefork.broker import admin, doctor, listing, survey
from prefork.broker.client import Client
from prefork.message import State
from tests.conftest import Project, Server, until
from tests.process.scene import key

LARGE = "x" * 900_000
STOPPED_MS = 1.764e12


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url, "prefork")


def bury(project: Project, *results: Any, state: State | None = None) -> None:
    """Make dead letters of what waits."""
    store = project.server.client
    for result in results:
        store.lrem(key("pending"), 1, result.id)
        store.zadd(key("dead"), {result.id: STOPPED_MS})
        if state:
            store.hset(key("state"), result.id, state.encode())


def test_values_come_in_replies_of_bounded_size(project: Project, client: Client) -> None:
    store = project.server.client
    store.hset("h", mapping={str(n): LARGE if n % 2 else f"v{n}" for n in range(20)})
    asked: list[int] = []
    call = client.call

    def listening(it: Any, **options: Any) -> Any:
        found = call(it, **options)
        asked.append(sum(len(value or b"") for value in found))
        return found

    client.call = listening  # type: ignore[method-assign]
    fields = [*(str(n) for n in range(20)), "none"]
    found = list(listing.values(client, "h", fields))
    assert found == [*((LARGE if n % 2 else f"v{n}").encode() for n in range(20)), None]
    assert max(asked) < 1 << 21
    assert len(asked) == 11


def test_a_page_of_large_messages_is_whole(project: Project, client: Client) -> None:
    results = [project.tasks.nap.enqueue(LARGE, n) for n in range(7)]
    rows = listing.page(client, "default", "pending", 0, 5)
    assert [(row["id"], row["args"]) for row in rows] == [(it.id, [LARGE, n]) for n, it in enumerate(results[:5])]


def test_dead_letters_with_large_histories_are_retried(project: Project, client: Client) -> None:
    results = [project.tasks.add.enqueue(n) for n in range(30)]
    history = State(attempts=3, retried=2, crashes=1, errors=[{"class": "x.Y", "traceback": "t" * 16_000}] * 10)
    bury(project, *results, state=history)
    assert admin.retry_dead(client, "default") == 30
    after = State.decode(project.server.client.hget(key("state"), results[7].id))
    assert (after.attempts, after.retried, after.crashes, len(after.errors)) == (3, 0, 0, 10)


def test_a_dead_letter_whose_id_is_no_text_is_retried(project: Project, client: Client) -> None:
    store = project.server.client
    project.tasks.add.enqueue(1)
    store.hset(key("m"), b"\xff", b"garbage")
    store.zadd(key("dead"), {b"\xff": 1})
    assert admin.retry_dead(client, "default") == 1
    assert store.lrange(key("pending"), -1, -1) == [b"\xff"]


def test_retry_leaves_what_dies_again_meanwhile(project: Project, client: Client) -> None:
    result = project.tasks.add.enqueue(1)
    bury(project, result)
    project.server.client.zadd(key("dead"), {result.id: 9e12})
    assert admin.retry_dead(client, "default") == 0


def test_purge_ends_though_a_producer_goes_on(project: Project, client: Client) -> None:
    add, stop = project.tasks.add, threading.Event()
    project.tasks.app.enqueue_many(add.s(n) for n in range(500))

    def produce() -> None:
        while not stop.is_set():
            project.tasks.app.enqueue_many(add.s(n) for n in range(500))

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        before = until(lambda: project.server.client.llen(key("pending")) > 1000 and 1000)
        assert admin.purge(client, "default", ["pending", "scheduled"]) >= before
    finally:
        stop.set()
        producer.join()


def test_cancel_keeps_the_task_and_its_history_in_the_record(project: Project, client: Client) -> None:
    result = project.tasks.add.enqueue(1)
    project.server.client.hset(key("state"), result.id, State(attempts=2, errors=[{"class": "x.Y"}]).encode())
    seen = survey.find(client, result.id)
    assert admin.cancel(client, result.id, seen) == "cancelled"
    record = orjson.loads(project.server.client.get(key(f"r:{result.id}")))
    assert (record["task"], record["attempts"]) == (f"{project.module_name}.add", 2)
    assert [error["class"] for error in record["errors"]] == ["x.Y", "prefork.Cancelled"]
    assert record["enqueued_ms"] > 0
    assert admin.cancel(client, result.id, seen) == "finished"


def test_cancel_what_nobody_can_read(project: Project, client: Client) -> None:
    project.tasks.add.enqueue(1)
    project.server.client.hset(key("m"), "odd", "garbage")
    project.server.client.rpush(key("pending"), "odd")
    assert admin.cancel(client, "odd", survey.find(client, "odd")) == "cancelled"
    assert not project.server.client.hexists(key("m"), "odd")


# -- doctor -----------------------------------------------------------------------------------------------------------


def said(client: Client, part: str) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine(client) if part in finding.what]


def test_doctor_finds_what_is_in_two_places(project: Project, client: Client) -> None:
    first, second, third = (project.tasks.add.enqueue(n) for n in range(3))
    assert not said(client, "in two places")
    project.server.client.zadd(key("scheduled"), {first.id: 9e12})
    project.server.client.rpush(key("pending"), second.id)
    (finding,) = said(client, "are in two places")
    assert (finding.level, finding.what.split()[2]) == ("error", "2")
    project.server.client.zadd(key("leases"), {"h:m:1:2:3": 9e12})
    project.server.client.zadd(key("active:h:m:1:2:3"), {third.id: 1})
    project.server.client.zadd(key("dead"), {third.id: 1})
    project.server.client.delete(key("scheduled"), key("pending"))
    (finding,) = said(client, "are in two places")  # a worker's, and a dead letter
    assert third.id in finding.what


def test_doctor_finds_ids_without_a_message(project: Project, client: Client) -> None:
    project.tasks.add.enqueue(1)
    project.server.client.zadd(key("dead"), {"bare": 1})
    (finding,) = said(client, "have no message")
    assert (finding.level, finding.what.split(": ")[-1]) == ("warning", "bare")


def test_doctor_takes_small_steps_where_there_are_many_workers(project: Project, client: Client) -> None:
    store = project.server.client
    for n in range(300):
        store.zadd(key("leases"), {f"h:m:{n}:2:3": 9e12})
        store.zadd(key(f"active:h:m:{n}:2:3"), {f"id{n}-{i}": i for i in range(5)})
        store.hset(key("m"), mapping={f"id{n}-{i}": "x" for i in range(5)})
    project.tasks.add.enqueue(1)
    plain = redis.Redis(connection_pool=store.connection_pool)
    plain.response_callbacks.pop("INFO")  # to parse it all takes longer than all else here
    counted = [commands(plain)]
    call = client.call

    def counting(it: Any, **options: Any) -> Any:
        found = call(it, **options)
        counted.append(commands(plain))
        return found

    client.call = counting  # type: ignore[method-assign]
    assert not said(client, "in two places")
    assert max(after - before for before, after in pairwise(counted)) < 1000, "each takes about a microsecond"


def commands(store: Any) -> int:
    """How many commands the server has carried out, those inside scripts counted."""
    return sum(map(int, re.findall(rb"calls=([0-9]+)", store.execute_command("INFO", "commandstats"))))


def test_doctor_tells_what_dead_workers_hold(project: Project, client: Client) -> None:
    result = project.tasks.add.enqueue(1)
    store = project.server.client
    store.lpop(key("pending"))
    store.zadd(key("leases"), {"web1:m:77:2:3": 1})
    store.zadd(key("active:web1:m:77:2:3"), {result.id: 1})
    (finding,) = said(client, "leases of 1 workers have ended")
    assert finding.level == "error"
    assert "first that of pid 77 on web1; they hold 1 tasks" in finding.what
    assert "takes over" in finding.remedy


def test_doctor_names_a_paused_queue_and_how_to_resume_it(project: Project, client: Client) -> None:
    project.tasks.add.enqueue(1)
    admin.pause(client, "default", on=True)
    (finding,) = said(client, "is paused, 1 tasks wait")
    assert finding.remedy.startswith("prefork resume default")


@pytest.mark.parametrize(
    ("policy", "limit", "level", "what"),
    [
        ("allkeys-lru", "100mb", "error", "when memory is short, tasks are thrown away"),
        ("allkeys-lru", "0", "warning", "as soon as there is a maxmemory and it is reached, tasks are thrown away"),
        ("volatile-ttl", "100mb", "warning", "when memory is short, results are thrown away before their time"),
    ],
)
def test_doctor_warns_of_policies_that_evict(
    own_server: Server, policy: str, limit: str, level: str, what: str
) -> None:
    own_server.client.config_set("maxmemory", limit)
    own_server.client.config_set("maxmemory-policy", policy)
    (finding,) = said(Client(own_server.url, "prefork"), "maxmemory-policy is")
    assert (finding.level, finding.what) == (level, f"maxmemory-policy is {policy}: {what}")
