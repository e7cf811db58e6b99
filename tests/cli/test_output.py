"""How `prefork` speaks: to people at terminals of any width, to pipes, and to programs as documented."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import as_json, prefork
from tests.conftest import PATIENCE_S, Project, until
from tests.process.scene import key

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "prefork.cli.operator"]


def on_terminal(columns: int, *words: str) -> list[str]:
    """The lines that it prints on a terminal of that width."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([*COMMAND, *words], stdin=inside, stdout=inside, stderr=inside, env=env)
    os.close(inside)
    said = b""
    while True:
        try:
            some = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that nobody is left
            break
        if not some:
            break
        said += some
    os.close(terminal)
    assert process.wait(60) == 0, said
    return said.decode().splitlines()


def bury(project: Project, n: int) -> None:
    """Dead letters with long arguments and errors."""
    for number in range(n):
        result = project.tasks.nap.enqueue("argument " * 20, number)
        project.server.client.zadd(key("dead"), {result.id: 1.764e12 + number})
        error = '{"attempts":1,"errors":[{"class":"shop.Error","message":"' + "message " * 20 + '"}]}'
        project.server.client.hset(key("state"), result.id, error)
    project.server.client.delete(key("pending"))


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_tables_fit_the_terminal(project: Project, columns: int) -> None:
    bury(project, 3)
    worker = project.worker()
    project.tasks.nap.using(queue_name="other").enqueue(1, 1)
    for words in (("list", "default", "--state", "dead"), ("queues",)):
        lines = on_terminal(columns, *words, "--broker", project.server.url)
        assert max(map(len, lines)) <= columns
        assert len(lines) == (4 if words[0] == "list" else 3)
    assert worker.stop() == 0


def test_a_terminal_that_is_too_narrow_still_shows_ids(project: Project) -> None:
    bury(project, 1)
    lines = on_terminal(30, "list", "default", "--state", "dead", "--broker", project.server.url)
    assert re.match("[0-9a-f]{32} ", lines[1])


def test_list_says_how_many_there_are_beyond_its_page(project: Project) -> None:
    project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(25))
    url = project.server.url
    assert prefork("list", "default", "--broker", url).splitlines()[-1] == "… 5 more; go on with --offset 20"
    assert len(prefork("list", "default", "--offset", "20", "--broker", url).splitlines()) == 6


def test_list_has_a_column_for_priorities_where_there_are_any(project: Project) -> None:
    project.tasks.add.enqueue(1)
    url = project.server.url
    assert "priority" not in prefork("list", "default", "--broker", url)
    project.tasks.add.using(priority=-7).enqueue(1)
    head, *_, last = prefork("list", "default", "--broker", url).splitlines()
    assert head.split() == ["id", "task", "priority", "attempts", "enqueued", "error"]
    assert " -7 " in last


def test_show_says_how_long_ago_it_was(project: Project) -> None:
    result = project.tasks.add.using(run_after=3600 * 5).enqueue(1)
    text = prefork("show", result.id, "--broker", project.server.url)
    assert re.search(r"enqueued_at +\S+  \(\d+(\.\d)? s ago\)", text)
    assert re.search(r"due_at +\S+  \(in 5 h\)", text)


def test_what_an_app_prints_is_no_output_of_the_command(project: Project) -> None:
    module = project.folder / f"{project.module_name}.py"
    module.write_text(module.read_text() + "\nprint('loading')\n")
    conf = project.folder / "myapp.conf"
    conf.write_text(f"[prefork]\napp = {project.module_name}:app\n")
    said = prefork("enqueue", f"{project.module_name}.add", "--args", "[1]", "-c", str(conf))
    assert re.fullmatch("[0-9a-f]{32}\n", said)
    assert as_json("queues", "-c", str(conf))[0]["pending"] == 1


def test_enqueue_and_wait_tells_how_it_failed(project: Project) -> None:
    project.add("@app.task(max_retries=0)\ndef fail(): raise ValueError('no \\x1b[31m red')")
    project.add("@app.task(result_ttl=0)\ndef silent(): ...")
    worker = project.worker()
    name, url = f"{project.module_name}.fail", project.server.url
    said = prefork("enqueue", name, "--wait", "20", "--broker", url, code=1)
    assert re.fullmatch(rf"prefork: {name} [0-9a-f]{{32}} failed: builtins.ValueError: no \\x1b\[31m red\n", said)
    done = subprocess.run([*COMMAND, "enqueue", name, "--wait", "20", "--json", "--broker", url],
                          capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    assert done.returncode == 1
    assert '"error": ' in done.stdout
    conf = project.folder / "myapp.conf"
    conf.write_text(f"[prefork]\napp = {project.module_name}:app\n")
    said = prefork("enqueue", f"{project.module_name}.silent", "--wait", "20", "-c", str(conf), code=64)
    assert "keeps no result to wait for" in said
    assert worker.stop() == 0


def test_an_enqueue_that_is_waited_for_in_vain_names_the_task(project: Project) -> None:
    name = f"{project.module_name}.add"
    said = prefork("enqueue", name, "--args", "[1]", "--wait", "0.1", "--broker", project.server.url, code=1)
    assert re.fullmatch(rf"prefork: {name} [0-9a-f]{{32}} is READY after 0.1 s\n", said)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_task_whose_broker_is_lost_while_it_is_waited_for_is_named(own_project: Project, form: tuple[str]) -> None:
    server, name = own_project.server, f"{own_project.module_name}.add"
    words = ["enqueue", name, "--args", "[1]", "--wait", "60", "--broker", server.url, *form]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: server.client.llen(key("pending")) and server.client.pubsub_channels())
    (id,) = server.client.lrange(key("pending"), 0, -1)
    server.kill()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 69
    assert re.fullmatch(rf"prefork: {name} {id.decode()} was accepted, and then: .*\n", err)
    assert ('"error": ' in out and id.decode() in out) if form else out == ""


def test_cancel_need_not_wait_for_what_runs(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    result = project.tasks.nap.enqueue("running", 60)
    until(lambda: project.lines("started"))
    said = prefork("cancel", result.id, "--wait", "0", "--broker", project.server.url)
    assert said == f"{result.id}  asked (it runs in pid {worker.pid} on {os.uname().nodename})\n"
    assert worker.stop() == 0


def test_a_reader_that_has_enough_is_no_error(project: Project) -> None:
    project.tasks.app.enqueue_many(project.tasks.add.s("x" * 50) for _ in range(3000))
    words = ["list", "default", "--limit", "3000", "--json", "--broker", project.server.url]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_an_interrupt_ends_it_in_silence(project: Project) -> None:
    name = f"{project.module_name}.add"
    words = ["enqueue", name, "--args", "[1]", "--wait", "60", "--broker", project.server.url]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: project.server.client.llen(key("pending")) and project.server.client.pubsub_channels())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def test_help_has_examples_and_each_command_has_help() -> None:
    text = prefork("--help")
    assert "prefork retry --dead default" in text
    for command in re.findall(r"^    (\w+) ", text, re.MULTILINE):
        assert "--json" in prefork(command, "--help")


# -- the fields that are documented -----------------------------------------------------------------------------------


def documented(command: str) -> set[str]:
    """The words in code style of a command's row in the docs."""
    page = (ROOT / "docs/operations.md").read_text()
    (row,) = re.findall(
        rf"^\| [^|]*`{re.escape(command)}`[^|]*\|(.*)\|$", page.partition("What `--json` gives")[2], re.MULTILINE
    )
    return set(re.findall(r"`(\w+)`", row))


def names_in(value: Any, *closed: str) -> set[str]:
    """All names of fields, but for those inside of fields that hold the app's own data."""
    if isinstance(value, list):
        return set().union(*(names_in(item, *closed) for item in value))
    if not isinstance(value, dict):
        return set()
    inner = (names_in(item, *closed) for name, item in value.items() if name not in closed)
    return set(value).union(*inner)


def test_every_field_of_json_is_documented(project: Project) -> None:
    project.add("@app.task(max_retries=0)\ndef fail(): raise ValueError('no')")
    worker = project.worker()
    tasks, url = project.tasks, project.server.url
    dead, nap, later = tasks.fail.enqueue(), tasks.nap.enqueue("nap", 60), tasks.add.using(run_after=99).enqueue(1)
    until(lambda: (dead.refresh(), dead.is_finished)[1] and project.lines("started"))
    done = tasks.add.using(max_retries=3).enqueue(1)
    done.wait(timeout=60)
    app_data = ("args", "kwargs", "options", "value", "progress")

    def fields(*words: str, code: int = 0) -> set[str]:
        return names_in(as_json(*words, "--broker", url, code=code), *app_data)

    assert fields("queues") == documented("queues")
    assert fields("workers") <= documented("workers")
    listed = set().union(*(fields("list", "default", "--state", place) for place in ("scheduled", "active", "dead")))
    entry = documented("show") | documented("list")
    assert listed <= entry
    shown = set().union(*(fields("show", it.id) for it in (dead, nap, later, done)))
    assert shown <= entry
    assert fields("doctor") == documented("doctor")
    name = f"{project.module_name}.add"
    assert fields("enqueue", name, "--args", "[1]", "--wait", "20") <= documented("enqueue")
    assert fields("cancel", later.id) == {"id", "outcome"} <= documented("cancel")
    assert fields("retry", dead.id) == {"id", "outcome"}
    assert fields("retry", "--dead", "default", "--yes") == documented("retry --dead")
    assert fields("purge", "default", "--yes") == documented("purge")
    assert fields("pause", "default") == documented("pause") == fields("resume", "default")
    assert fields("delete", done.id, "--yes") == {"id", "outcome"}
    worker.send(signal.SIGKILL)


def test_a_pause_is_obeyed_under_load_within_a_second(project: Project) -> None:
    project.add("@app.task(result_ttl=0)\ndef step(n):\n    time.sleep(0.002)\n    note('steps', n)")
    workers = [project.worker(), project.worker()]
    tasks, url = project.tasks, project.server.url
    tasks.app.enqueue_many(tasks.step.s(n) for n in range(20_000))
    until(lambda: len(project.lines("steps")) > 200)
    prefork("pause", "default", "--broker", url)
    until(lambda: as_json("queues", "--broker", url)[0]["active"] == 0)
    before = len(project.lines("steps"))
    assert before < 15_000
    until(lambda: project.server.client.zcard(key("leases")) == 2)
    left = as_json("queues", "--broker", url)[0]
    assert (left["pending"], len(project.lines("steps"))) == (20_000 - before, before)
    prefork("resume", "default", "--broker", url)
    until(lambda: len(project.lines("steps")) > before)
    assert [it.stop() for it in workers] == [0, 0]
