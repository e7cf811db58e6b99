"""The choices are measured; what comes of it is no matter here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", ["fcall", "blmove", "pipe-answers", "writev"])
def test_a_choice_is_measured_beside_what_it_was_chosen_over(row: str, server_binary: str) -> None:
    command = [sys.executable, "-m", "benchmarks.alternatives", "--seconds", "0", "--only", row]
    done = subprocess.run(
        [*command, "--server", server_binary], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert float(line[40:].split()[0]) > 0
