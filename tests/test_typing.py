"""What mypy --strict says of right and of wrong calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "typing"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str, str]]]:
    """What mypy says of each sample: (line, code, text)."""
    cache = tmp_path_factory.mktemp("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(cache),
               "--hide-error-context", "--no-error-summary", "--disable-error-code", "unused-coroutine",
               *map(str, sorted(SAMPLES.glob("*.py")))]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found: dict[str, list[tuple[int, str, str]]] = {}
    for line in ran.stdout.splitlines():
        match = re.fullmatch(r"(.+?):(\d+): (error|note): (.*?)(?:  \[([\w-]+)\])?", line)
        assert match, line
        if match[3] == "error":
            found.setdefault(Path(match[1]).name, []).append((int(match[2]), match[5], match[4]))
    assert set(found) <= {path.name for path in SAMPLES.glob("*.py")}, f"errors in the package itself: {found}"
    return found


def test_right_calls_have_the_types_that_users_expect(said: dict[str, list[tuple[int, str, str]]]) -> None:
    assert said.get("right.py", []) == []


def test_wrong_calls_are_found_and_nothing_else(said: dict[str, list[tuple[int, str, str]]]) -> None:
    lines = (SAMPLES / "wrong.py").read_text().splitlines()
    expected = [(n, match[1]) for n, line in enumerate(lines, 1) if (match := re.search(r"# E: ([\w-]+)$", line))]
    assert len(expected) > 30
    assert [(line, code) for line, code, _ in said.get("wrong.py", [])] == expected, said
