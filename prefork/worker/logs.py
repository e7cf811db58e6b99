"""The worker's log: one formatter for master, children, tasks and what they print; text or JSON lines."""

from __future__ import annotations

import io
import logging
import os
import select
import stat
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

log = logging.getLogger("prefork")
# What a terminal would take for a command, but newline and tab.
ESCAPED = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
LONGEST_REST = 4096  # writes without a newline that are kept before they are logged as they are
PATIENCE_S = 0.1  # of the master


class Handler(logging.Handler):
    """Writes each record as one line to a descriptor of its own, which no task closes by mistake.

    `task`, `task_id`: what this child is running now; empty in the master. A child waits for a reader that does not
    keep up. The master has children to look after, and a lease: it leaves out lines for which a pipe has no room, and
    says how many when there is room again. `is_behind`: it has something to say still, for which `flush` asks again.
    """

    task = ""
    task_id = ""

    def __init__(self, fd: int, form: str) -> None:
        super().__init__()
        self._fd, self._json = os.dup(fd), form == "json"
        self._waits = stat.S_ISREG(os.fstat(self._fd).st_mode)  # for a disk one can't but wait
        self._own_fd = -1 if self._waits else _that_never_waits(self._fd)
        self._poll, self._is_late = select.poll(), False
        self._poll.register(self._fd, select.POLLOUT)
        self._rest, self._missing = b"", 0  # of the line before; how many lines after it
        self.is_behind = False

    def begin_to_wait(self) -> None:
        """In a child: from now on for whoever reads this, however long; as what prints to a pipe expects."""
        if self._own_fd >= 0:
            os.close(self._own_fd)
        self._waits, self._own_fd, self._rest, self._missing, self.is_behind = True, -1, b"", 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. A log that can't be written must not end a task."""
        try:
            data = self._encoded(record)
            if not self._waits:
                self._say(data)
                return
            while data:
                data = data[os.write(self._fd, data) :]
        except Exception:
            return

    def flush(self) -> None:
        """Write what there was no room for, as far as there is now."""
        self.acquire()
        try:
            if self.is_behind:
                self.is_behind = not self._catch_up()
        finally:
            self.release()

    def _say(self, data: bytes) -> None:
        if self._catch_up():
            self._rest = data
            self._write_rest()
        else:
            self._missing += 1
        self.is_behind = bool(self._rest or self._missing)

    def _catch_up(self) -> bool:
        """-> whether all is said that was to be said before"""
        if self._write_rest() and self._missing:
            told = f"lines missing here, for which the log had no room: {self._missing}"
            self._rest = self._encoded(logging.LogRecord("prefork", logging.WARNING, "", 0, told, None, None))
            self._missing = 0
        return self._write_rest()

    def _write_rest(self) -> bool:
        """-> whether all is written"""
        # A pipe that has any room has room for so much, unless others who write to it are faster.
        fd, most = (self._fd, select.PIPE_BUF) if self._own_fd < 0 else (self._own_fd, None)
        while self._rest:
            room = self._poll.poll(0 if self._is_late else PATIENCE_S * 1000)
            try:
                written = os.write(fd, self._rest[:most]) if room else 0
            except ConnectionError:
                written = len(self._rest)  # nobody will ever read it
            except OSError:
                written = 0
            self._is_late = not written
            if self._is_late:
                return False
            self._rest = self._rest[written:]
        return True

    def _encoded(self, record: logging.LogRecord) -> bytes:
        line = self._as_json(record) if self._json else self._as_text(record)
        return line.encode("utf-8", "backslashreplace") + b"\n"

    def _as_text(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S")
        who = f" {self.task} {self.task_id}" if self.task else ""
        name = "" if record.name in ("prefork", "prefork.print") else f" {record.name}"
        text = f"{at}.{int(record.msecs):03d} {record.levelname:<7} [{record.process}{who}]{name} {_message(record)}"
        return (text + (f"\n{self._trace(record)}" if record.exc_info else "")).translate(ESCAPED)

    def _as_json(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": _carried(_message(record)),
        }
        if self.task:
            line |= {"task": self.task, "id": self.task_id}
        if record.exc_info:
            line["traceback"] = _carried(self._trace(record))
        return orjson.dumps(line).decode()

    def _trace(self, record: logging.LogRecord) -> str:
        return logging.Formatter().formatException(record.exc_info) if record.exc_info else ""


def _that_never_waits(fd: int) -> int:
    """The same pipe or terminal opened once more, since others wait on what they share; -1 where that can't be had."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # a socket; another system; a pipe of the user who has started this one
        return -1


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit, or cannot be printed
        return f"{record.msg!s:.1000} (its arguments do not fit: {len(record.args or ())} of them)"


def _carried(text: str) -> str:
    """Without lone surrogates, which JSON cannot carry."""
    return text.encode("utf-8", "replace").decode()


class Printed(io.TextIOBase):
    """Stands for `sys.stdout` and `sys.stderr` in a child: what a task prints becomes lines of the log."""

    encoding, errors, mode, line_buffering = "utf-8", "backslashreplace", "w", True

    def __init__(self, level: int, descriptor: int, handler: Handler) -> None:
        self._level, self._descriptor, self._handler = level, descriptor, handler
        self.name = "<stdout>" if descriptor == 1 else "<stderr>"
        self._rests: dict[int, list[str]] = {}  # by thread
        self._lent = False  # the stream beneath, to somebody who may write to it at any time

    def write(self, text: str) -> int:
        """Log the lines that are complete; keep the rest, for each thread its own."""
        rest = self._rests.setdefault(threading.get_ident(), [])
        if "\n" not in text and len(rest) < LONGEST_REST:
            rest.append(text)
            return len(text)
        *lines, left = ("".join(rest) + text).split("\n")
        rest[:] = [left] if lines else []
        for line in lines or [left]:
            self._log(line)
        return len(text)

    def _log(self, line: str) -> None:
        """Straight to the worker's log: a handler of the task's own may write to this very stream."""
        if line.strip() and self._level >= logging.getLogger("prefork").getEffectiveLevel():
            self._handler.handle(logging.LogRecord("prefork.print", self._level, "", 0, line, None, None))

    def finish(self) -> None:
        """Log what was printed without a newline at its end."""
        if self._rests:
            for rest in list(self._rests.values()):  # threads that were left behind may still print
                self._log("".join(rest))
            self._rests.clear()
        if self._lent:
            self.flush()

    def flush(self) -> None:
        """Lines are written as they are completed; what was written as bytes waits in the stream beneath."""
        try:
            self.buffer.flush()
        except (OSError, ValueError, AttributeError):  # a task may have closed it
            return

    def writable(self) -> bool:
        """As for a file."""
        return True

    def close(self) -> None:
        """Stays open, for the tasks that follow."""

    def reconfigure(self, **_: object) -> None:
        """As for a file; it stays as it is."""

    def fileno(self) -> int:
        """The descriptor beneath, for subprocesses: what they print goes to the log as it is."""
        return self._descriptor

    @property
    def buffer(self) -> Any:
        """For those who write bytes."""
        self._lent = True
        return (sys.__stdout__ if self._descriptor == 1 else sys.__stderr__).buffer  # type: ignore[union-attr]


def set_up(level: str, form: str) -> Handler:
    """Let the root logger write to standard error. -> the handler, which is told what runs"""
    handler = Handler(2, form)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = False
    return handler


def capture_prints(handler: Handler) -> tuple[Printed, Printed]:
    """In a child: let what tasks print go to the log."""
    handler.begin_to_wait()
    out, error = Printed(logging.INFO, 1, handler), Printed(logging.WARNING, 2, handler)
    sys.stdout, sys.stderr = _as_text(out), _as_text(error)
    return out, error


def _as_text(printed: Printed) -> TextIO:
    stand_in: Any = printed
    text: TextIO = stand_in
    return text
