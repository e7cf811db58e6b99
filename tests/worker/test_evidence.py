"""What the kernel tells of its OOM killer, from files such as it writes; and what it tells of a silent child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefork.worker import evidence
from prefork.worker.evidence import OutOfMemory, without_stack
from prefork.worker.slate import STACK_SIGNAL
from tests.conftest import until


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory.events of a cgroup of version 2, in which this process claims to be."""
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n0::/shop/worker\n")
    monkeypatch.setattr(evidence, "CGROUP", tmp_path / "cgroup")
    file = tmp_path / "fs/shop/worker/memory.events"
    file.parent.mkdir(parents=True)
    count(file, 3)
    return file


def count(file: Path, kills: int) -> None:
    file.write_text(f"low 0\nhigh 0\nmax 812\noom 9\noom_kill {kills}\noom_group_kill 0\n")


def test_each_kill_of_the_kernel_is_told_of_one_death(events: Path, tmp_path: Path) -> None:
    kernel = OutOfMemory(tmp_path / "fs")
    assert not kernel.has_struck()
    count(events, 5)  # two children at once
    assert [kernel.has_struck() for _ in range(3)] == [True, True, False]


def test_where_the_kernel_does_not_tell_nothing_is_said(events: Path, tmp_path: Path) -> None:
    kernel = OutOfMemory(tmp_path / "fs")
    events.write_text("nonsense")
    assert not kernel.has_struck()
    events.unlink()
    assert not kernel.has_struck()
    assert not OutOfMemory(tmp_path / "nowhere").has_struck()


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [("0::/shop/worker", "shop/worker/memory.events"), ("0::/docker/1234", "memory.events"),
     ("4:cpu,memory:/shop\n0::/", "memory/shop/memory.oom_control"),
     ("4:memory:/docker/12", "memory/memory.oom_control")],
)  # fmt: skip
def test_the_count_is_found_in_both_versions_and_in_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, file: str
) -> None:
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{cgroup}\n")
    monkeypatch.setattr(evidence, "CGROUP", tmp_path / "cgroup")
    path = tmp_path / "fs" / file
    path.parent.mkdir(parents=True)
    count(path, 0)
    kernel = OutOfMemory(tmp_path / "fs")
    count(path, 1)
    assert kernel.has_struck()


def test_of_a_silent_process_the_kernel_tells(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: "T (stopped)" in without_stack(process.pid))
            assert "is another program now; sleep is in state" in without_stack(process.pid)
        finally:
            process.kill()
    assert without_stack(process.pid) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_child_that_has_become_a_program_of_another_user_does_not_hurt_its_master() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            code = "import os, sys; from prefork.worker.process import kill_family; os.setuid(65534); "
            command = [sys.executable, "-c", f"{code}kill_family({process.pid})"]
            done = subprocess.run(command, capture_output=True, timeout=20, check=False)
            assert done.returncode == 0, done.stderr
            assert process.poll() is None
        finally:
            process.kill()


BLOCKS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [%d]); %s"
TELLS = """
import faulthandler, os
reading, writing = os.pipe()
os.set_blocking(writing, False)
try:
    while os.write(writing, bytes(4096)): pass
except BlockingIOError:
    os.set_blocking(writing, True)
faulthandler.register(%d, file=writing)
%s
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
@pytest.mark.parametrize(("code", "blocks"), [(BLOCKS, True), (TELLS, False)], ids=["blocks", "tells"])
def test_a_child_that_is_amid_telling_its_stack_is_not_taken_for_one_that_blocks_the_signal(
    code: str, blocks: bool
) -> None:
    code %= STACK_SIGNAL, "print(flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            os.kill(process.pid, STACK_SIGNAL)
            status = Path(f"/proc/{process.pid}/status")
            until(lambda: int(status.read_text().partition("SigBlk:")[2].split()[0], 16) >> (STACK_SIGNAL - 1) & 1)
            assert ("blocks the signal" in without_stack(process.pid)) is blocks
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_a_name_that_the_kernel_has_cut_within_a_character_does_no_harm() -> None:
    """As setproctitle leaves one, where a task names its process."""
    code = "open('/proc/self/comm', 'wb').write('обработка'.encode()); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert "обработ" in without_stack(process.pid)
        assert not evidence.awaits_core(process.pid)
        process.kill()
