"""bin/demo as a user runs it: from anywhere, with no terminal, and stopped in the middle."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 180  # for what takes seconds on an idle machine
MARK = "PREFORK_TEST_MARK"


class Demo:
    """Starts bin/demo, and knows every process that came of it by a mark in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.output = folder, uuid.uuid4().hex, folder / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        """Start it, by a symbolic link from another folder, in a group of its own, without a terminal."""
        link = self.folder / "a link"
        link.symlink_to(ROOT / "bin" / "demo")
        # SPT_NOENV: the process titles of the worker are not to be written over its environment.
        environ = os.environ | {MARK: self.mark, "PREFORK_VENV": sys.prefix, "SPT_NOENV": "1"}
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [link, *arguments],
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self.process

    def said(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text()

    def environments(self) -> Iterator[dict[str, str]]:
        """The environments of the processes that came of it and are there."""
        for process in psutil.process_iter():
            try:
                environ = process.environ()
            except (psutil.Error, OSError):
                continue
            if environ.get(MARK) == self.mark:
                yield environ

    def broker_folder(self) -> Path:
        """Where its broker is."""
        brokers = {environ["PREFORK_BROKER"] for environ in self.environments() if "PREFORK_BROKER" in environ}
        return Path(brokers.pop().removeprefix("embedded:"))

    def is_gone(self) -> bool:
        """Whether nothing is left running."""
        return not list(self.environments())

    def kill(self) -> None:
        """End what a failed test has left."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    process.kill()
            except (psutil.Error, OSError):
                continue
        if self.process:
            self.process.wait()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    (tmp_path / "elsewhere").mkdir()
    demo = Demo(tmp_path / "elsewhere")
    yield demo
    demo.kill()


def until(condition: Callable[[], bool], demo: Demo, what: str) -> None:
    give_up = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < give_up, f"not within {LIMIT_S} s: {what}; the demo said\n{demo.said()}"
        time.sleep(0.02)


def git_status() -> str:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "status", "--porcelain"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_demo_indexes_a_folder_with_all_kinds_of_files_and_leaves_nothing(demo: Demo) -> None:
    source = demo.folder / "some source"
    (source / "deeper" / ".hidden").mkdir(parents=True)
    (source / "plain.py").write_text("import os, sys\nfrom os.path import join\n\n\ndef one():\n    return join\n")
    (source / "deeper" / "näme.py").write_text("from . import x\nclass A:\n    async def two(self): ...\n")
    (source / "deeper" / ".hidden" / "not_seen.py").write_text("")
    (source / "empty.py").write_text("")
    (source / "not_python.py").write_text("def (:\n")
    (source / "open.py").write_text("x = (\n")
    (source / "zero.py").write_bytes(b"x = 1\0\n")
    (source / "not_utf8.py").write_bytes(b"x = '\xff'\n")
    (source / "unknown_encoding.py").write_text("# coding: klingon\n")
    (source / "dangling.py").symlink_to("nowhere")
    before = git_status()
    status = demo.start("--check", "some source").wait(LIMIT_S)
    said = demo.said()
    assert status == 0, said
    assert re.search(r"files +│ 8, 5 of them not valid Python", said), said
    assert re.search(r"definitions +│ 3 ", said), said
    assert re.search(r"imports +│ 2 modules", said), said
    assert re.search(r"longest function +│ one in plain.py, 2 lines", said), said
    assert re.fullmatch(
        r"ok files=8 tasks=10 retries=1 killed=1 tasks/s=\d+ speed-up=\d+\.\d\d sums=equal", said.splitlines()[-1]
    ), said
    until(demo.is_gone, demo, "nothing left running")
    assert git_status() == before


@pytest.mark.parametrize(
    ("number", "whole_group", "status"),
    [
        pytest.param(signal.SIGINT, True, 130, id="ctrl-c"),
        pytest.param(signal.SIGINT, False, 130, id="int"),
        pytest.param(signal.SIGTERM, False, 143, id="term"),
        pytest.param(signal.SIGKILL, False, -9, id="kill"),
    ],
)
def test_a_demo_that_is_stopped_in_the_middle_leaves_nothing_running(
    demo: Demo, number: signal.Signals, whole_group: bool, status: int
) -> None:
    source = demo.folder / "source"
    source.mkdir()
    for n in range(1200):
        (source / f"file{n}.py").write_text("def f(x):\n    return x\n" * 500)
    process = demo.start(source)
    until(lambda: "with prefork 300/1200" in demo.said(), demo, "a quarter of the files")
    broker = demo.broker_folder()
    assert broker.exists()
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(LIMIT_S) == status
    until(demo.is_gone, demo, "nothing left running")
    assert not broker.exists()
    assert "Traceback" not in demo.said()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "demo: missing: there is no such folder\n"),
        ("bare", "demo: bare: there are no .py files in this folder\n"),
        ("bare/text.txt", "demo: bare/text.txt: there is no such folder\n"),
    ],
)
def test_a_folder_that_cannot_be_indexed_is_said_in_one_line(demo: Demo, path: str, said: str) -> None:
    (demo.folder / "bare").mkdir()
    (demo.folder / "bare" / "text.txt").write_text("x = 1\n")
    assert demo.start(path).wait(LIMIT_S) == 1
    assert demo.said() == said


def test_sums_that_differ_and_mishaps_that_did_not_happen_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "indexer"))
    from report import Report, Totals

    for name in ("report", "analysis"):
        monkeypatch.delitem(sys.modules, name)
    right = Report(Totals(lines=3), 1.0, 3, 1, 1, Totals(lines=3), 1.5)
    assert right.faults() == []
    wrong = Report(Totals(lines=3), 1.0, 3, 0, 0, Totals(lines=4), 1.5)
    assert [fault.split(":")[0] for fault in wrong.faults()] == [
        "the sums differ",
        "0 retries instead of 1",
        "0 tasks killed at the deadline instead of 1",
    ]


@pytest.mark.parametrize("command", ["demo", "prefork", "prefork-worker", "test"])
def test_a_machine_without_python_is_told_so_in_one_line(command: str, tmp_path: Path) -> None:
    for name in ("bin", "prefork", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cksum", "dirname", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.fail(f"there is no {tool}"))
    (tools / "python3").write_text("#!/bin/sh\nexit 127\n")  # a shim with nothing behind it
    (tools / "python3").chmod(0o755)
    done = subprocess.run([tmp_path / "bin" / command], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(rf"{command}: no Python >= 3.11 .*\n", done.stderr)
    assert not (tmp_path / ".venv").exists()
