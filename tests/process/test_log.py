"""What tasks print and log: lines of the worker's log that say which task they come from."""

from __future__ import annotations

import contextlib
import json
import os

from tests.conftest import PATIENCE_S, Project, until

TASKS = """
import logging, warnings

@app.task(name="talk")
def talk():
    print("printed", 1, 2)
    print("to stderr", file=sys.stderr)
    sys.stdout.writelines(["one\\n", "two\\n"])
    print("no newline", end="")
    logger = logging.getLogger("shop.mail")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(logger, level)("logged at %s", level)
    logging.info("root")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.exception("divided")
    warnings.warn("careful")
    threading.Thread(target=print, args=("from a thread",)).start()

@app.task(name="silent")
def silent():
    return 1

@app.task(name="raw")
def raw():
    sys.stdout.buffer.write(b"bytes to stdout\\n")
    sys.stderr.buffer.write(b"bytes to stderr\\n")
    os.write(1, b"descriptor 1\\n")
    os.write(2, b"descriptor 2\\n")
    subprocess.run("echo from a process; echo and its errors >&2", shell=True)

@app.task(name="odd")
def odd():
    logging.error("surrogate %s", "\\ud800")
    print("\\ud800 printed")
    logging.error("%d of %d", "wrong")
    try:
        raise ValueError("\\ud800")
    except ValueError:
        logging.exception("with a surrogate")
    logging.error("two\\nlines")
    logging.error("null \\x00 escape \\x1b[31m")
    class Mute:
        def __str__(self): raise RuntimeError
    logging.error("%s", Mute())
    logging.error("the end")
"""


def test_what_a_task_prints_and_logs_stands_in_the_log_with_its_name_and_id(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    result = project.tasks.talk.enqueue()
    result.wait(timeout=60)
    assert worker.stop() == 0
    lines = worker.log.splitlines()
    for text in ("printed 1 2", "to stderr", "no newline", "one", "two", "logged at info", "logged at critical", "root",
                 "divided"):  # fmt: skip
        line = next(line for line in lines if line.endswith(text))
        assert f"talk {result.id}" in line
    assert "logged at debug" not in worker.log
    assert "shop.mail" in next(line for line in lines if "logged at info" in line)
    assert "ZeroDivisionError" in worker.log
    assert "careful" in worker.log
    assert "from a thread" in worker.log


def test_json_lines_are_valid_and_name_task_and_id(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("log_format = json\nlog_level = debug")
    result = project.tasks.talk.enqueue()
    result.wait(timeout=60)
    assert worker.stop() == 0
    lines = [json.loads(line) for line in worker.log.splitlines()]
    assert all({"time", "level", "message", "pid"} <= set(line) for line in lines)
    own = [line for line in lines if line.get("id") == result.id]
    assert {"printed 1 2", "to stderr", "no newline", "logged at debug", "root"} <= {line["message"] for line in own}
    assert all(line["task"] == "talk" for line in own)
    assert "ZeroDivisionError" in next(line for line in lines if line["message"] == "divided")["traceback"]


def test_odd_texts_are_logged_as_well_as_it_goes(project: Project) -> None:
    project.add(TASKS)
    for form in ("text", "json"):
        worker = project.worker(f"log_format = {form}")
        project.tasks.odd.enqueue().wait(timeout=60)
        assert worker.stop() == 0
        for text in ("surrogate", "printed", "with a surrogate", "ValueError", "%d of %d", "escape", "the end"):
            assert text in worker.log, (form, text)
        if form == "json":
            assert all(json.loads(line) for line in worker.log.splitlines())


def test_what_is_written_past_the_log_is_there_too(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("log_format = json")
    project.tasks.raw.enqueue().wait(timeout=60)
    written = ("bytes to stderr", "bytes to stdout", "descriptor 1", "descriptor 2", "from a process", "and its errors")
    until(lambda: all(text in worker.log for text in written), 5, "all is written")
    assert worker.stop() == 0


def test_a_line_is_logged_when_it_is_printed_and_not_when_the_task_ends(project: Project) -> None:
    project.add("""
        @app.task
        def slow():
            print("begun")
            time.sleep(60)
    """)
    worker = project.worker("shutdown_timeout = 0")
    project.tasks.slow.enqueue()
    until(lambda: "begun" in worker.log)
    assert worker.stop() == 0


def test_what_goes_wrong_is_said_once(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    for _ in range(50):
        project.tasks.silent.enqueue().wait(timeout=60)
    assert worker.stop() == 0
    assert "silent" not in worker.log
    lines = [line for line in worker.log.splitlines() if "run as root" not in line]
    assert not [line for line in lines if " ERROR " in line or " WARNING " in line]


def test_a_log_that_nobody_reads_stops_nothing(project: Project) -> None:
    pipe = project.folder / "worker0.log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def read() -> str:
        text = b""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reader, 1 << 16):
                text += data
        return text.decode()

    worker = project.worker("log_level = debug", wait=False)
    assert worker.log_path == pipe
    results = [project.tasks.add.enqueue(n) for n in range(2000)]  # a line each, which is twice what the pipe takes
    assert [result.wait(PATIENCE_S) for result in results] == [n + 2 for n in range(2000)]
    told = read()
    assert "is ready" in told
    project.tasks.add.enqueue(1).wait(PATIENCE_S)
    rest = [told]
    until(lambda: rest.append(read()) or "lines missing here" in "".join(rest), what="it says what is missing")
    assert worker.stop() == 0
    os.close(reader)
