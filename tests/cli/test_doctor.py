"""`prefork doctor` as an auditor: whatever is wrong with the data is found and repaired, and nothing else ever."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from prefork.broker import doctor
from prefork.broker.client import Client
from prefork.broker.doctor import examine
from prefork.message import State
from tests.cli.command import as_json, prefork
from tests.conftest import Project, until
from tests.process.scene import key

GONE = "web9:00000000:77:2:3"
MESSAGE = '1 1764000000000 {} {{"task":"{}.step"}}\n[["{}"],{{}}]'
STEP = "@app.task(name='{name}.step', result_ttl=0)\ndef step(n):\n    note('steps', n)"


class Scene:
    """A queue with ten sound messages, and raw commands to damage it."""

    def __init__(self, project: Project) -> None:
        self.project, self.store = project, project.server.client
        project.add(STEP.format(name=project.module_name))
        self.ids = [project.tasks.step.enqueue(f"sound{n}").id for n in range(10)]
        self.expected = {f"sound{n}" for n in range(10)}

    def message(self, id: str, priority: int = 0) -> str:
        """A message that stands in no place yet."""
        self.store.hset(key("m"), id, MESSAGE.format(priority, self.project.module_name, id))
        self.expected.add(id)
        return id

    def lose_body(self, id: str) -> None:
        """Nobody can know what it was."""
        self.store.hdel(key("m"), id)
        self.expected.discard(f"sound{self.ids.index(id)}")

    def spoil(self, id: str, raw: bytes) -> None:
        self.store.hset(key("m"), id, raw)
        self.expected.discard(f"sound{self.ids.index(id)}")


DAMAGES: dict[str, tuple[str, Callable[[Scene], Any]]] = {}


def damage(code: str) -> Callable[[Callable[[Scene], Any]], Callable[[Scene], Any]]:
    def note(do: Callable[[Scene], Any]) -> Callable[[Scene], Any]:
        DAMAGES[do.__name__] = code, do
        return do

    return note


@damage("nowhere")
def message_in_no_place(it: Scene) -> None:
    it.message("lost")


@damage("nowhere")
def ranked_message_in_no_place(it: Scene) -> None:
    it.message("ranked", 7)


@damage("nowhere")
def pending_gone(it: Scene) -> None:
    it.store.delete(key("pending"))


@damage("twice")
def pending_and_scheduled(it: Scene) -> None:
    it.store.zadd(key("scheduled"), {it.ids[3]: 9e12})


@damage("twice")
def pending_and_dead(it: Scene) -> None:
    it.store.zadd(key("dead"), {it.ids[3]: 1700000000000})


@damage("twice")
def twice_in_pending(it: Scene) -> None:
    it.store.rpush(key("pending"), it.ids[0])


@damage("twice")
def held_by_a_gone_worker_and_pending(it: Scene) -> None:
    it.store.zadd(key(f"active:{GONE}"), {it.ids[0]: 1})


@damage("no_owner")
def active_without_owner(it: Scene) -> None:
    it.store.zadd(key(f"active:{GONE}"), {it.message("held"): 1})


@damage("lease_ended")
def lease_ended_with_active_left(it: Scene) -> None:
    it.store.zadd(key("leases"), {GONE: 1})
    it.store.zadd(key(f"active:{GONE}"), {it.message("held"): 1})


@damage("endless_lease")
def lease_without_end(it: Scene) -> None:
    it.store.zadd(key("leases"), {"web8:00000000:77:2:3": "+inf"})


@damage("bare")
def id_without_message_in_pending(it: Scene) -> None:
    it.lose_body(it.ids[5])


@damage("bare")
def dead_letter_without_message(it: Scene) -> None:
    it.store.zadd(key("dead"), {"bare": 1700000000000})


@damage("bare")
def scheduled_without_message(it: Scene) -> None:
    it.store.zadd(key("scheduled"), {"bare": 9e12})


@damage("cancelled")
def mark_of_a_cancelled_one_left_over(it: Scene) -> None:
    it.store.hset(key("m"), "gone", "0 cancelled")


@damage("unreadable")
def garbage_message(it: Scene) -> None:
    it.spoil(it.ids[2], b"\xff\x00 garbage")


@damage("unreadable")
def truncated_body(it: Scene) -> None:
    it.spoil(it.ids[2], b'1 1764000000000 0 {"task":"t"}\n[["soun')


@damage("stray_state")
def history_without_message(it: Scene) -> None:
    it.store.hset(key("state"), "gone", State(attempts=3).encode())


@damage("bad_state")
def garbage_history(it: Scene) -> None:
    it.store.hset(key("state"), it.ids[1], "{\xff")


@damage("bad_counter")
def counter_is_no_number(it: Scene) -> None:
    it.store.hset(key("stats"), "processed", "many")


@damage("counters_off")
def more_failed_than_processed(it: Scene) -> None:
    it.store.hset(key("stats"), mapping={"processed": 3, "failed": 5})


@damage("bad_takeovers")
def count_of_takeovers_is_no_number(it: Scene) -> None:
    it.store.hset(key("takeovers"), it.ids[0], "x")
    it.store.expire(key("takeovers"), 1000)


@damage("overdue")
def scheduled_long_overdue(it: Scene) -> None:
    it.store.zadd(key("scheduled"), {it.message("late"): 1764000000000})


@damage("overdue")
def due_at_no_time(it: Scene) -> None:
    it.store.zadd(key("scheduled"), {it.message("never"): "+inf"})


@damage("no_expiry")
def takeovers_never_expire(it: Scene) -> None:
    it.store.hset(key("takeovers"), "gone", 2)


@damage("no_expiry")
def result_never_expires(it: Scene) -> None:
    it.store.set(key("r:old"), '{"status":"SUCCESSFUL"}')


@damage("no_expiry")
def report_never_expires(it: Scene) -> None:
    it.store.set(f"prefork:worker:{GONE}", "{}")


@damage("wrong_type")
def pending_is_a_string(it: Scene) -> None:
    it.store.delete(key("pending"))
    it.store.set(key("pending"), "x")


@damage("wrong_type")
def leases_are_a_hash(it: Scene) -> None:
    it.store.hset(key("leases"), "x", "y")


@damage("wrong_type")
def active_is_a_list(it: Scene) -> None:
    it.store.rpush(key(f"active:{GONE}"), it.message("held"))


@damage("wrong_type")
def queues_are_a_string(it: Scene) -> None:
    it.store.set("prefork:queues", "default")


@damage("unlisted_queue")
def queue_not_in_the_set(it: Scene) -> None:
    it.store.delete("prefork:queues")


@damage("odd_pause")
def paused_by_garbage(it: Scene) -> None:
    it.store.set(key("paused"), "yes please")


@damage("wrong_type")
def paused_by_a_list(it: Scene) -> None:
    it.store.rpush(key("paused"), "x")


@damage("unknown_key")
def unknown_key(it: Scene) -> None:
    it.store.set("prefork:cache", "of somebody")


@damage("unknown_key")
def unknown_key_of_the_queue(it: Scene) -> None:
    it.store.set(key("unknown"), "x")


def codes(client: Client) -> dict[str, str]:
    """What is wrong with the data."""
    return {finding.code: finding.what for finding in examine(client) if finding.code}


def repair(client: Client) -> list[str]:
    """What `--repair` does, without the start of a process."""
    said = []
    for _ in range(10):
        mends = [finding.mend for finding in examine(client) if finding.mend]
        if not mends:
            break
        said += [mend() for mend in mends]
    return said


@pytest.fixture
def client(project: Project) -> Iterator[Client]:
    client = Client(project.server.url, "prefork")
    yield client
    client.close()


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_repaired(
    project: Project, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "GRACE_S", 0.01)
    scene = Scene(project)
    assert codes(client) == {}
    code, do = DAMAGES[name]
    do(scene)
    assert code in codes(client)
    said = repair(client)
    if code == "unknown_key":
        assert set(codes(client)) == {code}, "left alone, and said"
    else:
        assert said
        assert all(said)
        assert codes(client) == {}
    waiting = scene.store.llen(key("pending")) + scene.store.zcard(key("ranked"))
    assert waiting == len(scene.expected)
    assert scene.store.hlen(key("m")) == waiting + scene.store.zcard(key("dead"))


def test_a_worker_that_renews_its_lease_when_an_outage_is_over_is_not_taken_over(
    project: Project, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repair may come first, when the leases of living workers have ended meanwhile."""
    scene = Scene(project)
    lease_ended_with_active_left(scene)
    monkeypatch.setattr(doctor.time, "sleep", lambda s: scene.store.zadd(key("leases"), {GONE: 9e12}))
    (mend,) = [finding.mend for finding in examine(client) if finding.code == "lease_ended"]
    assert mend
    assert mend() == "queue default: taken over from 0 workers; 0 messages put back; 1 were back"
    assert scene.store.zrange(key(f"active:{GONE}"), 0, -1) == [b"held"]


def test_a_repair_makes_no_dead_letters(project: Project, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many deaths of its worker make a task one is known to the workers."""
    monkeypatch.setattr(doctor, "GRACE_S", 0.01)
    scene = Scene(project)
    lease_ended_with_active_left(scene)
    scene.store.hset(key("takeovers"), "held", 50)
    assert any("taken over from 1 workers; 1 messages put back" in said for said in repair(client))
    assert scene.store.zcard(key("dead")) == 0
    assert scene.store.hget(key("takeovers"), "held") == b"51"


def test_keys_of_another_program_that_look_like_reports_are_left_alone(project: Project, client: Client) -> None:
    store = project.server.client
    store.set("prefork:worker:config", "of an app")
    store.hset("prefork:worker:stats", "n", 1)
    store.rpush("prefork:worker:{mail}:pending", "of another deployment, whose prefix is prefork:worker")
    assert set(codes(client)) == {"unknown_key"}
    assert repair(client) == []
    assert store.ttl("prefork:worker:config") == -1
    assert store.type("prefork:worker:stats") == b"hash"


def test_all_damages_at_once_are_repaired_and_a_worker_runs_all_that_remained(project: Project) -> None:
    scene, url = Scene(project), project.server.url
    pending_gone(scene)
    for _, do in sorted(DAMAGES.values(), key=lambda item: item[0] == "wrong_type"):
        with contextlib.suppress(redis.ResponseError):  # another one has spoilt the same key
            do(scene)
    scene.store.expire(key("takeovers"), 1000)
    assert "nobody is here to be asked" in prefork("doctor", "--repair", "--broker", url, code=64)
    told = as_json("doctor", "--repair", "--yes", "--broker", url)
    found = {it["code"] for it in told if it["repaired"]}
    assert len(found) >= 13
    assert found <= {code for code, _ in DAMAGES.values()}
    again = [it for it in as_json("doctor", "--broker", url) if it["code"]]
    assert [it["code"] for it in again] == ["unknown_key"]
    prefork("resume", "default", "--broker", url)
    later: Any = scene.store.zrange(key("scheduled"), 0, -1)  # what had this place left only
    for id in later:
        scene.store.zadd(key("scheduled"), {id: 1})
    worker = project.worker()
    until(lambda: set(project.lines("steps")) >= scene.expected, what="all ran")
    until(lambda: not scene.store.llen(key("pending")))
    assert sorted(project.lines("steps")) == sorted(scene.expected), "each once"
    assert worker.stop() == 0


def test_each_repair_is_said_in_a_line(project: Project) -> None:
    scene = Scene(project)
    scene.message("lost")
    out = prefork("doctor", "--repair", "--yes", "--broker", project.server.url)
    assert "ERROR    queue default: 1 messages are in no place, so that nobody runs them: lost" in out
    assert "repaired queue default: 1 put back into the queue (nowhere): lost" in out
    assert "11 messages, each in exactly one place" in out


def test_a_crash_loop_of_children_is_shown_by_doctor_and_workers_until_it_ends(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            if not (here / "mended").exists():
                raise ConnectionError("the vault is shut")
    """)
    worker, url = project.worker(wait=False), project.server.url
    worker.wait_for("children died in a row")

    def told() -> list[dict[str, Any]]:
        return [it for it in as_json("workers", "--broker", url) if it["answered"]]

    in_words = re.compile(r"children crash at start: \d+ times, next try in \d+\.\d s, last")
    until(lambda: in_words.search(prefork("workers", "--broker", url)))
    (finding,) = until(
        lambda: [it for it in as_json("doctor", "--broker", url, code=None) if it["code"] == "crash_loop"]
    )
    assert in_words.search(finding["what"])
    assert finding["level"] == "error"
    assert finding["what"].endswith("last: ConnectionError: the vault is shut")
    assert f"pid {worker.pid} on " in finding["what"]
    assert until(told)[0]["crash_loop"]["times"] > 5
    (project.folder / "mended").touch()
    until(lambda: [it for it in told() if it["crash_loop"] is None])
    assert worker.stop() == 0


def test_what_has_gone_on_meanwhile_is_not_repaired(project: Project, client: Client) -> None:
    scene = Scene(project)
    scene.message("lost")
    (finding,) = (finding for finding in examine(client) if finding.code)
    scene.store.rpush(key("pending"), "lost")
    assert finding.mend
    assert finding.mend().endswith("1 had gone on by themselves")
    assert scene.store.llen(key("pending")) == 11


def test_no_false_alarm_while_two_workers_and_producers_are_at_full_load(project: Project, client: Client) -> None:
    project.add("""
        import random
        @app.task(result_ttl=5, retry_delay=0, max_retries=2)
        def busy(n):
            if n % 5 == 0:
                raise ValueError("now and then")
            if n % 7 == 0:
                app.enqueue_many([busy.using(priority=n % 3).s(1)])
    """)
    tasks, stop = project.tasks, threading.Event()
    workers = [project.worker(), project.worker()]

    def produce() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            tasks.app.enqueue_many(tasks.busy.using(priority=n % 3 - 1).s(i) for i in range(100))
            tasks.app.enqueue_many(tasks.busy.using(run_after=0.05).s(i) for i in range(20))
            result = tasks.busy.using(run_after=5).enqueue(1)
            result.cancel()
            if project.server.client.hlen(key("m")) > 2000:
                time.sleep(0.05)

    producers = [threading.Thread(target=produce) for _ in range(2)]
    for producer in producers:
        producer.start()
    try:
        until(lambda: int(project.server.client.hget(key("stats"), "processed") or 0) > 500)
        before = int(project.server.client.hget(key("stats"), "processed") or 0)
        looks = 0
        while looks < 10 or int(project.server.client.hget(key("stats"), "processed") or 0) <= before + 200:
            assert codes(client) == {}
            looks += 1
    finally:
        stop.set()
        for producer in producers:
            producer.join()
    assert [worker.stop() for worker in workers] == [0, 0]
