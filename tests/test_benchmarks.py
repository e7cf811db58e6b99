"""The benchmarks that docs name run, and measure each case; what they measure is no matter here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = {
    "takeover": (("--rounds", "1", "--lease", "1"), 7),
    "recovery": (("--runs", "1", "--only", "child", "--only", "cut"), 2),
    "floor": (("--rounds", "1", "--count", "3"), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_runs(name: str) -> None:
    if name == "floor" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    flags, cases = CASES[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.stderr
    assert done.returncode in (0, 1), "1: something was slower than it should be"
    told = json.loads(done.stdout)
    assert len(told["rows"] if name == "takeover" else told) == cases
