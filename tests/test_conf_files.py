"""What lies in conf/ is right: the sample says what the code does, and the supervisors understand their files."""

from __future__ import annotations

import configparser
import pathlib
import re
import shutil
import signal
import subprocess

import pytest
from supervisor.datatypes import RestartUnconditionally
from supervisor.options import ProcessConfig, ServerOptions

from prefork import config
from prefork.cli import exits, worker
from prefork.config import KEYS

CONF = pathlib.Path(__file__).parents[1] / "conf"
SAMPLE = CONF / "prefork.conf"
PAGE = CONF.parent / "docs" / "configuration.md"
OF_SECTIONS = {"numprocs", "numprocs_start", "process_name"}  # read with the section, not for each process
# What a sample shows for keys that have no fixed default.
SHOWN = {
    "broker_password_file",
    "app",
    "broker",
    "concurrency",
    "durability",
    "prefix",
    "directory",
    "pidfile",
    "user",
    "signing_keys",
    "signing_keys_file",
}
SETTING = re.compile(r"^(?:# )?([a-z_]+) = (.+)$", re.MULTILINE)


def test_the_sample_has_every_key_once_in_the_order_of_the_table() -> None:
    assert [name for name, _ in SETTING.findall(SAMPLE.read_text())] == list(KEYS)


def test_the_sample_shows_the_defaults() -> None:
    for name, value in SETTING.findall(SAMPLE.read_text()):
        if KEYS[name].default is None:
            assert name in SHOWN
        else:
            assert value == KEYS[name].default, name


def test_the_sample_with_its_comments_taken_away_is_a_configuration(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_SIGNING_KEYS", "k" * 64)
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


def test_supervisord_knows_each_key_and_reads_what_is_meant(tmp_path: pathlib.Path) -> None:
    """One that it does not know it passes over, without a word."""
    assert set(program()) <= {*ProcessConfig.req_param_names, *ProcessConfig.optional_param_names, *OF_SECTIONS}
    text = (CONF / "supervisord.conf").read_text().replace("/srv/shop/venv/bin/prefork-worker", "/bin/true")
    path = tmp_path / "supervisord.conf"
    path.write_text(text)
    options = ServerOptions()
    options.realize(["-n", "-c", str(path)])
    (group,) = options.process_group_configs
    (it,) = group.process_configs
    assert (it.name, it.command) == ("shop-worker", "/bin/true -c /srv/shop/myapp.conf")
    assert (it.autostart, it.autorestart) == (True, RestartUnconditionally)
    assert (it.stopsignal, it.stopasgroup, it.killasgroup) == (signal.SIGTERM, False, True)
    assert it.redirect_stderr
    assert it.stdout_logfile == str(tmp_path / "shop-worker.log")
    assert it.environment == {"PYTHONUNBUFFERED": "1", "PWD": it.directory}
    assert options.nodaemon


def test_supervisord_tries_again_for_longer_than_a_broker_takes_to_come_back() -> None:
    tries = int(program()["startretries"])
    assert tries * (tries + 1) / 2 >= 3600, "each pause is a second longer than the one before"


def unit() -> dict[str, str]:
    """What systemd reads."""
    return dict(re.findall(r"^([A-Z][A-Za-z]+)=(.*)$", (CONF / "prefork-worker.service").read_text(), re.MULTILINE))


def test_systemd_tells_by_which_name_the_worker_is_in_its_folder() -> None:
    assert unit()["Environment"] == f"PWD={unit()['WorkingDirectory']}"


def test_systemd_does_not_give_up_on_a_broker_that_is_away() -> None:
    assert unit()["Restart"] == "always"
    assert unit()["StartLimitIntervalSec"] == "0"
    final = {int(code) for code in unit()["RestartPreventExitStatus"].split()}
    assert final == {2, exits.EXIT_APP, exits.EXIT_NOPERM, exits.EXIT_CONFIG}  # 2: argparse


def test_systemd_is_told_by_the_worker_itself() -> None:
    assert (unit()["Type"], unit()["NotifyAccess"]) == ("notify", "main")
    assert unit()["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit()["KillMode"] == "mixed"
    assert int(unit()["WatchdogSec"]) >= 10


def verified(folder: pathlib.Path, text: str) -> tuple[int, str]:
    """What systemd says of a unit."""
    path = folder / "shop-worker.service"
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "shop-worker" in line]
    return done.returncode, "\n".join(said)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_understands_the_unit(tmp_path: pathlib.Path) -> None:
    text = (CONF / "prefork-worker.service").read_text()
    text = text.replace("/srv/shop/venv/bin/prefork-worker", "/bin/true").replace("User=shop", "User=root")
    assert verified(tmp_path, text) == (0, "")
    assert "Unknown key" in verified(tmp_path, text.replace("WatchdogSec=", "WatchdogSecs="))[1]  # so it is looked at
    assert text.index("\nStartLimitIntervalSec=") < text.index("\n[Service]")  # below it is not read


# -- docs/configuration.md ------------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    text = PAGE.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def test_the_page_has_every_key_in_the_order_of_the_table_with_its_default() -> None:
    assert [row[0].strip("`") for row in rows("Keys")] == list(KEYS)
    for name, default, *_ in rows("Keys"):
        key = KEYS[name.strip("`")]
        assert default == f"`{key.default}`" if key.default else default, name


def test_the_page_has_every_exit_code() -> None:
    codes = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert {int(row[0]) for row in rows("Exit codes")} == codes | {0, 2}  # 2: argparse


def test_the_page_has_every_flag_of_the_worker() -> None:
    shown = {flag for row in rows("prefork-worker") for flag in re.findall(r"(?<![\w-])--?[a-z-]+\b|-[nQ]\b", row[0])}
    known = {flag for action in worker._parser()._actions for flag in action.option_strings}
    assert shown == known - {"-h", "--help"}
