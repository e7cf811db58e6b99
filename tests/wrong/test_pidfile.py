"""A pidfile: a stale one is replaced, a live one respected, what is no pidfile is left as it is. Exit codes 73, 75."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Project, Server, Worker, until
from tests.wrong import APP, run, the_line

EXIT_CANTCREATE, EXIT_TAKEN, EXIT_CONFIG = 73, 75, 78

GARBAGE = {
    "text": b"hello\n",
    "bytes": b"\x7fELF\x00\xff\xfe",
    "a negative number": b"-5\n",
    "two lines": b"12\n34\n",
    "what a terminal obeys": b"\x1b[31m\x07",
    "a megabyte": b"x" * (1 << 20),
}

STALE = {
    "of a dead process": lambda: b"%d\n" % dead_pid(),
    "of a living process that is no worker": lambda: b"%d\n" % os.getpid(),
    "with spaces": lambda: b"  %d \n" % dead_pid(),
    "of a pid that can't be": lambda: b"99999999999\n",
    "empty": lambda: b"",
}


def dead_pid() -> int:
    """The pid of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def folder(tmp_path: Path, server: Server) -> Path:
    """With an app and its configuration, whose pidfile is named by the environment."""
    (tmp_path / "shop.py").write_text(APP.format(url=server.url, limit_s=20))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\nconcurrency = 1\npidfile = %(ENV_PIDFILE)s\n")
    return tmp_path


def refused(folder: Path, pidfile: str, code: int, *parts: str) -> str:
    """The line that says why this is no pidfile."""
    said = run(folder, "-c", "shop.conf", "--burst", PIDFILE=pidfile)
    return the_line(said, code, pidfile, *parts)


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_pidfile_is_left_alone(folder: Path, name: str) -> None:
    path = folder / "pid"
    path.write_bytes(GARBAGE[name])
    line = refused(folder, str(path), EXIT_CANTCREATE, "not a pid; remove it, or correct `pidfile`")
    assert path.read_bytes() == GARBAGE[name]
    assert len(line) < 300


def test_the_configuration_itself_is_no_pidfile(folder: Path) -> None:
    before = (folder / "shop.conf").read_bytes()
    refused(folder, str(folder / "shop.conf"), EXIT_CANTCREATE, "not a pid; remove it, or correct `pidfile`")
    assert (folder / "shop.conf").read_bytes() == before


@pytest.mark.parametrize("name", STALE)
def test_a_stale_one_is_replaced(folder: Path, name: str) -> None:
    path = folder / "pid"
    path.write_bytes(STALE[name]())
    said = run(folder, "-c", "shop.conf", "--burst", PIDFILE=str(path))
    assert (said.code, said.out) == (0, "")
    odd = [line for line in said.err.splitlines() if " INFO " not in line]
    assert not [line for line in odd if "run as root" not in line]
    assert not path.exists(), "it is removed at the end"


UNUSABLE = {
    "no folder": ("nowhere/pid", EXIT_CANTCREATE, ("No such file or directory", "create the folder, or correct")),
    "a file for a folder": ("shop.py/pid", EXIT_CANTCREATE, ("Not a directory", "correct `pidfile`")),
    "a link to itself": ("loop", EXIT_CANTCREATE, ("symbolic links", "correct `pidfile`")),
    "a name too long": ("p" * 80, EXIT_CONFIG, ("shop.conf:4: pidfile: ", "too long for the status socket")),
    "a folder": (".", EXIT_CONFIG, ("shop.conf:4: pidfile: ", "is a folder; name a file in it")),
    "a pipe": ("pipe", EXIT_CANTCREATE, ("is no plain file", "correct `pidfile`")),
    "a device": ("null", EXIT_CANTCREATE, ("is no plain file", "correct `pidfile`")),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_place_where_no_pidfile_can_be(folder: Path, name: str) -> None:
    where, code, parts = UNUSABLE[name]
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "null").symlink_to("/dev/null")  # so that no fault of ours removes the host's own
    said = run(folder, "-c", "shop.conf", "--burst", PIDFILE=where)
    the_line(said, code, *parts, where if code == EXIT_CANTCREATE else "")


@pytest.fixture
def open_folder(server: Server) -> Iterator[Path]:
    """A folder that everybody may look into, and only its owner may write to."""
    server.path.chmod(0o777)
    server.folder.chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("there", [False, True], ids=["folder", "file"])
def test_what_the_user_may_not_write(open_folder: Path, there: bool) -> None:
    path = open_folder / "pid"
    if there:
        path.write_text("")
    (open_folder / "shop.conf").write_text(f"[prefork]\napp = shop:app\npidfile = {path}\nuser = nobody\n")
    said = run(open_folder, "-c", "shop.conf")
    the_line(said, EXIT_CANTCREATE, str(path), "Permission denied", "let this user write there, or correct `pidfile`")


# -- a live one -----------------------------------------------------------------------------------------------------


def test_a_live_one_is_respected_and_its_worker_works_on(project: Project) -> None:
    path = project.folder / "pid"
    worker = project.worker(f"pidfile = {path}\nconcurrency = 1")
    assert path.read_text() == f"{worker.pid}\n"
    second = project.worker(f"pidfile = {path}", wait=False)
    assert second.wait() == EXIT_TAKEN
    said = f"{path} is held by another worker, pid {worker.pid}; stop that one, or name another `pidfile`"
    assert second.log == f"prefork-worker: {said}\n"
    assert path.read_text() == f"{worker.pid}\n"
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"\x1b[31m"], ids=repr)
def test_a_live_one_is_respected_whatever_somebody_has_written_into_it(project: Project, content: bytes) -> None:
    path = project.folder / "pid"
    worker = project.worker(f"pidfile = {path}\nconcurrency = 1")
    path.write_bytes(content)
    second = project.worker(f"pidfile = {path}", wait=False)
    assert second.wait() == EXIT_TAKEN
    assert len(second.log.splitlines()) == 1
    assert "is held by another worker" in second.log
    assert second.log[:-1].isprintable()
    assert worker.stop() == 0


def test_a_killed_workers_is_taken_over_while_its_children_die(project: Project) -> None:
    path = project.folder / "pid"
    worker = project.worker(f"pidfile = {path}\nconcurrency = 1")
    worker.send(signal.SIGKILL)
    worker.wait()
    assert path.read_text() == f"{worker.pid}\n"
    second = project.worker(f"pidfile = {path}\nconcurrency = 1")
    assert path.read_text() == f"{second.pid}\n"
    assert second.stop() == 0
    assert not path.exists()


def test_of_many_that_start_at_once_one_gets_it(project: Project) -> None:
    path = project.folder / "pid"
    path.write_text(f"{dead_pid()}\n")
    workers: list[Worker] = [project.worker(f"pidfile = {path}\nconcurrency = 1", wait=False) for _ in range(5)]
    until(lambda: sum(worker.process.poll() is None for worker in workers) == 1, what="one is left")
    (winner,) = [worker for worker in workers if worker.process.poll() is None]
    until(lambda: "is ready" in winner.log)
    assert path.read_text() == f"{winner.pid}\n"
    assert {worker.process.poll() for worker in workers if worker is not winner} == {EXIT_TAKEN}
    assert winner.stop() == 0
