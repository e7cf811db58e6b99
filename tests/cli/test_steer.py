"""`prefork`: what operators change."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest

from prefork.broker import survey
from prefork.cli.confirm import counted
from prefork.cli.exits import EXIT_APP, EXIT_USAGE
from tests.cli.command import as_json, prefork
from tests.conftest import Project, until
from tests.process.scene import active, key, pending, place

FAIL = "@app.task(max_retries=0)\ndef fail(why): raise ValueError(why)"


def conf_of(project: Project) -> str:
    path = project.folder / "myapp.conf"
    path.write_text(f"[prefork]\napp = {project.module_name}:app\n")
    return str(path)


def dead_letters(project: Project, n: int) -> list[str]:
    worker = project.worker()
    results = project.tasks.app.enqueue_many(project.tasks.fail.s(f"{i}") for i in range(n))
    until(lambda: project.server.client.zcard(key("dead")) == n)
    assert worker.stop() == 0
    return [result.id for result in results]


# -- enqueue ----------------------------------------------------------------------------------------------------------


def test_enqueue_by_the_app_checks_and_takes_the_tasks_own_queue(project: Project) -> None:
    project.add("@app.task(queue_name='mail', priority=7)\ndef send(to: str, copy: bool = False): ...")
    conf, name = conf_of(project), f"{project.module_name}.send"
    id = prefork("enqueue", name, "-c", conf, "--args", '["a@b"]', "--kwargs", '{"copy": true}').strip()
    known = as_json("show", id, "-c", conf)
    assert (known["queue"], known["priority"], known["args"], known["kwargs"]) == ("mail", 7, ["a@b"], {"copy": True})
    later = as_json(
        "enqueue", name, "-c", conf, "--args", '["x"]', "--queue", "slow", "--priority", "-1", "--delay", "60"
    )
    assert later["queue"] == "slow"
    assert as_json("show", later["id"], "-c", conf)["place"] == "scheduled"


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("add", "--args", "[1]"), "there is no task 'add'; did you mean tasks.add?", 1),
        (("tasks.add", "--args", "[]"), "missing a required argument: 'a'", EXIT_USAGE),
        (("tasks.add", "--args", "[1"), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", "7"), "--args must be a JSON list, not '7'", EXIT_USAGE),
        (("tasks.add", "--kwargs", "[]"), "--kwargs must be a JSON object, not '[]'", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--priority", "1000"), "a priority is an integer from -100 to 100", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--queue", "a b"), "'a b'", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--queue", ""), "queue_name='': a queue's name has 1 to 100", EXIT_USAGE),
        (("tasks.add", "--args", "[NaN]"), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", "[1e999]"), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", "[" * 10_000), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", f"[{10**30}]"), "argument a is an int (Integer exceeds 64-bit range)", EXIT_USAGE),
        (("tasks.add", "--args", f"[{'9' * 5000}]"), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", '["\\ud800"]'), "--args is not JSON", EXIT_USAGE),
        (("tasks.add", "--args", "[1,2,3]"), "too many positional arguments", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--kwargs", '{"c":1}'), "unexpected keyword argument 'c'", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--delay", "-5"), "--delay -5: give seconds", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--delay", "nan"), "--delay nan: give seconds", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--delay", "1e300"), "--delay 1e+300: give seconds", EXIT_USAGE),
        (("tasks.add", "--args", "[1]", "--wait", "inf"), "--wait inf: give seconds", EXIT_USAGE),
    ],
)
def test_enqueue_says_what_is_wrong(project: Project, words: tuple[str, ...], said: str, code: int) -> None:
    name, *rest = words
    own = name.replace("tasks.", project.module_name + ".")
    out = prefork("enqueue", own, *rest, "-c", conf_of(project), code=code)
    assert said.replace("tasks.", project.module_name + ".") in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the following arguments are required: NAME"),
        (("add", "--speed", "9"), "unrecognized arguments: --speed 9"),
        (("add", "--priority", "high"), "argument --priority: invalid int value: 'high'"),
        (("add", "--delay", "soon"), "argument --delay: invalid float value: 'soon'"),
    ],
)
def test_flags_of_enqueue_that_cannot_be(words: tuple[str, ...], said: str) -> None:
    out = prefork("enqueue", *words, "--broker", "redis://127.0.0.1:1/0", code=2)
    assert said in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("", (), "name='': "),
        ("a b", (), "name='a b': "),
        ("add", ("--queue", "{a}"), "queue_name='{a}': a queue's name has 1 to 100 characters"),
        ("add", ("--priority", "-101"), "priority=-101: a priority is an integer from -100 to 100"),
        ("add", ("--args", f"[{10**30}]"), "argument #1 is an int (Integer exceeds 64-bit range)"),
    ],
)
def test_enqueue_by_the_broker_alone_says_what_is_wrong(
    project: Project, name: str, options: tuple[str, ...], said: str
) -> None:
    out = prefork("enqueue", name, *options, "--broker", project.server.url, code=EXIT_USAGE)
    assert said in out
    assert len(out.splitlines()) == 1
    assert project.server.client.keys("*") == []


def test_enqueue_by_the_broker_alone(project: Project) -> None:
    worker = project.worker()
    name = f"{project.module_name}.add"
    url = project.server.url
    assert prefork("enqueue", name, "--args", "[4]", "--broker", url, "--wait", "20") == "6\n"
    assert as_json("enqueue", name, "--args", "[4]", "--broker", url, "--wait", "20")["value"] == 6
    assert worker.stop() == 0


def test_enqueue_by_an_app_that_cannot_be_imported(project: Project) -> None:
    conf = conf_of(project)
    (project.folder / f"{project.module_name}.py").write_text("import nonsense_nowhere")
    assert "nonsense_nowhere" in prefork("enqueue", "x", "-c", conf, code=EXIT_APP)


# -- cancel, retry, delete --------------------------------------------------------------------------------------------


def test_cancel_what_waits_what_is_scheduled_and_what_runs(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    running = project.tasks.nap.enqueue("running", 60)
    until(lambda: project.lines("started"))
    waiting, later = project.tasks.add.enqueue(1), project.tasks.add.using(run_after=60).enqueue(1)
    ids = [waiting.id, later.id, running.id]
    said = as_json("cancel", *ids, "--broker", project.server.url)
    assert [(it["id"], it["outcome"]) for it in said] == [(id, "cancelled") for id in ids]
    assert [survey.whose(it["worker"])[1] for it in said if "worker" in it] == [worker.pid]  # who was asked
    known = as_json("show", waiting.id, "--broker", project.server.url)
    assert (known["status"], known["task"]) == ("FAILED", f"{project.module_name}.add")
    assert known["enqueued_at"]
    for result in (running, waiting, later):
        result.refresh()
        assert result.errors[-1].exception_class_path == "prefork.Cancelled"
    assert active(project) == 0
    assert "finished (FAILED)" not in prefork("cancel", running.id, "--broker", project.server.url)
    assert worker.stop() == 0


def test_cancel_what_has_finished_or_is_not_known(project: Project) -> None:
    worker = project.worker()
    done = project.tasks.add.enqueue(1)
    done.wait(timeout=60)
    out = prefork("cancel", done.id, "0123", "--broker", project.server.url, code=1)
    assert out.splitlines() == [f"{done.id}  finished (SUCCESSFUL)", "0123  unknown"]
    assert worker.stop() == 0


def test_retry_gives_a_dead_letter_all_its_chances_again_and_keeps_its_history(project: Project) -> None:
    project.add("""
        @app.task(max_retries=1, retry_delay=0)
        def fail():
            note("runs")
            if len(project_runs()) < 3:
                raise ValueError("not yet")
            return "at last"

        def project_runs():
            return (here / "runs").read_text().splitlines()
    """)
    worker = project.worker()
    result = project.tasks.fail.enqueue()
    until(lambda: place(project, result) == "dead")
    assert prefork("retry", result.id, "--broker", project.server.url) == f"{result.id}  pending\n"
    assert result.wait(timeout=60) == "at last"
    assert (result.attempts, len(result.errors)) == (3, 2)
    out = prefork("retry", result.id, "0123", "--broker", project.server.url, code=1)
    assert out.splitlines() == [f"{result.id}  not a dead letter", "0123  unknown"]
    assert worker.stop() == 0


def test_retry_all_dead_letters_of_a_queue(project: Project) -> None:
    project.add(FAIL)
    ids = dead_letters(project, 250)
    url = project.server.url
    assert prefork("retry", "--dead", "default", "--yes", "--broker", url) == "250 revived\n"
    assert sorted(pending(project)) == sorted(ids)
    assert as_json("retry", "--dead", "default", "--yes", "--broker", url) == {"revived": 0}
    assert project.server.client.keys(key("r:*")) == []
    for words in ((), (ids[0], "--dead", "default")):
        assert "give the ids of dead letters" in prefork("retry", *words, "--broker", url, code=EXIT_USAGE)


def test_delete_leaves_nothing_of_what_does_not_run(project: Project) -> None:
    project.add(FAIL)
    (dead,) = dead_letters(project, 1)
    worker = project.worker("concurrency = 1")
    running = project.tasks.nap.enqueue("running", 60)
    until(lambda: project.lines("started"))
    waiting, high = project.tasks.add.enqueue(1), project.tasks.add.using(priority=3).enqueue(1)
    later = project.tasks.add.using(run_after=60).enqueue(1)
    gone = [dead, waiting.id, high.id, later.id]
    url = project.server.url
    assert as_json("delete", *gone, "--yes", "--broker", url) == [{"id": id, "outcome": "deleted"} for id in gone]
    out = prefork("delete", running.id, dead, "--yes", "--broker", url, code=1)
    assert out.splitlines() == [f"{running.id}  running; cancel it first", f"{dead}  unknown"]
    client = project.server.client
    assert client.hkeys(key("m")) == [running.id.encode()]
    assert client.hlen(key("state")) == 0
    assert client.keys(key("r:*")) == []
    assert pending(project) == []
    assert worker.stop() == 0


# -- purge, pause, resume ---------------------------------------------------------------------------------------------


def test_purge_deletes_what_waits_or_what_it_is_told(project: Project) -> None:
    project.add(FAIL)
    dead_letters(project, 3)
    add, url = project.tasks.add, project.server.url
    project.tasks.app.enqueue_many(add.s(n) for n in range(1234))
    add.using(priority=3).enqueue(1)
    add.using(run_after=60).enqueue(1)
    assert prefork("purge", "default", "--state", "scheduled", "--yes", "--broker", url) == "1 deleted\n"
    assert prefork("purge", "default", "--yes", "--broker", url) == "1,235 deleted\n"
    assert as_json("queues", "--broker", url)[0]["dead"] == 3
    assert as_json("purge", "default", "--state", "dead", "--yes", "--broker", url) == {"deleted": 3}
    client = project.server.client
    assert (client.hlen(key("m")), client.hlen(key("state")), client.keys(key("r:*"))) == (0, 0, [])


def test_pause_and_resume_are_obeyed_by_all_workers_at_once(project: Project) -> None:
    workers = [project.worker(), project.worker()]
    url = project.server.url
    project.tasks.add.enqueue(1).wait(timeout=60)
    assert "is paused" in prefork("pause", "default", "--broker", url)
    assert "was paused already" in prefork("pause", "default", "--broker", url)
    results = [project.tasks.add.enqueue(n) for n in range(5)]
    time.sleep(0.3)
    assert [place(project, result) for result in results] == ["pending"] * 5
    assert as_json("queues", "--broker", url)[0]["paused"]
    assert as_json("resume", "default", "--broker", url) == {"queue": "default", "paused": False, "changed": True}
    assert [result.wait(timeout=60) for result in results] == [2, 3, 4, 5, 6]
    assert [worker.stop() for worker in workers] == [0, 0]


# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("purge", "default"), ("delete", "0123"), ("retry", "--dead", "default")])
def test_where_nobody_can_be_asked_nothing_is_done(project: Project, words: tuple[str, ...]) -> None:
    project.add(FAIL)
    dead_letters(project, 1)
    project.tasks.add.enqueue(1)
    out = prefork(*words, "--broker", project.server.url, code=EXIT_USAGE)
    assert "nobody is here to be asked, so say --yes" in out
    assert len(pending(project)) == 1


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("yes", 0), ("n", 1), ("", 1), ("perhaps", 1)])
def test_on_a_terminal_it_asks(project: Project, answer: str, left: int) -> None:
    project.tasks.add.enqueue(1)
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "prefork.cli.operator", "purge", "default", "--broker", project.server.url]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    said = b""
    while b"[y/N]" not in said:
        said += os.read(terminal, 1024)
    assert b"This will delete 1 task (pending and scheduled) of queue default for good." in said
    os.write(terminal, answer.encode() + b"\n")
    assert process.wait(60) == (0 if left == 0 else EXIT_USAGE)
    os.close(terminal)
    assert len(pending(project)) == left


@pytest.mark.parametrize(("count", "said"), [(0, "0 tasks"), (1, "1 task"), (2, "2 tasks"), (1000, "1,000 tasks")])
def test_one_is_said_as_one(count: int, said: str) -> None:
    assert counted(count, "task") == said
