"""The pidfile: one worker holds it, by a lock that ends with the process, however that ends.

So a stale one, which a killed worker has left, is simply taken; nobody has to guess whether a pid is still the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from prefork.errors import PidfileTaken, PidfileUnusable

LONGEST = 64  # bytes; what is longer is no pidfile
MOST_TRIES = 100
HANDED_ON = "PREFORK_PIDFILE"  # in the environment of a new version: pid and descriptor
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY
REMEDIES = {
    errno.ENOENT: "create the folder",
    **dict.fromkeys((errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS), "put it where files can be locked, such as /run"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk"),
}


def handed_on() -> int:
    """The descriptor of the pidfile that this process has held before it became this version; -1: none."""
    pid, _, fd = os.environ.pop(HANDED_ON, "").partition(":")
    return int(fd) if pid == str(os.getpid()) and fd.isdigit() else -1


class Pidfile:
    """A file with this process's pid, locked while it lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def hand_on(self) -> None:
        """Keep the lock over an exec: no other worker gets it in between."""
        os.set_inheritable(self._fd, True)
        os.environ[HANDED_ON] = f"{os.getpid()}:{self._fd}"

    def check(self) -> None:
        """Look whether it could be taken if nobody held it. Changes nothing. Raises PidfileUnusable."""
        try:
            self._fd = os.open(self._path, FLAGS)
        except FileNotFoundError as error:
            folder = os.path.dirname(os.path.realpath(self._path))
            if not os.path.isdir(folder):
                raise self._unusable(error) from None
            if not os.access(folder, os.W_OK | os.X_OK):
                raise self._unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES))) from None
        except OSError as error:
            raise self._unusable(error) from None
        else:
            self._is_one()
            self._close()

    def take(self, handed: int = -1) -> None:
        """Take it, or take it over from a worker that has died. Raises PidfileTaken, PidfileUnusable.

        `handed`: what `handed_on` has returned.
        """
        if not self._keep(handed) and not any(self._lock() for _ in range(MOST_TRIES)):
            raise PidfileUnusable(f"{self._path} is replaced again and again by somebody else; correct `pidfile`")
        self._is_one()
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            self._close()
            raise PidfileUnusable(f"{self._path} cannot be written ({error.strerror}); look at its disk") from None

    def _keep(self, handed: int) -> bool:
        """-> whether it is ours already"""
        if handed < 0:
            return False
        os.set_inheritable(handed, False)
        self._fd = handed
        return self._names_ours() or self._close()

    def _is_one(self) -> None:
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):  # it would be removed in the end, as root even /dev/null
            self._close()
            raise PidfileUnusable(f"{self._path} is no plain file; correct `pidfile`")
        if not _is_pid(content := os.pread(self._fd, LONGEST, 0)):
            self._close()
            raise PidfileUnusable(f"{self._path} holds {content[:20]!r}, not a pid; remove it, or correct `pidfile`")

    def _lock(self) -> bool:
        """-> False if the file was removed between its opening and the lock"""
        try:
            self._fd = os.open(self._path, FLAGS | os.O_CREAT, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = os.pread(self._fd, LONGEST, 0).strip()
            holder = content.decode() if content.isdigit() else "unknown"
            self._close()
            raise PidfileTaken(
                f"{self._path} is held by another worker, pid {holder}; stop that one, or name another `pidfile`"
            ) from None
        except OSError as error:
            self._close()
            raise self._unusable(error) from None
        return self._names_ours() or self._close()

    def _unusable(self, error: OSError) -> PidfileUnusable:
        remedy = REMEDIES.get(error.errno or 0, "let this user write there")
        return PidfileUnusable(f"{self._path} cannot be used ({error.strerror}); {remedy}, or correct `pidfile`")

    def _names_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:  # gone, or out of reach
            return False

    def release(self) -> None:
        """Remove it, if it is still this one. Where the user may not, an empty one is left. A link to it stays."""
        if self._fd >= 0 and self._names_ours():
            try:
                os.unlink(os.path.realpath(self._path))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)
        self._close()

    def abandon(self) -> None:
        """In a forked child: close its copy, so that the lock ends with the master."""
        self._close()

    def _close(self) -> bool:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        return False


def _is_pid(content: bytes) -> bool:
    return not content.strip() or (len(content) < LONGEST and content.strip().isdigit())
