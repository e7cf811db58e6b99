"""Running the operator's command, as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.conftest import PATIENCE_S


def prefork(*words: str, code: int | None = 0) -> str:
    """What it prints; what it complains of too, when another code than 0 is expected. None: any code."""
    command = [sys.executable, "-m", "prefork.cli.operator", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=5 * PATIENCE_S, stdin=subprocess.DEVNULL, check=False
    )
    assert code in (done.returncode, None), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr if code else done.stdout


def as_json(*words: str, code: int | None = 0) -> Any:
    """The same, decoded."""
    return json.loads(prefork(*words, "--json", code=code))
