from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from prefork.errors import PidfileTaken, PidfileUnusable
from prefork.worker.pidfile import Pidfile


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


def test_it_stays_over_an_exec(path: pathlib.Path) -> None:
    code = """
import os, sys, pathlib
from prefork.worker.pidfile import Pidfile
it = Pidfile(pathlib.Path(sys.argv[1]))
it.take()
if len(sys.argv) == 2:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
print(os.getpid(), pathlib.Path(sys.argv[1]).read_text().strip())
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=20)
    assert said.split() == [str(process.pid)] * 2


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
    time.sleep(0)
