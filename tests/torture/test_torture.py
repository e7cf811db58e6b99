"""`prefork torture` as users run it, for a short while; and that it finds what somebody takes away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from prefork.broker.keys import Keys
from tests.conftest import Server, until

LIMIT_S = 300.0
TORTURE = [sys.executable, "-m", "prefork.cli.operator", "torture"]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORTURE, *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    try:
        said, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert said, errors
    return json.loads(said), errors


def test_it_gives_an_account_of_every_task(tmp_path: Path) -> None:
    process = start(tmp_path, "--minutes", "0.15", "--seed", "7", "--rate", "150", "--pause", "0.4", "--json")
    report, errors = end(process)
    assert (report["broken"], report["findings"]) == ({}, [])
    assert (process.returncode, errors) == (0, "")
    assert report["lost"] == 0
    assert report["faults"] >= 2
    assert report["accepted"] + report["unsure_accepted"] == (
        report["done"] + report["dead"] + report["dead_by_faults"] + report["cancelled"]
    )
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_a_temporary_folder_may_be_deep(tmp_path: Path) -> None:
    """Deeper than the path of a unix socket may be."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    report, errors = end(start(deep, "--minutes", "0.01", "--rate", "50", "--json"))
    assert (report["broken"], report["findings"], errors) == ({}, [], "")


def test_it_finds_a_task_that_somebody_takes_away(tmp_path: Path, own_server: Server) -> None:
    flags = ["--minutes", "0.1", "--seed", "7", "--rate", "150", "--pause", "60", "--json", "--broker", own_server.url]
    process = start(tmp_path, *flags)
    with redis.Redis.from_url(own_server.url) as client:
        keys = until(lambda: _a_task_that_waits(client), LIMIT_S)
        ((id, _),) = client.zpopmax(keys.scheduled)
        client.hdel(keys.messages, id)
    report, _ = end(process)
    assert process.returncode == 1
    assert report["broken"] == {"lost": 1}
    assert f"id={id.decode()}" in report["findings"][0]
    assert (Path(report["folder"]) / "worker-0.log").exists()


def _a_task_that_waits(client: redis.Redis) -> Keys | None:
    """One that is delayed for so long that nobody else takes it now."""
    for name in client.keys("torture-*:{first}:scheduled"):
        prefix = name.decode().partition(":")[0]
        keys = Keys(prefix, "first")
        found = client.zrange(keys.scheduled, 0, 0, desc=True, withscores=True)
        time_s, _ = client.time()
        if found and found[0][1] > time_s * 1000 + 3000:
            return keys
    return None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minutes", "0"], "--minutes is from 0.01 to 10,080, not 0.0"),
        (["--children", "0"], "--children is from 1 to 1,000, not 0"),
        (["--rate", "1e9"], "--rate is from 1 to 100,000, not 1000000000.0"),
        (["--broker", "redis://127.0.0.1:1/0"], "refuses the connection"),
        (["--server-binary", "/no/such/server"], "the server /no/such/server cannot be run: No such file or directory"),
        (["--broker", "redis://h", "--server-binary", "x"], "give --broker or --server-binary, not both"),
        (["--prefix", "mine"], "torture has an app and a prefix of its own"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    process = start(tmp_path, *flags)
    out, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode not in (0, 1)
    assert out == ""
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors
