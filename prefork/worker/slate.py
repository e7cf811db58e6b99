"""What a child and the master share beside the pipes: a file without a name that outlives the child.

    bytes 0 to 7  the number of the order that the child shall stop, little-endian; 0: none
    from 8 on     Python stacks, which `faulthandler` writes: when the master asks for one, and when the child crashes

`faulthandler` works in the signal's own context, so that it tells of a child that is stuck in C, or holds the GIL.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import struct
import tempfile

NUMBER = struct.Struct("<Q")
# Both are ignored by a process that does not expect them, such as a child that has not come so far.
STACK_SIGNAL, STOP_SIGNAL = signal.SIGURG, signal.SIGWINCH
OUT_OF_THE_WAY = 200  # a task that closes all descriptors it knows, and opens others, is not to write here
LONGEST = 16_384
OWN_FRAME = f'File "{os.path.dirname(__file__)}{os.sep}'


class Slate:
    """One child's file. Both sides have it open, with one position, which is where the next stack goes."""

    def __init__(self) -> None:
        fd = _nameless()
        try:
            self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
        finally:
            os.close(fd)
        self.wipe()

    def wipe(self) -> None:
        """Begin anew, so that what is read next was written after now."""
        os.ftruncate(self._fd, NUMBER.size)
        os.lseek(self._fd, NUMBER.size, os.SEEK_SET)

    def stop(self, number: int) -> None:
        """The master's word: this order shall stop."""
        os.pwrite(self._fd, NUMBER.pack(number), 0)

    def to_stop(self) -> int:
        """In the child: which order shall stop; 0 for none."""
        try:
            (number,) = NUMBER.unpack(os.pread(self._fd, NUMBER.size, 0))
        except (OSError, struct.error):  # the task has closed it
            return 0
        return int(number)

    def listen(self) -> None:
        """In the child: write its stacks here from now on."""
        faulthandler.enable(self._fd)
        faulthandler.register(STACK_SIGNAL, self._fd)

    def stack(self) -> str:
        """What was written: the stacks of all threads, innermost frame first; "" if nothing."""
        text = os.pread(self._fd, 1 << 20, NUMBER.size).decode("utf-8", "backslashreplace")
        parts = text.rstrip().split("\n\n")  # by thread
        return "\n\n".join("\n".join(_without_own(part.splitlines())) for part in parts).strip()[:LONGEST]

    def close(self) -> None:
        """Close this process's copy."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _without_own(lines: list[str]) -> list[str]:
    """Without the frames at the end that are the child's own."""
    while lines and OWN_FRAME in lines[-1]:
        lines.pop()
    at = next((n for n, line in enumerate(lines) if OWN_FRAME in line), len(lines))
    return lines[:at]


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("prefork", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
