"""HUP: the new configuration and code are tried in a fresh interpreter; if they are good, the master becomes them.

1. Start this very command with `--check`, as a process of its own, while the work goes on.
2. If that fails, say what it said, and go on as before.
3. Else drain, as for TERM, and exec: same pid, same flags, new everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from prefork.errors import ConfigError
from prefork.worker.loop import Loop, Timer
from prefork.worker.pool import Pool

log = logging.getLogger("prefork")
CHECK_LIMIT_S = 60.0
LONGEST_OUTPUT = 1 << 16
ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
# Those that mean something to a worker that is up, and would end one that is not yet.
LATER = {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU}


class Origin(NamedTuple):
    """How the process was started, so that its new version is started alike, whatever the app has changed since."""

    folder: str
    environment: dict[str, str]

    def restore(self) -> None:
        """Go back to it."""
        with contextlib.suppress(OSError):  # gone meanwhile: the new version can still say in one line what it misses
            os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)


def starting_folder() -> str:
    """The current folder, by the name under which the process was started in it: it may be a link that moves."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise ConfigError(".", None, "the current folder is gone; start it from one that is there") from None
    named = os.environ.get("PWD", "")
    try:
        return named if os.path.isabs(named) and os.path.samefile(named, here) else here
    except OSError:
        return here


class Reload:
    """The new version's trial. `approved` is called when it is good."""

    def __init__(self, loop: Loop, pool: Pool, origin: Origin, approved: Callable[[], None]) -> None:
        self._loop, self._pool, self._origin, self._approved = loop, pool, origin, approved
        self._pid = 0
        self._again = False
        self._output = bytearray()
        self._read_end = -1
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Try the new version; one that came while another was tried is tried after it."""
        if self._pid:
            self._again = True
            return
        log.info("HUP: checking the new configuration and code")
        try:
            self._pid = self._start()
        except OSError as error:
            log.error("cannot check the new version (%s); going on with the old one", error)
            return
        self._pool.strangers[self._pid] = self._ended
        self._loop.on_read(self._read_end, self._read)
        self._timer = self._loop.call_later(CHECK_LIMIT_S, self._too_long)

    def _start(self) -> int:
        self._read_end, write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._output.clear()
        try:
            with _stays():
                os.chdir(self._origin.folder)
                return os.posix_spawn(
                    sys.executable, [*command(), "--check"], self._origin.environment, setsigmask=(),
                    setsigdef=LATER,
                    file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                                  (os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_DUP2, write_end, 2)],
                )  # fmt: skip
        except OSError:
            os.close(self._read_end)
            raise
        finally:
            os.close(write_end)

    def _read(self) -> None:
        try:
            data = os.read(self._read_end, 1 << 16)
        except BlockingIOError:
            return
        self._output += data[: max(0, LONGEST_OUTPUT - len(self._output))]
        if not data:
            self._loop.forget(self._read_end)

    def _too_long(self) -> None:
        self._output += f"the check was not done after {CHECK_LIMIT_S:g} s".encode()
        os.kill(self._pid, signal.SIGKILL)

    def _ended(self, status: int) -> None:
        self._read()
        self._close()
        code = os.waitstatus_to_exitcode(status)
        if self._again:
            self._again = False
            self.begin()
        elif code == 0:
            self._approved()
        else:
            said = self._output.decode("utf-8", "replace").strip().removeprefix("prefork-worker: ")
            log.error("the new version is not used, the old one goes on: %s", said or f"its check ended with {code}")

    def _close(self) -> None:
        self._loop.forget(self._read_end)
        os.close(self._read_end)
        self._pid = 0
        if self._timer:
            self._timer.cancel()

    def give_up(self) -> None:
        """The worker stops; nothing is to be tried any more."""
        if self._pid:
            self._pool.strangers.pop(self._pid, None)
            os.kill(self._pid, signal.SIGKILL)
            self._close()

    def abandon(self) -> None:
        """In a forked child: close its copy of the pipe."""
        if self._pid:
            os.close(self._read_end)


@contextlib.contextmanager
def _stays() -> Iterator[None]:
    """Come back to the current folder, which has no name any more if it was removed."""
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def command() -> list[str]:
    """The command that this process was started by."""
    return [sys.executable, *sys.orig_argv[1:]]


def become_anew() -> NoReturn:
    """Replace this process by the new version of itself."""
    hold_signals()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(), os.environ)


def hold_signals() -> None:
    """Let the signals that only a worker that is up can act on wait until it is, over an exec too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, LATER)


def release_signals() -> None:
    """Take what has waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)


def end_by_default() -> None:
    """Let a signal to end do what it does to every process, as it will until the new version is up."""
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
