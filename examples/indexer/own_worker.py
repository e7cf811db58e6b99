"""A worker and an embedded broker for the time of one demo. In production a supervisor does this: see the docs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from prefork import TaskResult, WaitTimeout

HERE = Path(__file__).resolve().parent
VAR = HERE.parents[1] / "var" / "demo"
LONGEST_SOCKET = 100  # bytes of a unix socket's path; systems allow 104 or 108
GIVE_UP_S = 120  # on a result that does not come
STOP_S = 15  # for the worker to stop
LOG_LINES = 10  # of the worker's, shown when something is wrong

T = TypeVar("T")


class WorkerError(Exception):
    """The worker does not do its work; the end of its log is part of the message."""


class OwnWorker:
    """`prefork-worker -c indexer.conf`, with a broker in a folder of its own. See `own_worker`."""

    def __init__(self, folder: Path) -> None:
        log = folder / "worker.log"
        command: list[str | Path] = [Path(sys.executable).with_name("prefork-worker"), "-c", HERE / "indexer.conf"]
        with open(log, "wb") as output:
            self._log = open(log, errors="replace")  # noqa: SIM115 (read when all else is gone)
            self._process = subprocess.Popen(
                ["/bin/sh", HERE / "worker.sh", folder, *command],
                env={**os.environ, "PREFORK_BROKER": f"embedded:{folder}"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this process, which stops the worker in turn
            )

    def value_of(self, result: TaskResult[T]) -> T:
        """Wait for a result, for as long as there is a worker that could bring it."""
        for _ in range(GIVE_UP_S):
            with contextlib.suppress(WaitTimeout):
                return result.wait(timeout=1)
            if self._process.poll() is not None:
                raise WorkerError(self.last_words(f"the worker has ended with status {self._process.returncode}"))
        raise WorkerError(self.last_words(f"{result!r} does not come to an end"))

    def last_words(self, text: str) -> str:
        """A text, and the end of the worker's log."""
        return "\n  ".join([f"{text}; its log ends with", *self._log.read().splitlines()[-LOG_LINES:]])

    def stop(self) -> None:
        """Let the worker finish what it is at, but not for ever."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


@contextlib.contextmanager
def own_worker() -> Iterator[OwnWorker]:
    """A worker, and its broker as $PREFORK_BROKER; both are gone at the end, whatever the end is."""
    folder = private_folder()
    os.environ["PREFORK_BROKER"] = f"embedded:{folder}"
    worker = OwnWorker(folder)
    try:
        yield worker
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        worker.stop()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def private_folder() -> Path:
    """A new folder in the checkout or, where the path of a socket in there would be too long, among temporary files."""
    with contextlib.suppress(OSError):
        VAR.mkdir(parents=True, exist_ok=True)
    for parent, prefix in ((VAR, ""), (Path(tempfile.gettempdir()), "prefork-")):
        socket = parent / f"{prefix}12345678" / "valkey.sock"
        if len(os.fsencode(socket)) < LONGEST_SOCKET and os.access(parent, os.W_OK):
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    return Path(tempfile.mkdtemp(prefix="prefork-", dir="/tmp"))
