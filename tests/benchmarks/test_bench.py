"""bin/bench does its work: tiny amounts, so that nothing is told about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_row_is_measured_beside_the_limit(tmp_path: Path, server_binary: str) -> None:
    ran = bench("throughput-2", "--tiny", "--rounds", "1", "--server", server_binary, "--json", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rounds = json.loads((tmp_path / "out").read_text())["rows"]["throughput-2"]
    assert [(side, len(values)) for side, values in rounds.items()] == [("limit", 1), ("prefork", 1)]
    # So few tasks may all have run when the worker is looked at for the first time: then they took nothing after it.
    assert all(value["rate"] > 0 and value["worker_us"] >= 0 for values in rounds.values() for value in values)
    assert "of the bare limit" in ran.stdout


def test_an_unknown_row_is_refused_with_those_that_there_are() -> None:
    ran = bench("thruput")
    assert ran.returncode == 2
    assert "there is no row 'thruput'; there are throughput-2, " in ran.stderr


def test_a_server_that_cannot_be_run_is_said_in_a_line() -> None:
    ran = bench("throughput-2", "--tiny", "--server", "/nowhere/redis-server")
    assert ran.returncode == 1
    assert "the server /nowhere/redis-server cannot be run" in ran.stdout
    assert "Traceback" not in ran.stderr
