"""The tasks of all sides, which report by files of their process, never through the broker.

`count.PID` holds a number that is mapped into memory: to count a task costs some 0.05 µs. `record.PID` gets 16 bytes
for each call of `record`. Times are those of CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

FOLDER = os.environ.get("BENCH_FOLDER", "")
_counter: memoryview
_file: int


def _open() -> None:
    """Give this process files of its own."""
    global _counter, _file
    _file = -1
    with open(f"{FOLDER}/count.{os.getpid()}", "a+b") as file:
        file.truncate(8)
        _counter = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")


if FOLDER:
    _open()
    os.register_at_fork(after_in_child=_open)


def record(first: int, second: int) -> None:
    """Keep two numbers."""
    global _file
    if _file < 0:
        _file = os.open(f"{FOLDER}/record.{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_file, struct.pack("<QQ", first, second))


def noop(*args: object, **kwargs: object) -> None:
    """Nothing, counted."""
    _counter[0] += 1


def stamp(sent_ns: int) -> None:
    """Say when this began."""
    record(sent_ns, time.monotonic_ns())


def nap(seconds: float) -> None:
    """Take some time, and say when."""
    begun = time.monotonic_ns()
    time.sleep(seconds)
    record(begun, time.monotonic_ns())


def rest(seconds: float) -> None:
    """Take some time."""
    time.sleep(seconds)


TASKS = {"noop": noop, "stamp": stamp, "nap": nap, "rest": rest}

# What a large app has made by the time that it is imported: about 100 MB of objects.
if os.environ.get("BENCH_HEAVY"):
    heavy = [{"row": n, "name": f"name {n}", "values": [n, n + 1]} for n in range(300_000)]
