from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from prefork.errors import PidfileTaken, PidfileUnusable
from prefork.worker.pidfile import REMEDIES, Pidfile, handed_on
from tests.conftest import Project, until
from tests.process.test_signals import hang_up


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "it.pid"


def holder(path: pathlib.Path) -> subprocess.Popen[str]:
    """Another process that holds it."""
    code = (
        "import sys, time, pathlib; from prefork.worker.pidfile import Pidfile\n"
        "it = Pidfile(pathlib.Path(sys.argv[1])); it.take(); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_it_holds_the_pid_and_is_gone_afterwards(path: pathlib.Path) -> None:
    it = Pidfile(path)
    it.take()
    assert path.read_text() == f"{os.getpid()}\n"
    it.release()
    assert not path.exists()


def test_one_that_is_held_is_refused_and_named(path: pathlib.Path) -> None:
    other = holder(path)
    try:
        with pytest.raises(PidfileTaken, match=rf"{path} is held by another worker, pid {other.pid}; stop that one"):
            Pidfile(path).take()
        assert path.read_text() == f"{other.pid}\n"
    finally:
        other.kill()
        other.wait()
    it = Pidfile(path)  # stale now
    it.take()
    assert path.read_text() == f"{os.getpid()}\n"
    it.release()


@pytest.mark.parametrize("content", ["", "\n", "4194303\n", "1\n", "  77 "])
def test_a_stale_one_is_replaced(path: pathlib.Path, content: str) -> None:
    path.write_text(content)
    it = Pidfile(path)
    it.take()
    assert path.read_text() == f"{os.getpid()}\n"
    it.release()


@pytest.mark.parametrize("content", [b"[prefork]\napp = a:b\n", b"\xff\xfe", b"12 34", b"1" * 1000])
def test_what_is_no_pidfile_is_left_as_it_is(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PidfileUnusable, match="not a pid; remove it, or correct `pidfile`"):
        Pidfile(path).take()
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PidfileUnusable, match=r"none/it\.pid cannot be used .* create the folder"):
        Pidfile(tmp_path / "none" / "it.pid").take()


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(PidfileUnusable, match=r"/proc/it\.pid cannot be used"):
        Pidfile(pathlib.Path("/proc/it.pid")).take()


def test_one_that_somebody_else_has_put_there_meanwhile_stays(path: pathlib.Path) -> None:
    it = Pidfile(path)
    it.take()
    path.unlink()
    path.write_text("77\n")
    it.release()
    assert path.read_text() == "77\n"


EXEC = """
import fcntl, os, sys, pathlib
from prefork.worker.pidfile import Pidfile, handed_on
path = pathlib.Path(sys.argv[1])
it = Pidfile(path)
if len(sys.argv) == 2:
    it.take()
    it.hand_on()
    os.execv(sys.executable, [*sys.orig_argv, "again"])
handed = handed_on()
with path.open() as other:
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except BlockingIOError:
        print("locked")
{meanwhile}
it.take(handed)
print(os.getpid(), path.read_text().strip(), os.environ.get("PREFORK_PIDFILE"), os.get_inheritable(it._fd))
print(sum(os.readlink(f"/proc/self/fd/{{fd}}").startswith(str(path)) for fd in os.listdir("/proc/self/fd")
          if os.path.islink(f"/proc/self/fd/{{fd}}")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux which descriptors are open")
@pytest.mark.parametrize("meanwhile", ["", "path.unlink()"], ids=["untouched", "removed by somebody"])
def test_it_is_held_all_through_an_exec(path: pathlib.Path, meanwhile: str) -> None:
    code = EXEC.format(meanwhile=meanwhile)
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=60)
    assert said.split() == ["locked", str(process.pid), str(process.pid), "None", "False", "1"]


@pytest.mark.parametrize("value", ["", "1:3", "{pid}:", "{pid}:-1", "x"])
def test_what_was_handed_on_to_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PREFORK_PIDFILE", value.format(pid=os.getpid()))
    assert handed_on() == -1
    assert "PREFORK_PIDFILE" not in os.environ


def test_of_many_that_start_at_once_one_gets_it(path: pathlib.Path) -> None:
    code = (
        "import sys, time, pathlib; from prefork.worker.pidfile import Pidfile\n"
        "it = Pidfile(pathlib.Path(sys.argv[1]))\n"
        "while True:\n"
        "    try:\n        it.take()\n    except Exception as e:\n        print('no'); break\n"
        "    print('yes', flush=True); time.sleep(60)"
    )
    path.write_text("77\n")
    several = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(5)
    ]
    try:
        said = [process.stdout.readline() for process in several if process.stdout]
        assert sorted(said) == ["no\n"] * 4 + ["yes\n"]
    finally:
        for process in several:
            process.send_signal(signal.SIGKILL)
            process.wait()


# -- what becomes of its place while it is held ---------------------------------------------------------------------


def test_a_link_stays_and_what_it_leads_to_is_removed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    link, target = tmp_path / "link.pid", tmp_path / "run" / "it.pid"
    link.symlink_to(target)
    for _ in range(2):
        it = Pidfile(link)
        it.take()
        assert target.read_text() == f"{os.getpid()}\n"
        it.release()
        assert link.is_symlink()
        assert not target.exists()


def test_two_names_of_one_file_are_one_pidfile(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    (tmp_path / "link.pid").symlink_to(path)
    it = Pidfile(path)
    it.take()
    with pytest.raises(PidfileTaken, match=rf"link\.pid is held by another worker, pid {os.getpid()}"):
        Pidfile(tmp_path / "link.pid").take()
    it.release()


@pytest.mark.parametrize("instead", ["nothing", "file", "loop"])
def test_a_folder_that_is_gone_is_no_reason_to_fail_at_the_end(tmp_path: pathlib.Path, instead: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    it = Pidfile(folder / "it.pid")
    it.take()
    shutil.rmtree(folder)
    if instead == "file":
        folder.write_text("")
    elif instead == "loop":
        folder.symlink_to(folder)
    it.release()


def test_one_that_is_replaced_all_the_time_is_taken_or_refused_but_never_waited_for(path: pathlib.Path) -> None:
    over = threading.Event()

    def replace() -> None:
        other = path.with_name("other")
        while not over.is_set():
            other.write_text("")
            other.rename(path)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(50):
            it = Pidfile(path)
            try:
                it.take()
            except PidfileUnusable as error:
                assert "again and again" in str(error)  # noqa: PT017
            it.release()
    finally:
        over.set()
        thread.join()


def test_a_child_that_has_abandoned_it_does_not_hold_it(path: pathlib.Path) -> None:
    """And one that has not would: the lock is shared by all copies of the descriptor."""
    code = """
import os, sys, pathlib, time
from prefork.worker.pidfile import Pidfile
it = Pidfile(pathlib.Path(sys.argv[1]))
it.take()
if os.fork() == 0:
    it.abandon()
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        it = Pidfile(path)
        it.take()
        it.release()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_has_a_remedy_of_its_own() -> None:
    assert {REMEDIES[number] for number in (errno.ENOLCK, errno.EOPNOTSUPP)} == {
        "put it where files can be locked, such as /run"
    }


# -- a look at it, before a reload ----------------------------------------------------------------------------------


def test_a_check_changes_nothing(path: pathlib.Path) -> None:
    Pidfile(path).check()
    assert not path.exists()
    it = Pidfile(path)
    it.take()
    Pidfile(path).check()
    with pytest.raises(PidfileTaken):
        Pidfile(path).take()
    it.release()


@pytest.mark.parametrize("content", [b"hello", b"[prefork]\napp = a:b\n"])
def test_a_check_refuses_what_is_no_pidfile(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PidfileUnusable, match="not a pid"):
        Pidfile(path).check()
    assert path.read_bytes() == content


@pytest.mark.parametrize("where", ["none/it.pid", "/proc/1/it.pid", "file/it.pid", "link.pid"])
def test_a_check_refuses_a_place_that_cannot_be_written(tmp_path: pathlib.Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link.pid").symlink_to(tmp_path / "none" / "it.pid")
    with pytest.raises(PidfileUnusable, match="cannot be used"):
        Pidfile(tmp_path / where).check()


# -- at a reload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["nowhere/it.pid", "garbage"])
def test_a_new_pidfile_that_cannot_be_used_does_not_end_the_worker(project: Project, where: str) -> None:
    (project.folder / "garbage").write_text("hello")
    worker = project.worker("pidfile = it.pid")
    conf = worker._conf
    good = conf.read_text()
    conf.write_text(good.replace("it.pid", where))
    worker.send(signal.SIGHUP)
    until(lambda: "the old one goes on" in worker.log or worker.process.poll() is not None)
    assert worker.process.poll() is None, worker.log
    assert f"{where} " in worker.log
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    conf.write_text(good)
    hang_up(worker)
    assert worker.stop() == 0


@pytest.mark.parametrize("new", ["new.pid", None])
def test_the_old_pidfile_is_gone_when_a_reload_names_another_or_none(project: Project, new: str | None) -> None:
    worker = project.worker("pidfile = old.pid")
    conf = worker._conf
    conf.write_text(conf.read_text().replace("pidfile = old.pid", f"pidfile = {new}" if new else ""))
    hang_up(worker)
    there = sorted(path.name for path in project.folder.glob("*.pid"))
    assert there == ([new] if new else [])
    if new:
        assert (project.folder / new).read_text() == f"{worker.pid}\n"
    assert worker.stop() == 0
    assert not list(project.folder.glob("*.pid*"))


def test_the_pidfile_is_held_all_through_a_reload(project: Project) -> None:
    worker = project.worker("pidfile = it.pid")
    path = project.folder / "it.pid"
    inode = path.stat().st_ino
    got_it, over = [], threading.Event()

    def try_to_take() -> None:
        with path.open() as other:
            while not over.is_set():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    got_it.append(time.monotonic())
                    fcntl.flock(other, fcntl.LOCK_UN)
                time.sleep(0.0005)

    thief = threading.Thread(target=try_to_take)
    thief.start()
    try:
        for _ in range(3):
            hang_up(worker)
            assert path.stat().st_ino == inode
    finally:
        over.set()
        thief.join()
    assert not got_it
    assert path.read_text() == f"{worker.pid}\n"
    assert worker.stop() == 0
    assert not path.exists()
