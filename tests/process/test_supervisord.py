"""A worker under a real supervisord, with conf/supervisord.conf as it is but for its paths."""

from __future__ import annotations

import configparser
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from xmlrpc.client import Fault, ServerProxy

import psutil
import pytest
from supervisor.xmlrpc import SupervisorTransport

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import active, gone, pending, place

CONF = pathlib.Path(__file__).parents[2] / "conf" / "supervisord.conf"
PROGRAM = "shop-worker"
SECTION = f"program:{PROGRAM}"


class Supervisord:
    """A supervisord of this test's own, which runs one worker."""

    def __init__(self, project: Project, conf: str, **changes: str) -> None:
        self.project = project
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="sv", dir="/tmp"))  # the path of a socket is short
        self.conf = project.folder / "myapp.conf"
        self.conf.write_text(f"[prefork]\napp = {project.module_name}:app\n{conf}\n")
        parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" ;",))
        parser.read(CONF)
        parser[SECTION].update({
            "command": shlex.join([sys.executable, "-m", "prefork.cli.worker", "-c", str(self.conf)]),
            "directory": str(project.folder), "startsecs": "1", **changes,
        })  # fmt: skip
        path = self.folder / "supervisord.conf"
        with path.open("w") as file:
            parser.write(file)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(path)], cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        until(self._listens, what="supervisord listens")

    def _listens(self) -> bool:
        try:
            return bool(self.ctl.getState())
        except OSError:  # its socket is there before it listens
            return False

    @property
    def ctl(self) -> ServerProxy:
        transport = SupervisorTransport(None, None, f"unix://{self.folder}/supervisor.sock")
        return ServerProxy("http://127.0.0.1", transport=transport).supervisor

    @property
    def log(self) -> str:
        path = self.folder / f"{PROGRAM}.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        return str(self.ctl.getProcessInfo(PROGRAM)["statename"])

    @property
    def pid(self) -> int:
        return int(self.ctl.getProcessInfo(PROGRAM)["pid"])

    def ready(self, times: int = 1) -> None:
        """Wait until a worker has said so often that it is ready."""
        until(lambda: self.log.count("is ready") >= times, what=f"the worker is ready: {self.log}")

    def children(self) -> list[int]:
        kids = psutil.Process(self.pid).children()
        return [kid.pid for kid in kids if kid.status() != psutil.STATUS_ZOMBIE and "child" in "".join(kid.cmdline())]

    def close(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(10)
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)


Start = Callable[..., Supervisord]


@pytest.fixture
def start(project: Project) -> Iterator[Start]:
    started: list[Supervisord] = []

    def begin(conf: str = "concurrency = 2", **changes: str) -> Supervisord:
        started.append(Supervisord(project, conf, **changes))
        return started[-1]

    yield begin
    for supervisord in started:
        supervisord.close()


def test_it_starts_works_and_stops(project: Project, start: Start) -> None:
    it = start()
    it.ready()
    until(lambda: it.state == "RUNNING")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert it.ctl.stopProcess(PROGRAM)
    assert it.state == "STOPPED"
    assert it.ctl.getProcessInfo(PROGRAM)["exitstatus"] == 0


def test_a_killed_master_is_started_again_and_its_tasks_run_again_soon(project: Project, start: Start) -> None:
    it = start("lease = 60")
    it.ready()
    until(lambda: it.state == "RUNNING")
    old = it.pid
    held = [project.tasks.hold.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("started")) == 2)
    os.kill(old, signal.SIGKILL)
    until(lambda: it.pid not in (0, old))
    begun_s = psutil.Process(it.pid).create_time()
    until(lambda: len(project.lines("started")) == 4, what="they run again")
    assert time.time() - begun_s < 2 + 2 * SLACK_S, "its start, and neither a lease nor a third of it"
    project.let_go()
    for n, result in enumerate(held):
        assert result.wait(timeout=60) == n
    assert len(project.lines("started")) == 4


def stopped_amid_long_tasks(project: Project, it: Supervisord, stop: Callable[[], object]) -> None:
    """What was running is back in its queue, soon after `shutdown_timeout`, and nothing is left of the worker."""
    it.ready()
    results = [project.tasks.nap.enqueue(n, 60) for n in range(4)]
    until(lambda: len(project.lines("started")) == 2)
    master, children = it.pid, it.children()
    begun_s = time.monotonic()
    stop()
    until(lambda: gone(master, *children), what="all processes are gone")
    took_s = time.monotonic() - begun_s
    assert pending(project) == [result.id for result in results]
    assert active(project) == 0
    assert took_s < 1 + 1 + SLACK_S, "shutdown_timeout, a second, and some for a machine that is busy with other tests"
    assert [place(project, result) for result in results] == ["pending"] * 4


def test_a_stop_amid_long_tasks_puts_them_back(project: Project, start: Start) -> None:
    it = start("concurrency = 2\nshutdown_timeout = 1")
    stopped_amid_long_tasks(project, it, lambda: it.ctl.stopProcess(PROGRAM))
    assert it.ctl.getProcessInfo(PROGRAM)["exitstatus"] == 0


def test_stopasgroup_does_not_cut_the_drain_short(project: Project, start: Start) -> None:
    it = start("concurrency = 1\nshutdown_timeout = 20", stopasgroup="true")
    it.ready()
    nap = project.tasks.nap.enqueue("nap", 1.5)
    until(lambda: project.lines("started"))
    assert it.ctl.stopProcess(PROGRAM)
    assert nap.wait(timeout=60) == "nap"
    assert len(project.lines("started")) == 1


def test_killasgroup_leaves_nothing_running_and_loses_nothing(project: Project, start: Start) -> None:
    # The worker would drain for a minute; supervisord waits for one second, and kills.
    it = start("concurrency = 2\nshutdown_timeout = 60", stopwaitsecs="1", stopasgroup="true", killasgroup="true")
    it.ready()
    results = [project.tasks.hold.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("started")) == 2)
    master, children = it.pid, it.children()
    assert it.ctl.stopProcess(PROGRAM)
    until(lambda: gone(master, *children))
    assert [place(project, result) for result in results] == ["active"] * 2
    assert it.ctl.startProcess(PROGRAM)
    project.let_go()
    for n, result in enumerate(results):
        assert result.wait(timeout=60) == n
    assert len(project.lines("started")) == 4


def edit(project: Project, old: str, new: str) -> None:
    path = project.folder / f"{project.module_name}.py"
    path.write_text(path.read_text().replace(old, new))
    stamp = time.time() + 10
    os.utime(path, (stamp, stamp))


def test_HUP_with_good_broken_and_changed_code_and_another_concurrency(project: Project, start: Start) -> None:
    project.add("""
        @app.task
        def version():
            return "first"
    """)
    it = start("concurrency = 1")
    it.ready()
    until(lambda: it.state == "RUNNING")
    pid, version = it.pid, project.tasks.version
    assert version.enqueue().wait(timeout=60) == "first"

    assert it.ctl.signalProcess(PROGRAM, "HUP")  # nothing has changed
    it.ready(2)
    assert version.enqueue().wait(timeout=60) == "first"

    edit(project, "@app.task\ndef add", "@app.tusk\ndef add")
    assert it.ctl.signalProcess(PROGRAM, "HUP")
    until(lambda: "the old one goes on" in it.log)
    assert version.enqueue().wait(timeout=60) == "first"
    assert "'tusk'" in it.log

    edit(project, "@app.tusk", "@app.task")
    edit(project, '"first"', '"the second"')
    it.conf.write_text(it.conf.read_text().replace("concurrency = 1", "concurrency = 3"))
    assert it.ctl.signalProcess(PROGRAM, "HUP")
    it.ready(3)
    assert version.enqueue().wait(timeout=60) == "the second"
    until(lambda: len(it.children()) == 3)
    assert (it.pid, it.state) == (pid, "RUNNING")
    assert "Traceback" not in it.log


def test_a_worker_that_cannot_start_says_why_and_is_tried_again(project: Project, start: Start) -> None:
    it = start("concurrency = 0", startretries="1", startsecs="30")  # it ends before, however busy the machine is
    until(lambda: it.state == "FATAL")
    lines = it.log.splitlines()
    assert len(set(lines)) == 1
    assert re.fullmatch(r"prefork-worker: .*myapp\.conf:3: concurrency: must be a whole number from 1 .*", lines[0])
    it.conf.write_text(it.conf.read_text().replace("concurrency = 0", "concurrency = 1"))
    with pytest.raises(Fault, match="BAD_NAME"):
        it.ctl.startProcess("nonsense")
    assert it.ctl.startProcess(PROGRAM, False)
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
