"""The status socket: who connects is told what the worker does, as one JSON object. For `--ping` and `--ready`.

Whoever gets an answer knows that the master's loop turns; nobody has to be asked for it but the master itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pwd
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("prefork")
LONGEST_PATH = 103  # bytes, on macOS; 107 on Linux


class EventLoop(Protocol):
    """What the socket needs of the loop that it lives on."""

    def on_read(self, fd: int, callback: Callable[[], None]) -> None:
        """Call whenever there is something to read."""


def path_of(conf: Path, pidfile: Path | None, pid: int, user: str | None = None) -> Path:
    """Where a worker's socket is: beside its pidfile, or in a folder of its user, by configuration and pid."""
    if pidfile:
        return pidfile.with_name(pidfile.name + ".sock")
    name = hashlib.sha256(os.fsencode(conf.absolute())).hexdigest()[:16]
    return own_folder(user) / f"{name}-{pid}.sock"


def own_folder(user: str | None = None) -> Path:
    """Where the sockets of a user's workers without a pidfile are; None: this user."""
    uid = pwd.getpwnam(user.partition(":")[0]).pw_uid if user else os.geteuid()
    # Not what `tempfile` finds: that is another one when a disk is full, and then nobody finds who runs.
    return Path(os.environ.get("TMPDIR") or "/tmp").absolute() / f"prefork-{uid}"


def sockets(conf: Path, pidfile: Path | None, user: str | None = None) -> list[Path]:
    """The sockets of all workers of a configuration."""
    if pidfile:
        return [path_of(conf, pidfile, 0)]
    pattern = path_of(conf, None, 0, user)
    return sorted(pattern.parent.glob(pattern.name.replace("-0.sock", "-*.sock")))


def ask(path: Path, limit_s: float) -> dict[str, Any]:
    """What the worker says. Raises ConnectionRefusedError, FileNotFoundError: there is none; TimeoutError: it hangs."""
    give_up_s = time.monotonic() + limit_s
    said = b""
    with socket.socket(socket.AF_UNIX) as it:
        it.settimeout(limit_s)
        it.connect(str(path))
        while True:
            it.settimeout(max(0.001, give_up_s - time.monotonic()))
            if not (part := it.recv(1 << 16)):
                break
            said += part
    try:
        told: dict[str, Any] = json.loads(said)
    except ValueError:
        raise ConnectionRefusedError("it ended in the middle of its answer") from None
    return told


class StatusSocket:
    """The master's side."""

    def __init__(self, loop: EventLoop, path: Path, describe: Callable[[], bytes]) -> None:
        self._loop, self._path, self._describe = loop, path, describe
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Listen. A worker whose socket can't be made works all the same, and says why it can't be asked."""
        try:
            if len(os.fsencode(self._path)) > LONGEST_PATH:
                raise OSError(f"its path has more than {LONGEST_PATH} bytes")
            if self._path.parent == own_folder():
                _make_private(self._path.parent)
            self._path.unlink(missing_ok=True)
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(str(self._path))
            self._path.chmod(0o600)
            self._socket.listen(16)
        except OSError as error:
            self.close()
            log.warning("no status socket at %s (%s): --ping and --ready will not find this worker", self._path, error)
            return
        self._socket.setblocking(False)
        self._loop.on_read(self._socket.fileno(), self._answer)

    def _answer(self) -> None:
        assert self._socket
        with contextlib.suppress(OSError):  # who asked has gone
            asker, _ = self._socket.accept()
            with asker:
                asker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                asker.setblocking(False)
                asker.send(self._describe())

    def close(self) -> None:
        """Answer no more."""
        if self._socket:
            self._socket.close()
            self._socket = None
            self._path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """In a forked child: close its copy."""
        if self._socket:
            self._socket.close()


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    is_ours = folder.lstat()
    if not stat.S_ISDIR(is_ours.st_mode) or is_ours.st_uid != os.geteuid() or is_ours.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to somebody else, or others may write into it")
