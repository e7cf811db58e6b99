"""Each role does all that it has to with the rights that `prefork acl` prints for it, and can do nothing else."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from prefork import BrokerError, Prefork
from prefork.broker.client import Client
from prefork.broker.roles import roles
from tests.cli.command import as_json, prefork
from tests.conftest import Project, Server, Worker, until

PASSWORD = "open-SESAME-%2F/@:#?"
QUOTED = "open-SESAME-%252F%2F%40%3A%23%3F"
PREFIX = "shop[1]"  # what means something in patterns means nothing here
TASKS = """
@app.task(takes_context=True, result_ttl=600)
def busy(context, n):
    context.progress(1, 2, "half")
    context.enqueue(add.using(queue_name="other").s(n))
    context.enqueue(add.s(n))
    return add.enqueue(n, 1).wait(timeout=60)

@app.task(max_retries=1, retry_delay=0.05)
def fails(n):
    raise ValueError("no")

@app.task(max_retries=0)
def dies(n):
    os._exit(3)
"""


@pytest.fixture
def guarded(server_binary: str) -> Iterator[Server]:
    """A server on which only the four roles have a user, and `default` none of the rights."""
    server = Server(server_binary)
    for role in roles():
        line = prefork("acl", role, "--prefix", PREFIX).strip().replace(">PASSWORD", f">{PASSWORD}")
        server.client.execute_command(*line.split(" "))
    server.client.execute_command("ACL", "LOG", "RESET")
    yield server
    server.close()


@pytest.fixture
def project(guarded: Server, tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path, guarded, f"guarded_{os.getpid()}_{tmp_path.name}")
    project.add(TASKS)
    yield project
    project.close()


def url(server: Server, role: str) -> str:
    return f"unix://prefork-{role}:{QUOTED}@{server.path}"


def denied(server: Server) -> list[str]:
    """What was refused, by the server's own list."""
    log: Any = server.client.execute_command("ACL", "LOG")
    entries = [dict(zip(entry[::2], entry[1::2], strict=True)) if isinstance(entry, list) else entry for entry in log]
    return [f"{_text(it, 'username')}: {_text(it, 'reason')} {_text(it, 'object')}" for it in entries]


def _text(entry: dict[Any, Any], name: str) -> str:
    value = entry.get(name, entry.get(name.encode(), b""))
    return value.decode() if isinstance(value, bytes) else str(value)


def worker(project: Project) -> Worker:
    (project.folder / "secret").write_text(PASSWORD + "\n")
    conf = f"broker = unix://prefork-worker@{project.server.path}\nbroker_password_file = secret\nprefix = {PREFIX}\n"
    return project.worker(conf + "queues = default, other\nconcurrency = 2\nmax_crashes = 1")


def test_each_role_can_do_its_work_and_no_password_is_shown(project: Project) -> None:
    server, tasks = project.server, project.tasks
    app: Prefork = tasks.app
    app.connect_to(url(server, "producer"), PREFIX)
    first, second = worker(project), worker(project)
    result = tasks.busy.enqueue(1)
    assert result.wait(timeout=60) == 2
    assert [it.wait(timeout=60) for it in app.enqueue_many(tasks.add.s(n) for n in range(50))] == [*range(2, 52)]
    assert app.result(result.id).status == "SUCCESSFUL"
    late = [tasks.add.using(run_after=600, priority=3).enqueue(n) for n in range(3)]
    assert late[0].cancel()
    failed, crashed = tasks.fails.enqueue(1), tasks.dies.enqueue(1)
    for it in (failed, crashed):
        with pytest.raises(Exception, match=r"ValueError|WorkerDied|exited|Crash"):
            it.wait(timeout=60)
    naps = [tasks.hold.enqueue(n) for n in range(4)]  # one for each child
    until(lambda: len(project.lines("started")) == 4)
    first.process.kill()  # and its lease is taken over, with what it holds
    first.process.wait(10)
    until(lambda: len(server.client.zrange(f"{PREFIX}:{{default}}:leases", 0, -1)) == 1)
    until(lambda: server.client.llen(f"{PREFIX}:{{default}}:pending") == 2)

    for role in ("dashboard", "admin"):
        flags = ["--broker", url(server, role), "--prefix", PREFIX]
        queues = {it["name"]: it for it in as_json("queues", *flags)}
        assert queues["default"]["dead"] == 2
        until(lambda flags=flags: as_json("workers", *flags)[0]["answered"])  # type: ignore[misc]
        for place in ("pending", "scheduled", "active", "dead"):
            as_json("list", "default", "--state", place, *flags)
        assert as_json("show", failed.id, *flags)["task"].endswith("fails")
        assert [it for it in as_json("doctor", *flags) if it["level"] == "error"] == []
    assert denied(server) == []
    prefork("cancel", *(nap.id for nap in naps), *flags)
    prefork("retry", failed.id, *flags)
    prefork("retry", "--dead", "default", "--yes", *flags)
    prefork("delete", late[1].id, "--yes", *flags)
    prefork("pause", "other", *flags)
    prefork("resume", "other", *flags)
    prefork("enqueue", tasks.add.name, "--args", "[1]", "--queue", "other", *flags)
    prefork("purge", "default", "--yes", "--state", "scheduled", *flags)
    server.client.hset(f"{PREFIX}:{{default}}:state", "stray", "{}")
    prefork("doctor", "--repair", "--yes", *flags)
    assert not server.client.hexists(f"{PREFIX}:{{default}}:state", "stray")
    seen = " ".join(part for it in psutil.Process(second.pid).children() for part in it.cmdline())
    assert second.stop() == 0
    assert denied(server) == []
    assert "SESAME" not in seen + first.log + second.log


@pytest.mark.parametrize("role", list(roles()))
def test_no_role_can_do_anything_else(guarded: Server, role: str) -> None:
    with redis.Redis.from_url(url(guarded, role)) as client:
        assert client.ping()
        for words in (("GET", "another"), ("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"),
                      ("MONITOR",), ("SHUTDOWN",), ("EVAL", "return redis.call('GET', KEYS[1])", 1, "another"),
                      ("PUBLISH", "another", "x"), ("SET", "shop1:x", "1")):  # fmt: skip
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)
        if role == "dashboard":
            for words in (("HDEL", f"{PREFIX}:x", "y"), ("LPUSH", f"{PREFIX}:x", "y"), ("DEL", f"{PREFIX}:x")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*words)


def test_a_worker_that_could_not_take_over_does_not_begin(guarded: Server) -> None:
    client = Client(url(guarded, "worker"), PREFIX)
    client.rehearse(["default"])
    guarded.client.execute_command("ACL", "SETUSER", "prefork-worker", "-mget")
    with pytest.raises(BrokerError, match="does not permit this user"):
        client.rehearse(["default"])
    client.close()


def test_a_dashboard_that_changes_something_is_told_so(guarded: Server) -> None:
    app = Prefork("shop", broker=url(guarded, "dashboard"), prefix=PREFIX)
    task = app.task(name="t")(lambda: None)
    with pytest.raises(BrokerError, match="does not permit this user") as told:
        task.enqueue()
    assert "SESAME" not in str(told.value)


def test_it_prints_what_redis_takes(tmp_path: Path) -> None:
    told = as_json("acl", "producer", "--user", "web", "--fsync")
    assert told["line"].startswith("ACL SETUSER web reset on >PASSWORD resetkeys ~prefork:* resetchannels &prefork:*")
    assert told["line"].endswith("+waitaof")
    assert told["commands"] == sorted(told["commands"])
    conf = tmp_path / "my.conf"
    conf.write_text("[prefork]\napp = a:b\nprefix = mine\n")
    assert " ~mine:* " in prefork("acl", "worker", "-c", str(conf))
    assert "a user's name has no spaces" in prefork("acl", "worker", "--user", "a b", code=64)


FILE = "broker = redis://h/0\nbroker_password_file = "
WRONG = {
    "no file": (FILE + "none", "none: broker_password_file: cannot be read (No such file"),
    "empty": (FILE + "/dev/null", "/dev/null: broker_password_file: holds no single line; write the password into it"),
    "many lines": (FILE + "lines", "holds no single line"),
    "two": (FILE.replace("//h", "//:x@h") + "secret", "the broker's URL has a password too; leave one of them out"),
    "alone": ("broker_password_file = secret", "give the broker too, as in broker = redis://user@host:6379/0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_password_file_that_is_no_use_is_one_line(tmp_path: Path, name: str) -> None:
    lines, said = WRONG[name]
    (tmp_path / "secret").write_text("SESAME")
    (tmp_path / "lines").write_text("SESAME\nopen\n")
    (tmp_path / "my.conf").write_text(f"[prefork]\n{lines}\n")
    told = prefork("queues", "-c", str(tmp_path / "my.conf"), code=78)
    assert said in told
    assert re.fullmatch(r"prefork: [^\n]+\n", told)
    assert "SESAME" not in told


def test_what_a_worker_leaves_on_disk_is_its_users_alone(project: Project) -> None:
    one = project.worker(f"broker = {url(project.server, 'worker')}\nprefix = {PREFIX}\npidfile = my.pid")
    sockets = [path for path in project.folder.iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
    assert sockets
    for path in [*sockets, project.folder / "my.pid"]:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
    assert one.stop() == 0
