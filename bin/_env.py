"""Makes the environment of a checkout, then starts the command that needed it. Run by `_env.sh`.

An environment counts as good when the file `ready` is in it, which is written last and removed before anything is
changed: an interrupted installation is done again. One process at a time installs, under a lock of the operating
system, which dies with its holder. All that is written is written inside the environment: pip gets its temporary
folder there, and no cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

LOCK_TIMEOUT = 600.0  # seconds that another installation may take before we give up
LOG_LINES = 30  # of pip's, shown when it fails
PIP_ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_LOG", "PYTHONPATH", "PYTHONHOME")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PRINT_BASE = "import sys; print(sys.base_prefix)"


class Made(NamedTuple):
    """What an environment was made from, as its file `ready` says."""

    key: str  # checksum and place of the project
    asked: str  # the interpreter that was asked for by PYTHON, or nothing
    extras: frozenset[str]


def main(env: Path, root: Path, key: str, asked: str, extras: frozenset[str]) -> None:
    env.mkdir(exist_ok=True)
    with open(env / "lock", "a") as lock:
        take(lock, env)
        made = read_ready(env, root)
        want = Made(key, asked or made.asked, extras | made.extras) if made else Made(key, asked, extras)
        if made is None or made[::2] != want[::2]:
            (env / "ready").unlink(missing_ok=True)
            names = ", ".join(sorted(extras))
            say(f"{'adding to' if made else 'making'} {env} (Python {VERSION}; {names}) ...")
            with writing_only_in(env):
                if made and made.key == key:  # only extras are missing: leave the project as it is, it may be running
                    install(env, root, lock, *requirements(root, extras))
                else:
                    if made is None:
                        create(env, lock)
                    install(env, root, lock, "--editable", f".[{','.join(sorted(want.extras))}]")
        write_ready(env, want)


def take(lock: IO[str], env: Path) -> None:
    give_up = time.monotonic() + LOCK_TIMEOUT
    waited = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                say(f"waiting for another process that installs into {env} ...")
            if time.monotonic() > give_up:
                die(f"{env} has been locked by another installation for {LOCK_TIMEOUT:.0f} s; stop it and try again")
            waited = True
            time.sleep(0.1)


def read_ready(env: Path, root: Path) -> Made | None:
    """What the environment was made from. None unless it is whole, where it was made, and of this Python."""
    try:
        key, version, asked, extras = (env / "ready").read_text().splitlines()
        base = subprocess.run([env / "bin" / "python", "-ISc", PRINT_BASE], capture_output=True, text=True).stdout
    except (OSError, ValueError):
        return None
    if version != VERSION or base.strip() != sys.base_prefix or not key.endswith(f" {root}"):
        return None
    return Made(key, asked, frozenset(extras.split()))


def write_ready(env: Path, made: Made) -> None:
    text = f"{made.key}\n{VERSION}\n{made.asked}\n{' '.join(sorted(made.extras))}\n"
    (env / "ready.new").write_text(text)
    os.replace(env / "ready.new", env / "ready")


def requirements(root: Path, extras: frozenset[str]) -> list[str]:
    with open(root / "pyproject.toml", "rb") as file:
        optional: dict[str, list[str]] = tomllib.load(file)["project"]["optional-dependencies"]
    return [requirement for extra in sorted(extras) for requirement in optional[extra]]


@contextlib.contextmanager
def writing_only_in(env: Path) -> Iterator[None]:
    """Sees to it that what is started meanwhile, pip and what it starts in turn, leaves nothing elsewhere."""
    before = dict(os.environ)
    temporary = env / "tmp"
    for name in PIP_ELSEWHERE:
        os.environ.pop(name, None)
    os.environ |= {"PIP_NO_CACHE_DIR": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    os.environ["TMPDIR"] = str(temporary)
    # To name itself to an index pip asks `rustc` for its version, and rustup's makes its folder when it has none.
    if not Path("~/.rustup").expanduser().exists():
        os.environ.setdefault("RUSTUP_HOME", str(temporary / "rustup"))
    try:
        yield
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)


def create(env: Path, lock: IO[str]) -> None:
    for entry in env.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()
    run(env, lock, sys.executable, "-I", "-m", "venv", str(env))


def install(env: Path, root: Path, lock: IO[str], *what: str) -> None:
    run(env, lock, str(env / "bin" / "python"), "-I", "-m", "pip", "install", *what, cwd=root)


def run(env: Path, lock: IO[str], *command: str, cwd: Path | None = None) -> None:
    (env / "tmp").mkdir(exist_ok=True)
    log = env / "install.log"
    with open(log, "ab") as output:
        start = output.tell()
        # In a group of its own, to be stopped with all that it has started; holding the lock, should it outlive us.
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
        try:
            process.wait()
        finally:
            kill_group(process)
    if process.returncode:
        for line in log.read_bytes()[start:].decode(errors="replace").splitlines()[-LOG_LINES:]:
            say(f"  {line}")
        die(f"the installation failed, see above; all of it is in {log}")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the group, and waits until it is gone: nothing is to write here after us."""
    give_up = time.monotonic() + 5.0
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < give_up:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.01)


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"prefork: {text}", file=sys.stderr, flush=True)


def die(text: str) -> NoReturn:
    say(text)
    raise SystemExit(1)


if __name__ == "__main__":
    _, env, root, key, asked, extras, command, *arguments = sys.argv
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(Path(env), Path(root), key, asked, frozenset(extras.split()))
    except OSError as error:
        die(f"cannot make {env}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execv(command, [command, *arguments])
