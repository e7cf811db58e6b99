"""Wrong input of every kind: one line says what is wrong, where, and the remedy. Never a traceback, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

LIMIT_S = 60.0  # what a command may take to say what is wrong
APP = """
from prefork import Prefork
app = Prefork("shop", broker={url!r}, limit_s={limit_s})
@app.task
def add(a: int, b: int = 2) -> int:
    return a + b
"""


class Said(NamedTuple):
    """What a command has said, and its exit code."""

    code: int
    out: str
    err: str


def begin(folder: Path, *words: str, program: str = "prefork-worker", **env: str) -> subprocess.Popen[str]:
    """Start one of the commands in a folder."""
    module = {"prefork-worker": "prefork.cli.worker", "prefork": "prefork.cli.operator"}[program]
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], cwd=folder, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="surrogateescape", start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> Said:
    """Wait for a command that is to end by itself."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        pytest.fail(f"{process.args} goes on after {limit_s:g} s, and says:\n{out}{err}")
    return Said(process.returncode, out, err)


def run(folder: Path, *words: str, program: str = "prefork-worker", **env: str) -> Said:
    """Run one of the commands to its end."""
    return end(begin(folder, *words, program=program, **env))


def the_line(said: Said, code: int, *parts: str, program: str = "prefork-worker") -> str:
    """The one line on standard error, without the program's name. All of `parts` are in it, and the code is right."""
    assert "Traceback" not in said.err + said.out
    assert said.code == code, said
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith(f"{program}: "), lines[0]
    assert lines[0].isprintable(), lines[0]
    for part in parts:
        assert part in lines[0], (part, lines[0])
    assert not said.out
    return lines[0].removeprefix(f"{program}: ")
