from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork.worker import logs
from prefork.worker.logs import Handler, Printed
from tests.conftest import PATIENCE_S, until


class Sink:
    """A logger whose lines land in a file."""

    def __init__(self, path: Path, form: str) -> None:
        self.path = path
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.handler = Handler(fd, form)
        os.close(fd)  # the handler has one of its own
        self.log = logging.Logger("shop.mail")
        self.log.addHandler(self.handler)

    @property
    def text(self) -> str:
        return self.path.read_bytes().decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n") if line]


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Callable[[str], Sink]]:
    made: list[Sink] = []

    def make(form: str = "text") -> Sink:
        made.append(Sink(tmp_path / f"log{len(made)}", form))
        return made[-1]

    yield make
    for it in made:
        os.close(it.handler._fd)


class Odd(Exception):
    def __str__(self) -> str:
        return "no such file \ud800\udcff"


# -- the handler ------------------------------------------------------------------------------------------------------


def test_a_line_tells_when_who_and_what(sink: Any) -> None:
    it = sink("text")
    it.log.info("sent %d of %d", 3, 10)
    (line,) = it.lines
    assert line[:4].isdigit()
    assert line[23:] == f" INFO    [{os.getpid()}] shop.mail sent 3 of 10"


def test_a_line_of_a_running_task_has_its_name_and_id(sink: Any) -> None:
    it = sink("text")
    it.handler.task, it.handler.task_id = "shop.send", "01ab"
    it.log.warning("slow")
    it.handler.task = ""
    it.log.warning("idle")
    assert f"[{os.getpid()} shop.send 01ab] shop.mail slow" in it.lines[0]
    assert f"[{os.getpid()}] shop.mail idle" in it.lines[1]


def test_a_traceback_follows_its_line(sink: Any) -> None:
    it = sink("text")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        it.log.exception("failed")
    assert it.lines[0].endswith("shop.mail failed")
    assert it.lines[1] == "Traceback (most recent call last):"
    assert it.lines[-1] == "ZeroDivisionError: division by zero"


def test_json_has_a_line_for_each_record_whatever_is_in_it(sink: Any) -> None:
    it = sink("json")
    it.handler.task, it.handler.task_id = "shop.send", "01ab"
    it.log.error('two\nlines, a "quote", ü and \x00')
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        it.log.exception("failed")
    first, second = it.json()
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "ERROR", "logger": "shop.mail", "pid": os.getpid(), "task": "shop.send", "id": "01ab",
        "message": 'two\nlines, a "quote", ü and \x00',
    }  # fmt: skip
    assert second["traceback"].startswith("Traceback")
    assert second["traceback"].endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("form", ["text", "json"])
def test_text_that_is_no_unicode_is_logged_all_the_same(sink: Any, form: str) -> None:
    """As file names are, of which Python makes lone surrogates."""
    it = sink(form)
    it.log.info("cannot read %s", "caf\udce9.txt")
    try:
        raise Odd
    except Odd:
        it.log.exception("failed")
    assert "cannot read caf" in it.text
    assert "no such file" in it.text
    assert "failed" in it.text
    if form == "json":
        assert len(it.json()) == 2


def test_a_record_that_cannot_be_made_into_text_does_not_end_the_task(sink: Any) -> None:
    it = sink("text")

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    it.log.info("%s", Broken())
    it.log.info("%d", "three")
    it.log.info("after")
    assert it.lines[-1].endswith("after")


def test_a_log_that_cannot_be_written_does_not_end_the_task(tmp_path: Path) -> None:
    read, write = os.pipe()
    handler = Handler(write, "text")
    os.close(read)
    os.close(write)
    handler.handle(logging.LogRecord("shop", logging.INFO, "", 1, "lost", None, None))
    os.close(handler._fd)
    handler.handle(logging.LogRecord("shop", logging.INFO, "", 1, "lost", None, None))


def test_lines_of_many_threads_and_processes_are_not_mixed(sink: Any) -> None:
    it = sink("text")
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(200):
                    it.log.info("x" * 500)
            finally:
                os._exit(0)
        pids.append(pid)
    threads = [threading.Thread(target=lambda: [it.log.info("y" * 500) for _ in range(200)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(it.lines) == 1200
    assert all(line.endswith(("x" * 500, "y" * 500)) and len(line) < 600 for line in it.lines)


# -- a log that nobody reads ------------------------------------------------------------------------------------------


class Pipe:
    """A logger whose lines go to a pipe that is full, or to a socket."""

    def __init__(self, kind: str) -> None:
        self.read_fd, write_fd = os.pipe() if kind != "socket" else map(socket.socket.detach, socket.socketpair())
        os.set_blocking(write_fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_fd, b"." * 4095 + b"\n")
        os.set_blocking(write_fd, True)
        self.handler = Handler(write_fd, "text")
        os.close(write_fd)
        os.set_blocking(self.read_fd, False)

    def say(self, *texts: str) -> None:
        for text in texts:
            self.handler.handle(logging.LogRecord("prefork", logging.INFO, "", 1, text, None, None))

    def read(self) -> str:
        """What is there, but for what the pipe was filled with."""
        read = b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.read_fd, 1 << 16):
                read += data
        return "".join(line for line in read.decode().splitlines(keepends=True) if not line.startswith("...."))

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.handler._fd)


@pytest.fixture(params=["pipe", "another user's", "socket"])
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    if request.param == "another user's":  # which can't be opened once more
        monkeypatch.setattr(logs, "_that_never_waits", lambda fd: -1)
    it = Pipe(request.param)
    yield it
    it.close()


def within_limit(act: Callable[[], object]) -> None:
    """It ends, however the pipe is."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def said(text: str) -> list[str]:
    return [line.partition("] ")[2] for line in text.splitlines()]


def test_the_master_does_not_wait_for_who_reads_its_log_and_says_what_is_missing(full: Pipe) -> None:
    within_limit(lambda: full.say("one", "two", "three", "four"))
    assert full.read() == ""
    full.say("five")
    assert said(full.read()) == ["one", "lines missing here, for which the log had no room: 3", "five"]
    full.say("six")
    assert said(full.read()) == ["six"]
    assert not full.handler.is_behind


def test_what_is_missing_is_said_as_soon_as_there_is_room(full: Pipe) -> None:
    full.say("one", "two")
    full.handler.flush()
    assert full.handler.is_behind
    full.read()
    full.handler.flush()
    assert said(full.read()) == ["one", "lines missing here, for which the log had no room: 1"]
    assert not full.handler.is_behind


def test_what_nobody_will_ever_read_is_not_kept(full: Pipe) -> None:
    full.say("one", "two")
    os.close(full.read_fd)
    full.say("three")
    assert not full.handler.is_behind
    full.read_fd = os.dup(full.handler._fd)


def test_a_line_that_is_longer_than_the_pipe_comes_whole_or_not_at_all(full: Pipe) -> None:
    full.read()
    long = "x" * 200_000
    within_limit(lambda: full.say(long, "missing"))
    read = full.read()
    for n in range(20):
        full.say(f"after {n}")
        read += full.read()
    lines = said(read)
    assert lines[0] == long
    assert "lines missing here" in lines[1]
    assert lines[-1] == "after 19"
    assert "missing" not in lines[2:]


def test_a_reader_that_is_late_is_waited_for_a_little(full: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PATIENCE_S", PATIENCE_S)
    timer = threading.Timer(0.05, lambda: read.append(full.read()))
    read: list[str] = []
    timer.start()
    full.say("one", "two")
    timer.join()
    assert said("".join(read) + full.read()) == ["one", "two"]


def test_a_child_waits_and_does_not_repeat_what_the_master_had_to_say(full: Pipe) -> None:
    full.say("the master's", "another")
    full.handler.begin_to_wait()
    thread = threading.Thread(target=lambda: full.say("a task's", "one more"), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    read: list[str] = []
    until(lambda: (read.append(full.read()), not thread.is_alive())[1])
    assert said("".join(read) + full.read()) == ["a task's", "one more"]


def test_a_disk_that_was_full_is_written_to_when_it_has_room(full: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    full.read()
    write = os.write

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "write", refuse)
    full.say("one", "two")
    monkeypatch.setattr(os, "write", write)
    full.say("three")
    assert said(full.read()) == ["one", "lines missing here, for which the log had no room: 1", "three"]


# -- what tasks print -------------------------------------------------------------------------------------------------


class Recorder(Handler):
    """Keeps the lines that it is given."""

    def __init__(self) -> None:
        super().__init__(2, "text")
        os.close(self._fd)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def printed(caplog: pytest.LogCaptureFixture) -> Iterator[tuple[Printed, Callable[[], list[str]]]]:
    with caplog.at_level(logging.DEBUG, logger="prefork"):
        recorder = Recorder()
        yield Printed(logging.INFO, 1, recorder), lambda: recorder.lines


def test_each_printed_line_is_a_record(printed: Any) -> None:
    out, lines = printed
    print("one", 2, file=out)
    print("three\nfour", file=out, flush=True)
    out.writelines(["five\n", "six\n"])
    assert lines() == ["one 2", "three", "four", "five", "six"]


def test_a_line_may_be_printed_in_pieces(printed: Any) -> None:
    out, lines = printed
    for piece in ("a", "b", "", "c\nd"):
        assert out.write(piece) == len(piece)
    assert lines() == ["abc"]
    out.finish()
    assert lines() == ["abc", "d"]
    out.finish()
    assert lines() == ["abc", "d"]


def test_empty_lines_and_percent_signs_do_no_harm(printed: Any) -> None:
    out, lines = printed
    print("", "  ", "100 % of %s", sep="\n", file=out)
    assert lines() == ["100 % of %s"]


def test_threads_do_not_mix_their_pieces(printed: Any) -> None:
    out, lines = printed
    barrier = threading.Barrier(4)

    def say(letter: str) -> None:
        for _ in range(50):
            barrier.wait()
            for _ in range(5):
                out.write(letter)
            out.write("\n")

    threads = [threading.Thread(target=say, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lines()) == sorted(letter * 5 for letter in "abcd" for _ in range(50))


class Interrupted(Recorder):
    """While it handles a line, another thread prints."""

    out: Printed

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        thread = threading.Thread(target=self.out.write, args=("from another thread",))
        thread.start()
        thread.join()


def test_a_thread_that_a_task_has_left_behind_may_print_while_the_task_ends(printed: Any) -> None:
    disturbance = Interrupted()
    disturbance.out = out = Printed(logging.INFO, 1, disturbance)
    out.write("from the task")
    out.finish()
    assert disturbance.lines[0] == "from the task"


def test_a_handler_of_the_tasks_own_may_write_to_what_stands_for_its_output(printed: Any) -> None:
    out, lines = printed
    own = logging.Logger("shop")
    own.addHandler(logging.StreamHandler(out))
    own.warning("once")
    assert lines() == ["once"]


def test_much_that_is_printed_without_a_newline_takes_no_quadratic_time(printed: Any) -> None:
    out, lines = printed
    for _ in range(200_000):
        out.write(".")
    out.finish()
    assert sum(len(line) for line in lines()) == 200_000


def test_it_looks_like_a_file_to_libraries(printed: Any) -> None:
    out, _ = printed
    assert not out.isatty()
    assert not out.closed
    assert out.writable()
    assert out.encoding == "utf-8"
    assert out.fileno() == 1
    assert Printed(logging.WARNING, 2, Recorder()).fileno() == 2
    with pytest.raises(TypeError):
        out.write(b"bytes")
    out.close()
    print("still open", file=out)
    subprocess.run([sys.executable, "-c", ""], stdout=Printed(logging.WARNING, 2, Recorder()), check=True)  # type: ignore[call-overload]


CHILD = """
    import logging, os, sys
    from prefork.worker.logs import capture_prints, set_up
    handler = set_up("{level}", "{form}")
    out, error = capture_prints(handler)
    handler.task, handler.task_id = "shop.send", "01ab"
    {code}
    out.finish(), error.finish()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # as a child ends
"""


def ran(code: str, form: str = "text", level: str = "INFO") -> tuple[str, str]:
    """Standard output and standard error of a child that runs this."""
    program = textwrap.dedent(CHILD).replace("{form}", form).replace("{level}", level).replace("{code}", code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=env
    )
    return done.stdout, done.stderr


def test_prints_and_logging_of_a_task_come_out_with_its_name_and_id() -> None:
    code = "print('hello'); print('oh', file=sys.stderr); logging.getLogger('shop').info('logged'); logging.debug('no')"
    out, err = ran(code)
    assert out == ""
    lines = err.splitlines()
    assert [line[24:] for line in lines] == [
        f"INFO    [{lines[0].split('[')[1].split()[0]} shop.send 01ab] hello",
        f"WARNING [{lines[0].split('[')[1].split()[0]} shop.send 01ab] oh",
        f"INFO    [{lines[0].split('[')[1].split()[0]} shop.send 01ab] shop logged",
    ]


def test_all_of_it_is_json_when_that_is_asked_for() -> None:
    _, err = ran("print('hello'); print('a', 1, end=''); logging.warning('logged')", "json", "DEBUG")
    records = [json.loads(line) for line in err.splitlines()]
    assert [(it["level"], it["message"], it["task"], it["id"]) for it in records] == [
        ("INFO", "hello", "shop.send", "01ab"),
        ("WARNING", "logged", "shop.send", "01ab"),
        ("INFO", "a 1", "shop.send", "01ab"),
    ]


def test_bytes_that_a_task_writes_are_not_lost_with_its_child() -> None:
    out, err = ran("sys.stdout.buffer.write(b'raw bytes\\n'); sys.stderr.buffer.write(b'more\\n')")
    assert "raw bytes" in out + err
    assert "more" in out + err


def test_the_log_goes_on_when_a_task_has_closed_its_outputs() -> None:
    _, err = ran("os.close(1); os.close(2); print('hello'); sys.stdout.close(); print('again')")
    assert [line.rpartition("] ")[2] for line in err.splitlines()] == ["hello", "again"]
