"""An app that cannot be used: where in its own code, what is wrong, the remedy; exit code 70."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.broker.wires import free_port
from tests.conftest import until
from tests.wrong import LIMIT_S, begin, end, run, the_line

EXIT_APP = 70
HEAD = "from prefork import Prefork\napp = Prefork('shop')\n"  # two lines
TASK = "@app.task\ndef add(a, b): return a + b\n"

IMPORTS = {
    "raises": ("raise ValueError('of the app')", ("ValueError: of the app", "shop.py:1")),
    "raises far away": ("import helper", ("ZeroDivisionError: division by zero", "helper.py:1")),
    "raises nothing but a name": ("raise KeyError", ("KeyError", "shop.py:1")),
    "raises many lines": ("raise ValueError('first\\nsecond')", ("ValueError: first", "shop.py:1")),
    "raises very much": ("raise ValueError('x' * 100_000)", ("ValueError: xxx", "shop.py:1")),
    "raises what a terminal obeys": ("raise ValueError('\\x1b[31mred\\x07')", ("ValueError: ", "red", "shop.py:1")),
    "raises a lone surrogate": ("raise ValueError('\\ud800')", ("ValueError: ", "shop.py:1")),
    "raises what cannot be said": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute", ("Mute", "shop.py:3"),
    ),
    "raises no Exception": ("class Rude(BaseException): pass\nraise Rude('no')", ("Rude: no", "shop.py:2")),
    "calls itself without end": ("def f(): f()\nf()", ("RecursionError", "shop.py:1")),
    "exits": ("import sys\nsys.exit(3)", ("it calls sys.exit(3)", "shop.py:2")),
    "exits with 0": ("import sys\nsys.exit()", ("it calls sys.exit(None)", "shop.py:2")),
    "exits with a text": ("import sys\nsys.exit('no\\nsettings')", ("it calls sys.exit(", "shop.py:2")),
    "exits elsewhere": ("import argparse\nargparse.ArgumentParser().exit(2)", ("sys.exit(2)", "shop.py:2")),
    "has a syntax error": ("def broken(:", ("SyntaxError", "shop.py:1")),
    "has tabs and spaces": ("if 1:\n\tx = 1\n        y = 2", ("TabError", "shop.py:3")),
    "is not UTF-8": ("# -*- coding: ascii -*-\nx = 'é'", ("SyntaxError", "shop.py")),
    "has null bytes": ("x = 1\0", ("null bytes",)),
    "misses a package": ("import nowhere.at.all", ("No module named 'nowhere'", "shop.py:1")),
    "misses a name": ("from os import nowhere", ("cannot import name 'nowhere'", "shop.py:1")),
    "imports itself": ("import helper2", ("partially initialized module 'shop'", "helper2.py:1")),
}  # fmt: skip
HELPERS = {"helper": "1 / 0", "helper2": "from shop import app"}

TASKS = {
    "two of one name": (TASK + TASK, "two tasks are named shop.add: one at ", "shop.py:3; give one of them name="),
    "two of one given name": (
        "@app.task(name='a')\ndef f(): ...\n@app.task(name='a')\ndef g(): ...\n",
        "two tasks are named a: one at ", "shop.py:3; give one of them name=",
    ),
    "a lambda": ("f = app.task(lambda: 1)", "'<lambda>' is made inside a function", "give it name="),
    "a closure": (
        "def make():\n    def inner(): ...\n    return app.task(inner)\nf = make()",
        "'make.<locals>.inner' is made inside a function", "move it to the module's top level, or give it name=",
    ),
    "a partial": ("import functools\nf = app.task(functools.partial(print, 1))", "functools.partial", "give it name="),
    "no function": ("f = app.task(3)", "3 is not a function", "write @app.task or @app.task(...)"),
    "an unknown option": ("@app.task(max_retry=3)\ndef f(): ...", "max_retry=", "did you mean max_retries=?"),
    "a bad option": ("@app.task(timeout=0)\ndef f(): ...", "timeout=0: ", "give seconds or a timedelta"),
    "an empty queue name": ("@app.task(queue_name='')\ndef f(): ...", "queue_name='': ", "1 to 100 characters"),
    "no place for its context": ("@app.task(takes_context=True)\ndef f(): ...", "shop.f", "no first parameter"),
    "a hook that is async": ("@app.on_child_start\nasync def f(): ...", "on_child_start", "a plain function"),
}  # fmt: skip

NOT_AN_APP = {
    "nothing": ("other = 1", "shop:app", ("has no 'app'", "it has no Prefork at all")),
    "another name": ("from prefork import Prefork\ncelery = Prefork('x')", "shop:app", ("did you mean shop:celery?",)),
    "None": ("app = None", "shop:app", ("is a NoneType, not a Prefork",)),
    "a number": ("app = 7", "shop:app", ("is a int, not a Prefork", "app = Prefork(...)")),
    "the class": ("from prefork import Prefork as app", "shop:app", ("not a Prefork", "app = Prefork(...)")),
    "a function": ("def app(): ...", "shop:app", ("is a function, not a Prefork",)),
    "a module's refusal": (
        "def __getattr__(name): raise OSError(name)", "shop:app", ("OSError: app", "shop.py:1"),
    ),
    "no tasks": (HEAD, "shop:app", ("shop:app has no tasks", "@app.task", "import their modules in shop")),
    "a module of Python's": ("", "json:app", ("has no 'app'", "/json/__init__.py")),
    "no module": ("", "sohp.tasks:app", ("there is no module sohp.tasks", "(see `directory`)")),
    "no submodule": ("", "package.tasks:app", ("there is no module package.tasks", "(see `directory`)")),
    "a submodule of a module": (
        "", "shop.tasks:app", ("shop.tasks: shop (", "/shop.py) is not a package; correct `app`"),
    ),
}  # fmt: skip


def refused(folder: Path, source: str, app: str = "shop:app", *flags: str) -> str:
    """The line that says why the app of this source cannot be used."""
    (folder / "shop.py").write_text(source)
    (folder / "shop.conf").write_text(f"[prefork]\napp = {app}\nbroker = redis://127.0.0.1:{free_port()}/0\n")
    line = the_line(run(folder, "-c", "shop.conf", *flags), EXIT_APP)
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("name", IMPORTS)
def test_a_module_that_cannot_be_imported(tmp_path: Path, name: str) -> None:
    for helper, source in HELPERS.items():
        (tmp_path / f"{helper}.py").write_text(source)
    source, parts = IMPORTS[name]
    line = refused(tmp_path, source)
    assert line.startswith("cannot import shop: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_cannot_be(tmp_path: Path, name: str) -> None:
    source, what, remedy = TASKS[name]
    line = refused(tmp_path, HEAD + source)
    assert line.startswith("cannot import shop: ")
    assert f"({tmp_path}/shop.py:" in line
    assert what in line
    assert remedy in line


@pytest.mark.parametrize("name", NOT_AN_APP)
def test_a_name_that_is_no_app(tmp_path: Path, name: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    source, app, parts = NOT_AN_APP[name]
    line = refused(tmp_path, source, app)
    for part in parts:
        assert part in line


def test_a_broker_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(f"from prefork import Prefork\napp = Prefork('shop', broker=6379)\n{TASK}")
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    the_line(run(tmp_path, "-c", "shop.conf"), EXIT_APP, "broker=6379", "redis://", "shop.py:2")


@pytest.mark.parametrize("source", [IMPORTS["exits"][0], HEAD + TASK * 2, HEAD], ids=["exits", "twice", "no task"])
def test_check_says_the_same(tmp_path: Path, source: str) -> None:
    assert refused(tmp_path, source, "shop:app", "--check") == refused(tmp_path, source)


def test_the_operators_command_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("raise ValueError('of the app')")
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    said = run(tmp_path, "queues", "-c", "shop.conf", program="prefork")
    the_line(said, EXIT_APP, "cannot import shop: ValueError: of the app", "shop.py:1", program="prefork")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda number: number.name)
def test_an_import_that_never_ends_can_be_stopped(tmp_path: Path, number: int) -> None:
    (tmp_path / "shop.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(600)\n")
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    process = begin(tmp_path, "-c", "shop.conf")
    until((tmp_path / "begun").exists)
    begun = time.monotonic()
    process.send_signal(number)
    said = end(process)
    assert "Traceback" not in said.err
    assert said.code != 1
    assert time.monotonic() - begun < LIMIT_S
