"""What lies in conf/ is right: the sample says what the code does, and the supervisors understand their files."""

from __future__ import annotations

import configparser
import pathlib
import re
import shutil
import subprocess

import pytest

from prefork import config
from prefork.config import KEYS

CONF = pathlib.Path(__file__).parents[1] / "conf"
SAMPLE = CONF / "prefork.conf"
# What a sample shows for keys that have no fixed default.
SHOWN = {"app", "broker", "concurrency", "prefix", "directory", "pidfile", "user"}
SETTING = re.compile(r"^(?:# )?([a-z_]+) = (.+)$", re.MULTILINE)


def test_the_sample_has_every_key_once_in_the_order_of_the_table() -> None:
    assert [name for name, _ in SETTING.findall(SAMPLE.read_text())] == list(KEYS)


def test_the_sample_shows_the_defaults() -> None:
    for name, value in SETTING.findall(SAMPLE.read_text()):
        if KEYS[name].default is None:
            assert name in SHOWN
        else:
            assert value == KEYS[name].default, name


def test_the_sample_with_its_comments_taken_away_is_a_configuration(tmp_path: pathlib.Path) -> None:
    as_it_is = config.load(SAMPLE)
    user = "root"
    path = tmp_path / "all.conf"
    text = re.sub(r"^# ([a-z_]+ = )", r"\1", SAMPLE.read_text(), flags=re.MULTILINE)
    path.write_text(text.replace("user = shop", f"user = {user}"))
    settings = config.load(path)
    for key in KEYS.values():
        if key.name not in SHOWN:
            assert getattr(settings, key.field) == getattr(as_it_is, key.field), key.name


def test_each_key_has_words_of_its_own_above_it() -> None:
    blocks = SAMPLE.read_text().split("\n[prefork]\n")[1].strip().split("\n\n")
    for block in blocks:
        assert block.startswith("# "), block
        assert SETTING.search(block), block


def program() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" ;",))
    parser.read(CONF / "supervisord.conf")
    return parser["program:shop-worker"]


def test_supervisord_waits_longer_than_the_worker_drains() -> None:
    shutdown_timeout_s = config.load(SAMPLE).shutdown_timeout_s
    assert int(program()["stopwaitsecs"]) >= shutdown_timeout_s + 5
    assert program()["stopsignal"] == "TERM"


def test_systemd_waits_longer_than_the_worker_drains() -> None:
    unit = (CONF / "prefork-worker.service").read_text()
    found = re.search("TimeoutStopSec=([0-9]+)", unit)
    assert found
    assert int(found[1]) >= config.load(SAMPLE).shutdown_timeout_s + 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_understands_the_unit(tmp_path: pathlib.Path) -> None:
    unit = (CONF / "prefork-worker.service").read_text().replace("/srv/shop/venv/bin/prefork-worker", "/bin/true")
    path = tmp_path / "shop-worker.service"
    path.write_text(unit.replace("User=shop", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "shop-worker" in line]
    assert said == []
    assert done.returncode == 0 or not said
