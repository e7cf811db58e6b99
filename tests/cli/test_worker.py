"""`prefork-worker`: what it says of a mistake is one line, with the remedy, and a code of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefork.cli.exits import EXIT_APP, EXIT_BROKER, EXIT_CONFIG, EXIT_INTERRUPTED
from tests.conftest import Project, Server

APP = 'from prefork import Prefork\napp = Prefork("shop", broker={url!r})\n@app.task\ndef add(a, b): return a + b\n'


def run(folder: Path, conf: str, *flags: str, **files: str) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "shop.conf").write_text(conf)
    command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(folder / "shop.conf"), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=False)


def fails(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("prefork-worker: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])


@pytest.mark.parametrize(
    ("conf", "parts"),
    [
        ("[prefork]\nconcurency = 3\napp = shop:app\n", ("shop.conf:2", "did you mean 'concurrency'?")),
        ("[prefork]\nconcurrency = no\napp = shop:app\n", ("shop.conf:2", "concurrency", "'no'")),
        ("[prefork]\n", ("shop.conf", "app = shop.tasks:app")),
        ("app = shop:app\n", ("shop.conf:1", "[prefork]")),
        ("[prefork]\napp = shop\n", ("shop.conf:2", "module:attribute")),
    ],
)
def test_a_mistake_in_the_configuration(tmp_path: Path, conf: str, parts: tuple[str, ...]) -> None:
    fails(run(tmp_path, conf), EXIT_CONFIG, *parts)


def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path) -> None:
    fails(run(tmp_path, "[prefork]\napp = shop:app\n", "-n", "0"), EXIT_CONFIG, "--concurrency")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(tmp_path / "none.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    fails(done, EXIT_CONFIG, "none.conf", "no such file")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("raise ValueError('of the app')", ("cannot import shop", "ValueError: of the app", "shop.py:1")),
        ("import sys\nsys.exit(3)", ("cannot import shop", "sys.exit(3)", "shop.py:2")),
        ("import nowhere", ("cannot import shop", "nowhere", "shop.py:1")),
        ("def broken(:", ("cannot import shop", "SyntaxError", "shop.py:1")),
        ("other = 1", ("has no 'app'",)),
        ("from prefork import Prefork\ncelery = Prefork('x')", ("did you mean shop:celery?",)),
        ("app = 7", ("is a int, not a Prefork",)),
        ("from prefork import Prefork\napp = Prefork('x', broker='redis://h')", ("has no tasks", "@app.task")),
        (
            "from prefork import Prefork\napp = Prefork('x')\n@app.task(name='a')\ndef f(): ...\n"
            "@app.task(name='a')\ndef g(): ...",
            ("two tasks are named a", "shop.py:3"),
        ),
        ("from prefork import Prefork\napp = Prefork('x')\nf = app.task(lambda: 1)", ("<lambda>", "name=")),
        ("from prefork import Prefork\napp = Prefork('x')\n@app.task(timeout=0)\ndef f(): ...", ("timeout=0",)),
    ],
)
def test_a_mistake_in_the_app(tmp_path: Path, source: str, parts: tuple[str, ...]) -> None:
    fails(run(tmp_path, "[prefork]\napp = shop:app\n", shop=source), EXIT_APP, *parts)


@pytest.mark.parametrize("flags", [(), ("--check",)])
def test_ctrl_c_while_the_app_is_imported(tmp_path: Path, flags: tuple[str, ...]) -> None:
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)"
    done = run(tmp_path, "[prefork]\napp = shop:app\n", *flags, shop=source)
    fails(done, EXIT_INTERRUPTED, "interrupted before it was up")


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    fails(run(tmp_path, "[prefork]\napp = sohp.tasks:app\n"), EXIT_APP, "no module sohp", str(tmp_path))


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://127.0.0.1:1/0", ("redis://127.0.0.1:1/0", "refuses the connection")),
        ("redis://:secret@127.0.0.1:1/0", ("redis://127.0.0.1:1/0", "refuses the connection")),
        ("redis://no.such.host.invalid/0", ("no.such.host.invalid", "host")),
        ("http://localhost", ("the scheme 'http'", "redis://")),
        ("localhost:6379", ("redis://",)),
        ("unix:///nowhere/redis.sock", ("/nowhere/redis.sock", "socket")),
        ("embedded:", ("embedded:",)),
    ],
)
def test_a_broker_that_cannot_be_used(tmp_path: Path, url: str, parts: tuple[str, ...]) -> None:
    done = run(tmp_path, f"[prefork]\napp = shop:app\nbroker = {url}\n", shop=APP.format(url="redis://x"))
    fails(done, EXIT_BROKER, *parts)
    assert "secret" not in done.stderr


def test_no_broker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFORK_BROKER", raising=False)
    source = 'from prefork import Prefork\napp = Prefork("shop")\n@app.task\ndef f(): ...\n'
    fails(run(tmp_path, "[prefork]\napp = shop:app\n", shop=source), EXIT_CONFIG, "PREFORK_BROKER")


def test_check_says_in_one_line_that_all_is_well(tmp_path: Path, server: Server) -> None:
    conf = f"[prefork]\napp = shop:app\nbroker = {server.url}\nqueues = mail, default\n"
    done = run(tmp_path, conf, "--check", shop=APP.format(url="redis://x"))
    assert done.returncode == 0
    assert re.fullmatch(
        r"ok: shop:app has 1 tasks, unix://\S+ is (valkey|redis) \S+, queues mail, default\n", done.stdout
    )


def test_check_says_which_queues_nobody_listens_to(tmp_path: Path, server: Server) -> None:
    conf = f"[prefork]\napp = shop:app\nbroker = {server.url}\n"
    done = run(tmp_path, conf, "--check", "-Q", "mail", shop=APP.format(url="redis://x"))
    assert "nobody here listens to default" in done.stdout


def test_burst_runs_what_is_there_and_ends(project: Project) -> None:
    results = project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(50))
    worker = project.worker("", "--burst", wait=False)
    assert worker.wait() == 0
    assert [result.wait(timeout=1) for result in results] == [n + 2 for n in range(50)]


def test_burst_ends_at_once_when_there_is_nothing(project: Project) -> None:
    assert project.worker("", "--burst", wait=False).wait() == 0


def test_what_an_import_leaves_behind_is_named(project: Project) -> None:
    project.add("threading.Thread(target=time.sleep, args=(600,), daemon=True, name='poller').start()")
    worker = project.worker()
    assert "thread 'poller'" in worker.log
    assert worker.stop() == 0


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefork.cli.worker", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"prefork \d+\.\d+\.\d+\n", done.stdout)
