"""A configuration that cannot be used: file and line, what is wrong, the remedy; exit code 78."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork.config import KEYS
from tests.wrong import LIMIT_S, Said, run, the_line

EXIT_CONFIG = 78
HEAD = "[prefork]\napp = shop:app\n"  # two lines

FILES = {
    "empty": ("", "shop.conf: ", "put [prefork] on a line above the settings"),
    "no section": ("app = shop:app\n", "shop.conf:1: ", "put [prefork] above it"),
    "another section": ("[celery]\napp = shop\n", "shop.conf: ", "put [prefork] on a line above the settings"),
    "misspelt section": ("[perfork]\napp = shop:app\n", "shop.conf:1: ", "did you mean it by '[perfork]'?"),
    "two sections": (HEAD + "[prefork]\n", "shop.conf:3: ", "merge them"),
    "json": ('{"app": "shop:app"}\n', "shop.conf:1: ", "put [prefork] above it"),
    "yaml": ("[prefork]\napp: shop:app\n", "shop.conf:2: ", "write it so, with '='"),
    "python": (HEAD + "import os\n", "shop.conf:3: ", "write it so, with '='"),
    "bytes": (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "shop.conf:1: ", "save the file as UTF-8"),
    "latin 1": (HEAD.encode() + b"# caf\xe9\n", "shop.conf:3: ", "save the file as UTF-8"),
    "utf 16": ((HEAD + "\n").encode("utf-16"), "shop.conf:1: ", "save the file as UTF-8"),
    "control character": (HEAD + "prefix = a\x1b[31mb\n", "shop.conf:3: prefix: ", "which cannot be seen; remove it"),
    "no app": ("[prefork]\n", "shop.conf: ", "app = shop.tasks:app"),
    "unknown key": (HEAD + "concurency = 3\n", "shop.conf:3: ", "did you mean 'concurrency'?"),
    "key of another case": (HEAD + "Queues = mail\n", "shop.conf:3: ", "did you mean 'queues'?"),
    "unlike any key": (HEAD + "zzz = 3\n", "shop.conf:3: ", "the keys are app, broker, "),
    "duplicate key": (HEAD + "\napp = shop:app\n", "shop.conf:4: ", "set on line 2 already; remove one"),
    "no value": (HEAD + "broker =\n", "shop.conf:3: broker: ", "give it one or leave the key out"),
    "indented key": (HEAD + "  lease = 3\n", "shop.conf:3: ", "remove the spaces before a key"),
    "bad app": ("[prefork]\napp = shop.py\n", "shop.conf:2: app: ", "as in shop.tasks:app"),
    "empty queue name": (HEAD + "queues = mail, , low\n", "shop.conf:3: queues: ", "remove the comma too many"),
    "only a comma": (HEAD + "queues = ,\n", "shop.conf:3: queues: ", "remove the comma too many"),
    "nameless weight": (HEAD + "queues = :3\n", "shop.conf:3: queues: ", "is not a queue name (1 to 100 characters"),
    "queue name with a space": (HEAD + "queues = a b\n", "shop.conf:3: queues: ", "is not a queue name"),
    "queue twice": (HEAD + "queues = a, a\n", "shop.conf:3: queues: ", "remove one"),
    "queue without weight": (HEAD + "queues = a:2, b\n", "shop.conf:3: queues: ", "give all of them one"),
    "queue of weight 0": (HEAD + "queues = a:0\n", "shop.conf:3: queues: ", "a whole number from 1 to 1000"),
    "unknown level": (HEAD + "log_level = loud\n", "shop.conf:3: log_level: ", "must be one of debug, "),
    "unknown format": (HEAD + "log_format = xml\n", "shop.conf:3: log_format: ", "must be one of text, json"),
    "bad prefix": (HEAD + "prefix = {a}\n", "shop.conf:3: prefix: ", "without whitespace, '{' or '}'"),
    "no such folder": (HEAD + "directory = nowhere\n", "shop.conf:3: directory: ", "create it or correct the path"),
    "variable not set": (HEAD + "broker = %(ENV_NOWHERE)s\n", "shop.conf:3: broker: ", "no 'NOWHERE'; set it"),
    "no such user": (HEAD + "user = nobody-of-that-name\n", "shop.conf:3: user: ", "there is no user"),
}
# Of each key that is a number: what can't be read, is negative, zero, or huge.
TIMES = {
    "shutdown_timeout": ("-1", "2d", "9" * 13, "soon"),
    "timeout": ("-5", "0", "366d", "9" * 400, "5 min", "nan"),
    "lease": ("-1s", "0", "61m", "1e9", "long"),
    "dead_ttl": ("-180d", "0", "3651d", "for ever"),
}
COUNTS = {
    "concurrency": ("-1", "0", "1001", "9" * 5000, "four", "1.5"),
    "max_tasks_per_child": ("-1", "0", "1000000001", "1e3"),
    "max_crashes": ("-3", "0", "9" * 20, "three"),
    "max_takeovers": ("-1", "0", "1000000001", "never"),
    "dead_max": ("-1", "1000000001", "0x10"),
}
SIZES = {
    "max_memory_per_child": ("-1", "0", "1kb", "9" * 20, "9999999999GB", "big", "20%"),
    "max_memory": ("-2GB", "0", "100", "9" * 13, "80%", "all"),
}


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "shop.conf"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    content, where, remedy = FILES[name]
    path = written(tmp_path, content)
    line = the_line(run(tmp_path, "-c", str(path)), EXIT_CONFIG, remedy)
    assert line.startswith(f"{tmp_path}/{where}")


@pytest.mark.parametrize(("key", "raw"), [(key, raw) for key, raws in (TIMES | COUNTS | SIZES).items() for raw in raws],
                         ids=lambda it: it[:20])  # fmt: skip
def test_a_number_that_cannot_be(tmp_path: Path, key: str, raw: str) -> None:
    path = written(tmp_path, HEAD + f"\n{key} = {raw}\n")
    kind = "a time in seconds" if key in TIMES else "a size from" if key in SIZES else "a whole number from"
    line = the_line(run(tmp_path, "-c", str(path)), EXIT_CONFIG, f"must be {kind}", f"not '{raw[:59]}")
    assert line.startswith(f"{path}:4: {key}: ")
    assert len(line) < 400


def test_no_key_that_is_a_number_is_left_out_here() -> None:
    words = {"app", "broker", "queues", "log_level", "log_format", "prefix", "directory", "pidfile", "user"}
    words |= {"broker_password_file", "durability", "signing_keys", "signing_keys_file"}
    assert set(KEYS) - words == set(TIMES | COUNTS | SIZES)


@pytest.mark.parametrize(
    ("flags", "where", "part"),
    [
        (("-n", "0"), "--concurrency: ", "a whole number from 1 to 1000"),
        (("-n", "many"), "--concurrency: ", "not 'many'"),
        (("-n", ""), "--concurrency: ", "has no value"),
        (("-Q", "mail,"), "--queues: ", "remove the comma too many"),
        (("-Q", ""), "--queues: ", "has no value"),
        (("--log-level", "loud"), "--log-level: ", "must be one of debug, "),
    ],
)
def test_a_flag_that_cannot_be(tmp_path: Path, flags: tuple[str, ...], where: str, part: str) -> None:
    path = written(tmp_path, HEAD)
    assert the_line(run(tmp_path, "-c", str(path), *flags), EXIT_CONFIG, part).startswith(where)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("none.conf", "none.conf: there is no such file; create it or correct the path"),
        (".", "this is a folder; name the file in it"),
        ("shop.conf/shop.conf", "cannot be read (Not a directory)"),
        ("n" * 300, "cannot be read (File name too long)"),
        ("/dev/null", "/dev/null: there is no section [prefork]"),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, path: str, part: str) -> None:
    written(tmp_path, HEAD)
    the_line(run(tmp_path, "-c", path), EXIT_CONFIG, part)


@pytest.mark.parametrize("way", ["--check", "--burst", "--ping", "--ready"])
def test_a_mistake_is_told_whatever_is_asked_for(tmp_path: Path, way: str) -> None:
    the_line(run(tmp_path, "-c", "none.conf", way), EXIT_CONFIG, "none.conf: there is no such file")


@pytest.mark.parametrize("name", ["not there", "no section", "unknown key", "duplicate key", "empty queue name"])
def test_the_operators_command_says_the_same(tmp_path: Path, name: str) -> None:
    content, where, remedy = FILES.get(name, ("", "shop.conf: ", "there is no such file"))
    if content:
        written(tmp_path, content)
    said = run(tmp_path, "queues", "-c", str(tmp_path / "shop.conf"), program="prefork")
    assert the_line(said, EXIT_CONFIG, remedy, program="prefork").startswith(f"{tmp_path}/{where}")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into."""
    folder = Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


AS_NOBODY = """
import contextlib, io, os, sys
from prefork.cli.worker import main
with contextlib.redirect_stderr(io.StringIO()):
    main(["-c", "/none.conf"])  # imports what nobody may not read, perhaps
os.setgroups([])
os.setgid({gid})
os.setuid({uid})
sys.exit(main(["-c", {path!r}]))
"""


def test_a_file_that_this_user_may_not_read(open_folder: Path) -> None:
    path = written(open_folder, HEAD)
    path.chmod(0)
    if os.geteuid():
        said = run(open_folder, "-c", str(path))
    else:  # whom no mode keeps out
        nobody = pwd.getpwnam("nobody")
        code = AS_NOBODY.format(gid=nobody.pw_gid, uid=nobody.pw_uid, path=str(path))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=open_folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        said = Said(done.returncode, done.stdout, done.stderr)
    line = the_line(said, EXIT_CONFIG)
    assert line == f"{path}: cannot be read (Permission denied); give this user the right to"
