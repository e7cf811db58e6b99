"""bin/demo: indexes a source tree with a worker and a private broker of its own, and checks the result.

1. An embedded broker in a private folder, and a real `prefork-worker` beside it.
2. A task that fails at first and is tried again, a task for each file, a task that is killed at its deadline.
3. The same files once more in this process, without prefork: the sums must be equal, the times say what it gained.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from own_worker import WorkerError, own_worker
from report import Report, Totals, progress
from rich.console import Console
from tasks import app, fails_at_first, index_file, never_ends

from prefork import PreforkError, TaskFailed

NOT_SOURCE = {"__pycache__", "site-packages", "dist-packages"}
TESTS = {"test", "tests", "idle_test"}  # of the standard library: half of its files, some of them broken on purpose
CHUNK = 20


class NothingToIndex(Exception):
    """The folder is not there, or has no Python in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. -> the exit status"""
    parser = argparse.ArgumentParser(prog="demo", description="Index Python source with prefork, and check the sums.")
    parser.add_argument("path", nargs="?", type=Path, help="the folder to index (default: the standard library)")
    parser.add_argument("--check", action="store_true", help="end with one line that says ok, and the figures")
    options = parser.parse_args(arguments)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    files = python_files(options.path)
    console.print(f"indexing {len(files):,} files of {options.path or 'the standard library'}")
    report = index(files, console)
    console.print(report.table())
    for fault in report.faults():
        console.print(f"failed: {fault}")
    if report.faults():
        return 1
    if options.check:
        console.print(report.line())
    return 0


def python_files(folder: Path | None) -> list[str]:
    """The Python files below a folder, by default of the standard library without its tests."""
    skip = NOT_SOURCE if folder else NOT_SOURCE | TESTS
    top = (folder or Path(sysconfig.get_path("stdlib"))).resolve()
    if not top.is_dir():
        raise NothingToIndex(f"{folder}: there is no such folder")
    files = []
    for where, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        paths = [os.path.join(where, name) for name in sorted(names) if name.endswith(".py")]
        files += [path for path in paths if os.path.isfile(path) and is_text(path)]
    if not files:
        raise NothingToIndex(f"{folder}: there are no .py files in this folder")
    return files


def is_text(path: str) -> bool:
    """Whether JSON can carry this path: a name on disk may be any bytes."""
    with contextlib.suppress(UnicodeEncodeError):
        return bool(path.encode())
    return False


def index(files: list[str], console: Console) -> Report:
    """Index the files twice, with prefork and without."""
    for path in files:
        with contextlib.suppress(OSError):
            Path(path).read_bytes()  # so that neither pass has to wait for the disk

    sums = Totals()
    with own_worker() as worker:
        unreliable = fails_at_first.enqueue()
        worker.value_of(unreliable)  # when it is there, the worker is up

        started = time.perf_counter()
        results = app.enqueue_many(index_file.s(path) for path in files)
        stuck = never_ends.enqueue()
        for at, path in progress(enumerate(files), len(files), "with prefork", console):
            if at % CHUNK == 0:  # when the last of a chunk is ready the others are too, or nearly: little waiting
                worker.value_of(results[min(at + CHUNK, len(results)) - 1])
            sums.add(path, worker.value_of(results[at]))
        took_s = time.perf_counter() - started

        killed = 0
        try:
            worker.value_of(stuck)
        except TaskFailed as error:
            killed += error.exception_class_path == "prefork.TaskTimeout"
        attempts = [result.attempts for result in (*results, unreliable, stuck)]

    plain_sums = Totals()
    gc.collect()
    gc.freeze()  # as the worker's children have it, so that the comparison is fair
    started = time.process_time()  # and not the clock: what else the machine does must not make us look faster
    for path in progress(files, len(files), "one process ", console):
        plain_sums.add(path, index_file(path))  # a plain call runs the task here
    plain_cpu_s = time.process_time() - started
    return Report(sums, took_s, len(attempts), sum(attempts) - len(attempts), killed, plain_sums, plain_cpu_s)


def on_sigterm(number: int, frame: object) -> None:
    """End in order."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        sys.exit(main())
    except (NothingToIndex, WorkerError, PreforkError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
