"""`prefork`: what operators see of queues, of a task, and of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefork.broker import listing
from prefork.cli.exits import EXIT_APP, EXIT_BROKER, EXIT_CONFIG, EXIT_USAGE
from tests.cli.command import as_json, prefork
from tests.conftest import Project, Server, until

FIELDS = {"name", "pending", "scheduled", "active", "dead", "paused", "processed", "failed", "latency_s"}


def test_queues_as_json_have_the_fields_that_are_documented(project: Project) -> None:
    project.tasks.add.enqueue(1)
    project.tasks.add.using(run_after=60).enqueue(1)
    project.tasks.add.using(queue_name="mail").enqueue(1)
    project.server.client.set("prefork:{mail}:paused", "1")
    queues = {queue["name"]: queue for queue in as_json("queues", "--broker", project.server.url)}
    assert set(queues) == {"default", "mail"}
    assert all(set(queue) == FIELDS for queue in queues.values())
    assert (queues["default"]["pending"], queues["default"]["scheduled"]) == (1, 1)
    assert (queues["default"]["paused"], queues["mail"]["paused"]) == (False, True)


def test_queues_count_what_has_run_and_what_has_failed(project: Project) -> None:
    project.add("@app.task(max_retries=0)\ndef fail(): raise ValueError('no')")
    worker = project.worker()
    project.tasks.add.enqueue(1).wait(timeout=60)
    until(lambda: (project.tasks.fail.enqueue(), True)[1])
    until(lambda: as_json("queues", "--broker", project.server.url)[0]["dead"] == 1)
    (queue,) = as_json("queues", "--broker", project.server.url)
    assert (queue["processed"], queue["failed"], queue["pending"], queue["latency_s"]) == (2, 1, 0, 0)
    assert worker.stop() == 0


def test_latency_is_the_time_that_the_next_in_line_has_been_ready(project: Project) -> None:
    project.tasks.add.enqueue(1)
    first = as_json("queues", "--broker", project.server.url)[0]["latency_s"]
    later = until(lambda: as_json("queues", "--broker", project.server.url)[0]["latency_s"])
    assert 0 <= first < later < 30


def test_a_cancelled_task_is_not_counted_as_pending(project: Project) -> None:
    assert project.tasks.add.enqueue(1).cancel()
    assert as_json("queues", "--broker", project.server.url)[0]["pending"] == 0


def test_the_table_has_a_line_for_each_queue(project: Project) -> None:
    project.tasks.add.enqueue(1)
    head, row = prefork("queues", "--broker", project.server.url).splitlines()
    assert head.split() == [
        "name",
        "pending",
        "scheduled",
        "active",
        "dead",
        "paused",
        "processed",
        "failed",
        "latency_s",
    ]
    assert row.split()[:2] == ["default", "1"]


def test_no_queue_yet(server: Server) -> None:
    assert "no queue was ever used" in prefork("queues", "--broker", server.url)
    assert as_json("queues", "--broker", server.url) == []


def test_show_a_pending_task(project: Project) -> None:
    result = project.tasks.add.using(priority=5, max_retries=3).enqueue(1, b=7)
    known = as_json("show", result.id, "--broker", project.server.url)
    assert known["task"].endswith(".add")
    assert (known["queue"], known["place"], known["args"], known["kwargs"]) == ("default", "pending", [1], {"b": 7})
    assert (known["priority"], known["options"]) == (5, {"max_retries": 3})


def test_show_a_dead_letter_with_its_evidence(project: Project) -> None:
    project.add("@app.task(max_retries=1, retry_delay=0)\ndef fail(): raise ValueError('evidence')")
    worker = project.worker()
    result = project.tasks.fail.enqueue()
    until(lambda: (result.refresh(), result.is_finished)[1])
    known = as_json("show", result.id, "--broker", project.server.url)
    assert (known["place"], known["attempts"], known["retried"]) == ("dead", 2, 1)
    assert [error["class"] for error in known["errors"]] == ["builtins.ValueError"] * 2
    text = prefork("show", result.id, "--broker", project.server.url)
    assert "ValueError: evidence" in text
    assert "in fail" in text
    assert worker.stop() == 0


def test_show_neutralises_what_a_terminal_would_obey(project: Project) -> None:
    result = project.tasks.nap.enqueue("\x1b[31m red", 0)
    project.server.client.hset(
        "prefork:{default}:state", result.id, json.dumps({"errors": [{"message": "\x1b]0;title\x07"}]})
    )
    assert "\x1b" not in prefork("show", result.id, "--broker", project.server.url)


def test_show_a_message_that_nobody_can_read(project: Project) -> None:
    project.tasks.add.enqueue(1)
    project.server.client.hset("prefork:{default}:m", "strange", b"\xff garbage")
    known = as_json("show", "strange", "--broker", project.server.url)
    assert "not in prefork's format" in known["unreadable"]


def test_show_an_unknown_task(server: Server) -> None:
    assert "nothing is known of task 0123" in prefork("show", "0123", "--broker", server.url, code=1)


def test_doctor_finds_what_is_wrong(project: Project) -> None:
    project.tasks.add.enqueue(1)
    client = project.server.client
    client.hset("prefork:{default}:m", "lost", b"1 1764000000000 0 {}\n[[],{}]")
    client.zadd("prefork:{default}:leases", {"other:host:1:2:3": 1})
    findings = as_json("doctor", "--broker", project.server.url, code=1)
    assert all(set(finding) == {"level", "what", "remedy", "code", "queue", "repaired"} for finding in findings)
    said = " ".join(finding["what"] for finding in findings)
    for part in ("append-only file is off", "1 messages are in no place", "leases of 1 workers have ended"):
        assert part in said
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok")


def test_doctor_warns_of_a_policy_that_throws_tasks_away(own_project: Project) -> None:
    client = own_project.server.client
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert "CONFIG SET maxmemory-policy noeviction" in prefork("doctor", "--broker", own_project.server.url, code=1)


def test_doctor_is_content_with_a_working_deployment(own_project: Project) -> None:
    worker = own_project.worker()
    own_project.tasks.add.enqueue(1).wait(timeout=60)
    text = prefork("doctor", "--broker", own_project.server.url)
    assert "ok       queue default: 0 pending, 0 scheduled, 0 active, 0 dead, 1 workers" in text
    assert worker.stop() == 0


def test_the_broker_of_the_configuration_or_of_its_app_is_used(project: Project) -> None:
    project.tasks.add.enqueue(1)
    conf = project.folder / "x.conf"
    conf.write_text(f"[prefork]\nbroker = {project.server.url}\n")
    assert len(as_json("queues", "-c", str(conf))) == 1
    conf.write_text(f"[prefork]\napp = {project.module_name}:app\n")
    assert len(as_json("queues", "-c", str(conf))) == 1


def test_the_prefix_of_the_app_holds_where_the_configuration_names_only_its_broker(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "shop_of_its_own.py").write_text(
        "from prefork import Prefork\napp = Prefork('shop', prefix='shop')\n@app.task(name='t')\ndef t(): ...\n"
    )
    conf = tmp_path / "shop.conf"
    conf.write_text(f"[prefork]\napp = shop_of_its_own:app\nbroker = {project.server.url}\n")
    prefork("enqueue", "t", "-c", str(conf))
    assert [it["name"] for it in as_json("queues", "-c", str(conf))] == ["default"]
    assert as_json("queues", "-c", str(conf), "--prefix", "other") == []
    (tmp_path / "shop_of_its_own.py").write_text("import nowhere\n")
    said = prefork("queues", "-c", str(conf), code=EXIT_APP)
    assert "nowhere" in said
    assert "(with --broker and --prefix the app is not needed)" in said
    flags = ("-c", str(conf), "--prefix", "shop")
    assert [it["name"] for it in as_json("queues", *flags)] == ["default"]


def test_no_broker_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    assert "--broker URL" in prefork("queues", code=EXIT_USAGE)


def test_a_broker_that_is_not_there() -> None:
    said = prefork("queues", "--broker", "redis://:secret@127.0.0.1:1", code=EXIT_BROKER)
    assert said.startswith("prefork: the broker redis://127.0.0.1:1 refuses the connection")
    assert "secret" not in said


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in prefork("queues", "-c", str(tmp_path / "none.conf"), code=EXIT_CONFIG)


# -- workers, list ----------------------------------------------------------------------------------------------------

WORKER_FIELDS = {
    "worker", "host", "pid", "version", "app", "queues", "started_at", "uptime_s", "phase", "paused", "broker", "ready",
    "concurrency", "rss_bytes", "children", "crash_loop", "answered", "holds", "lease_s",
}  # fmt: skip
CHILD_FIELDS = {
    "number", "pid", "state", "rss_bytes", "task", "id", "queue", "attempt", "running_s", "waiting",
}  # fmt: skip


def test_workers_tell_what_they_do(project: Project) -> None:
    worker = project.worker("queues = default, other", "-n", "2")
    nap = project.tasks.nap.enqueue("nap", 60)
    until(lambda: project.lines("started"))
    (told,) = until(lambda: [it for it in as_json("workers", "--broker", project.server.url) if it["answered"]])
    assert set(told) == WORKER_FIELDS
    assert all(set(child) == CHILD_FIELDS for child in told["children"])
    assert (told["pid"], told["phase"], told["answered"], told["holds"]) == (worker.pid, "running", True, 1)
    assert told["queues"] == ["default", "other"]
    (busy,) = [child for child in told["children"] if child["task"]]
    assert (busy["id"], busy["queue"], busy["attempt"]) == (nap.id, "default", 1)
    assert busy["task"].endswith(".nap")
    assert 0 < busy["running_s"] < 60
    assert busy["pid"] in worker.children()
    table = until(lambda: [it for it in [prefork("workers", "--broker", project.server.url)] if nap.id in it])[0]
    assert str(worker.pid) in table
    assert len(table.splitlines()) == 4


def test_a_worker_that_drains_still_answers(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 60s")
    project.tasks.hold.enqueue("held")
    until(lambda: project.lines("started"))
    worker.send(15)
    until(lambda: "stopping" in worker.log)
    (told,) = until(lambda: [it for it in as_json("workers", "--broker", project.server.url) if it["answered"]])
    assert told["phase"] == "draining"
    project.let_go()
    assert worker.wait() == 0


def test_a_worker_that_stands_still_is_shown_as_such(project: Project) -> None:
    worker = project.worker()
    project.tasks.nap.enqueue("nap", 60)
    until(lambda: project.lines("started"))
    worker.send(19)  # STOP
    (told,) = as_json("workers", "--broker", project.server.url)
    assert (told["answered"], told["pid"], told["holds"]) == (False, worker.pid, 1)
    assert "NO ANSWER" in prefork("workers", "--broker", project.server.url)
    worker.send(18)
    until(lambda: as_json("workers", "--broker", project.server.url)[0]["answered"])


def test_no_worker_at_all(project: Project) -> None:
    project.tasks.add.enqueue(1)
    assert as_json("workers", "--broker", project.server.url) == []
    assert "no worker" in prefork("workers", "--broker", project.server.url)


def test_list_shows_each_place_in_its_order_page_by_page(project: Project) -> None:
    add = project.tasks.add
    first, second = add.enqueue(1), add.enqueue(2)
    high, low = add.using(priority=9).enqueue(3), add.using(priority=-9).enqueue(4)
    later, soon = add.using(run_after=9000).enqueue(5), add.using(run_after=60).enqueue(6)
    url = project.server.url
    ids = [row["id"] for row in as_json("list", "default", "--broker", url)]
    assert ids == [high.id, first.id, second.id, low.id]
    page = as_json("list", "default", "--broker", url, "--offset", "1", "--limit", "2")
    assert [row["id"] for row in page] == ids[1:3]
    for offset in range(5):
        for limit in range(1, 5):
            rows = listing.page(project.tasks.app.client, "default", "pending", offset, limit)
            assert [row["id"] for row in rows] == ids[offset : offset + limit]
    rows = as_json("list", "default", "--state", "scheduled", "--broker", url)
    assert [row["id"] for row in rows] == [soon.id, later.id]
    assert {"id", "queue", "place", "due_at", "task", "args", "kwargs", "priority", "enqueued_at", "options"} == set(
        rows[0]
    )
    assert "in 2 h" in prefork("list", "default", "--state", "scheduled", "--broker", url)
    assert prefork("list", "default", "--state", "dead", "--broker", url) == "nothing is dead in queue default\n"


def test_list_names_who_runs_and_why_it_died(project: Project) -> None:
    project.add("@app.task(max_retries=0)\ndef fail(): raise ValueError('evidence')")
    worker = project.worker()
    nap, fail = project.tasks.nap.enqueue("nap", 60), project.tasks.fail.enqueue()
    until(lambda: project.lines("started"))
    until(lambda: (fail.refresh(), fail.is_finished)[1])
    (row,) = as_json("list", "default", "--state", "active", "--broker", project.server.url)
    assert (row["id"], row["worker"].split(":")[-3]) == (nap.id, str(worker.pid))
    (row,) = as_json("list", "default", "--state", "dead", "--broker", project.server.url)
    assert row["errors"][-1]["message"] == "evidence"
    assert "ValueError: evidence" in prefork("list", "default", "--state", "dead", "--broker", project.server.url)


def test_a_queue_that_is_not_there_is_named_with_one_that_is(project: Project) -> None:
    project.tasks.add.enqueue(1)
    said = prefork("list", "defualt", "--broker", project.server.url, code=1)
    assert said == "prefork: there is no queue 'defualt' under the prefix 'prefork'; did you mean 'default'?\n"


def test_the_flags_may_stand_before_the_command(project: Project) -> None:
    project.tasks.add.enqueue(1)
    assert "default" in prefork("--broker", project.server.url, "queues")
    assert as_json("--broker", project.server.url, "--json", "queues")


def test_show_prints_the_stack_of_what_was_killed(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.nap.using(timeout=3, max_retries=0).enqueue("nap", 60)
    until(lambda: (result.refresh(), result.is_finished)[1])
    assert "what it was doing:" in prefork("show", result.id, "--broker", project.server.url)
    assert "in nap" in as_json("show", result.id, "--broker", project.server.url)["errors"][-1]["stack"]
    assert worker.stop() == 0
