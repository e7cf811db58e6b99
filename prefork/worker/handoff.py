"""The hand-off between master and child: three plain pipes, and both ends of each.

    task    master -> child   frames: a message and what its attempt needs; finished when the pipe has room
    token   master -> child   8 bytes: the number of a message that may be started
    answer  child -> master   one frame for each message, at once

The token pipe is the queue of what the child has not started. Whoever reads a token owns its message: the child starts
it, or the master, which keeps the reading end open too, has taken it back. The kernel decides, message by message. So
it is exact, after a child's death, what was running (token gone, no answer) and what only waited (token still there).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice

from prefork.worker import fast
from prefork.worker.frames import (
    ANSWER,
    BOOT_FAILED,
    FRAME,
    LARGEST_ANSWER,
    LONGEST_S,
    TOKEN,
    Answer,
    Given,
    Order,
    short_answers,
)

READ_BYTES = 1 << 16  # malloc maps and unmaps what is larger, each time, which takes longer than the read
WIDE_BYTES = 1 << 18  # of a pipe that large frames pass, if the system can; users have 64 MiB for theirs in all
MOST_PIECES = 64  # in one write


class MasterEnd:
    """The master's ends of one child's pipes, and the orders that it has not answered, oldest first."""

    def __init__(self) -> None:
        ends: list[int] = []
        try:
            for _ in range(3):
                ends += os.pipe()
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        self._child_task_r, self.task_w, self.token_r, self.token_w, self.answer_r, self._child_answer_w = ends
        # One description serves both who read tokens, so the child polls when there is none.
        for fd in (self.task_w, self.token_w, self.token_r, self.answer_r):
            os.set_blocking(fd, False)
        self.unanswered: dict[int, Order] = {}
        self.backlog = deque[bytes | memoryview]()  # what did not fit into the pipe yet
        self._wide = False
        self._number = 0
        self._answers = bytearray()
        self._garbage = ""

    def child_end(self) -> ChildEnd:
        """In the child: its own ends; the master's are closed."""
        for fd in (self.task_w, self.token_w, self.answer_r):
            os.close(fd)
        return ChildEnd(self._child_task_r, self.token_r, self._child_answer_w)

    def forked(self) -> None:
        """In the master, after the fork: close the child's ends."""
        os.close(self._child_task_r)
        os.close(self._child_answer_w)

    def descriptors(self) -> tuple[int, ...]:
        """What a child forked later has to close, or nobody would see end-of-file when the master dies."""
        return tuple(fd for fd in (self.task_w, self.token_w, self.token_r, self.answer_r) if fd >= 0)

    def hand(self, orders: list[Order]) -> bool:
        """Give orders to the child, in this order. -> whether all was written; if not, call `write_on` on room."""
        frames: list[bytes | memoryview] = []
        unanswered, first, large = self.unanswered, self._number + 1, False
        usual = fast.compiled.frames(orders, first) if fast.compiled else None
        if usual is not None:
            frames.append(usual)
            unanswered.update(zip(count(first), orders))
        else:
            for number, order in enumerate(orders, first):
                unanswered[number] = order
                frame = order.frame(number)
                frames += frame
                large = large or len(frame[1]) >= READ_BYTES
        self._number += len(orders)
        waits = bool(self.backlog)
        if large:
            self._widen()
        self.backlog += frames if large else (b"".join(frames),)  # to join large ones would copy them once more
        if not waits:
            self.write_on()
        self._write_tokens(first, len(orders))
        return not self.backlog

    def _write_tokens(self, first: int, count: int) -> None:
        tokens = TOKEN.pack(first) if count == 1 else struct.pack(f"<{count}Q", *range(first, first + count))
        try:  # noqa: SIM105  # `suppress` takes three calls, for which a child would wait
            os.write(self.token_w, tokens)
        except BrokenPipeError:
            pass  # the child has died; its end is seen when it is reaped

    def write_on(self) -> bool:
        """Write what did not fit before. -> whether all is written"""
        backlog = self.backlog
        try:
            while backlog:
                if len(backlog) == 1:
                    written = os.write(self.task_w, backlog[0])
                else:
                    written = os.writev(self.task_w, list(islice(backlog, MOST_PIECES)))
                while backlog and written >= len(backlog[0]):
                    written -= len(backlog.popleft())
                if written:
                    backlog[0] = memoryview(backlog[0])[written:]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            backlog.clear()
        return True

    def _widen(self) -> None:
        """Let what is large pass in fewer turns; not for each pipe, since the system has only so much for them."""
        if not self._wide and sys.platform == "linux":
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.task_w, fcntl.F_SETPIPE_SZ, WIDE_BYTES)
        self._wide = True

    def take_back(self, most: int = 1 << 13) -> list[Order]:
        """Take back what the child has not started: up to `most` orders, the oldest of them first."""
        try:
            tokens = os.read(self.token_r, TOKEN.size * most)
        except BlockingIOError:
            return []
        return [self.unanswered.pop(number) for (number,) in TOKEN.iter_unpack(tokens)]

    def unstarted(self) -> int:
        """How many of the unanswered the child has not started."""
        (size,) = struct.unpack("i", fcntl.ioctl(self.token_r, termios.FIONREAD, bytes(4)))
        return int(size) // TOKEN.size

    def receive(self, done: Callable[[bytes], bytes] | None = None) -> list[Answer] | None:
        """The answers that have come; None when there was nothing to read.

        `done`: is given what begins with an answer; what it returns of that is still to be told.

        Raises EOFError when there will be none any more, ValueError for garbage.
        """
        if self.answer_r < 0:  # it was closed after the child's death
            return None
        if self._garbage:
            raise ValueError(self._garbage)
        try:
            data = os.read(self.answer_r, READ_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        answers: list[Answer] = []
        if done and not self._answers:
            data = done(data)
        if not self._answers and len(data) % ANSWER.size == 0:
            answers = short_answers(data)
            data = data[len(answers) * ANSWER.size :]
        if data:
            self._answers += data
            answers += self._parse()
        if self._garbage and not answers:  # else the next call says so: what came before it is true
            raise ValueError(self._garbage)
        return answers

    def _parse(self) -> Iterator[Answer]:
        buffer, at, head = self._answers, 0, ANSWER.size
        while len(buffer) - at >= head:
            number, kind, size, ran_s, cpu_s, peak_kib = ANSWER.unpack_from(buffer, at)
            if kind > BOOT_FAILED or size > LARGEST_ANSWER or not (0 <= ran_s < LONGEST_S and -1 <= cpu_s < LONGEST_S):
                self._garbage = f"an answer of kind {kind} with {size} bytes after {ran_s:g} s"
                break
            if len(buffer) - at - head < size:
                break
            yield Answer(number, kind, ran_s, cpu_s, peak_kib, bytes(buffer[at + head : at + head + size]))
            at += head + size
        del buffer[:at]

    def settle(self, number: int) -> Order | None:
        """Take an answered order out; None for a number that is not due."""
        return self.unanswered.pop(number, None)

    def finish(self) -> None:
        """Let the child end by itself, once it has done what it holds."""
        if self.token_w >= 0:
            os.close(self.token_w)
            self.token_w = -1

    def close(self) -> None:
        """Close the master's ends."""
        for fd in self.descriptors():
            os.close(fd)
        self.task_w = self.token_w = self.token_r = self.answer_r = -1


class ChildEnd:
    """The child's ends of its pipes."""

    def __init__(self, task_r: int, token_r: int, answer_w: int) -> None:
        self.task_r, self.token_r, self.answer_w = task_r, token_r, answer_w
        self._poll = select.poll()
        self._poll.register(token_r, select.POLLIN)
        self._buffer, self._at = b"", 0
        self.writing = threading.Lock()  # a thread that a task has left behind may still report its progress

    def next(self, wanted: int = 0) -> Given | None:
        """Wait for the next message that may be started, and start it; None when the master has no more, or is gone.

        `wanted`: the message whose token was read already; 0: none.
        """
        while not wanted:
            try:
                token = os.read(self.token_r, TOKEN.size)  # exactly one: what is read can't be taken back
            except BlockingIOError:
                self._poll.poll()
                continue
            if not token:
                return None
            (wanted,) = TOKEN.unpack(token)
        head = FRAME.size
        while True:  # pass over the frames whose tokens the master has taken back
            if len(self._buffer) - self._at < head and not self._fill(head):
                return None
            number, size, task, queue, flags, attempt, retried, retries, timeout_s, soft_s, enqueued_ms, id = (
                FRAME.unpack_from(self._buffer, self._at)
            )
            self._at += head
            body: bytes | bytearray | None
            if size >= READ_BYTES:
                body = self._large_body(size)
                if body is None:
                    return None
            else:
                if len(self._buffer) - self._at < size and not self._fill(size):
                    return None
                body = self._buffer[self._at : self._at + size]
                self._at += size
            if number == wanted:
                return Given(
                    number, task, queue, flags, attempt, retried, retries, timeout_s, soft_s, enqueued_ms,
                    id.rstrip(b"\0").decode("utf-8", "replace"), body,
                )  # fmt: skip

    def _large_body(self, size: int) -> bytearray | None:
        """Read on to the end of a body, to where it stays; None when the master is gone."""
        body = bytearray(size)
        view = memoryview(body)
        have = min(size, len(self._buffer) - self._at)
        view[:have] = self._buffer[self._at : self._at + have]
        self._at += have
        while have < size:
            read = os.readv(self.task_r, [view[have:]])
            if not read:
                return None
            have += read
        return body

    def _fill(self, size: int) -> bool:
        missing = size - (len(self._buffer) - self._at)
        parts = [self._buffer[self._at :]]
        while missing > 0:
            data = os.read(self.task_r, max(READ_BYTES, missing))
            if not data:
                return False
            parts.append(data)
            missing -= len(data)
        self._buffer, self._at = b"".join(parts), 0
        return True

    def answer(
        self, number: int, kind: int, payload: bytes = b"", ran_s: float = 0.0, cpu_s: float = 0.0, peak_kib: int = 0
    ) -> None:
        """Say what became of a message. Raises OSError when the master can't be told."""
        data = ANSWER.pack(number, kind, len(payload), ran_s, cpu_s, peak_kib) + payload
        with self.writing:
            written = os.write(self.answer_w, data)
            while written < len(data):
                written += os.write(self.answer_w, memoryview(data)[written:])
