"""What else could have been chosen, measured beside what was: one row for each choice of the design.

    python -m benchmarks.alternatives [--seconds 90] [--only gc --only pipe] [--server redis-server]

A row measures what prefork does and the alternative in turn, round by round. Its ratio is the alternative's cost, of
ours, in the same round: above 1 means that ours is cheaper. The cost is CPU time of all who take part, the server
included, where it is not said that it is time by the clock. A private server; nothing of it is prefork's worker.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks import trials
from benchmarks.scene import bundled_server


@dataclass(frozen=True)
class Row:
    """A choice. `make`: what ours and the other one cost, measured when they are called."""

    name: str
    what: str
    kept: str
    make: Callable[[trials.Server], trials.Costs]


def handed_over(other: Callable[[trials.Server], trials.Cost]) -> Callable[[trials.Server], trials.Costs]:
    return lambda server: (trials.pushed(server), other(server))


def piped(**sockets: bool) -> Callable[[trials.Server], trials.Costs]:
    return lambda server: (trials.there_and_back(server), trials.there_and_back(server, **sockets))


def without(make: Callable[[], trials.Costs]) -> Callable[[trials.Server], trials.Costs]:
    """Where no server takes part."""
    return lambda server: make()


def of_gc(act: Callable[[], Callable[[], object]], times: int, other: str) -> Callable[[trials.Server], trials.Costs]:
    return lambda server: (trials.collected(act(), times, "frozen"), trials.collected(act(), times, other))


def of_master() -> Callable[[], object]:
    return trials.of_master


ROWS = (
    Row(
        "fcall", "FCALL, of EVALSHA: enqueue", "EVALSHA: nothing to keep in step in the server", trials.calls_of_scripts
    ),
    Row("resp3", "RESP3, of RESP2: a claim of 64", "RESP2; RESP3 only where pushes come", trials.protocols),
    Row("list", "message in the list, of hash and list", "the hash: found by its id", trials.places),
    Row("list-bytes", "the same: bytes that wait in the server", "the hash", trials.sizes),
    Row("marker", "marker and claim, of a push (clock)", "the push, for one message", handed_over(trials.marker)),
    Row("blmove", "BLMOVE and HGET, of a push (clock)", "the push; BLMOVE knows no lease", handed_over(trials.moved)),
    Row("pipe-orders", "socketpair for orders, of a pipe", "pipes", piped(orders=True)),
    Row("pipe-answers", "socketpair for answers, of a pipe", "pipes", piped(answers=True)),
    Row("writev", "os.writev, of join and write: 16 frames", "join and write", without(trials.writes)),
    Row("epoll", "select.epoll, of selectors: a turn", "selectors: for every Unix", without(trials.waits)),
    Row("gc-master-on", "gc on, of frozen: master's objects", "frozen", of_gc(of_master, 60, "on")),
    Row("gc-master-off", "gc off, of frozen: the same", "frozen: cycles are collected", of_gc(of_master, 60, "off")),
    Row("gc-child-on", "gc on, of frozen: child's objects", "frozen", of_gc(trials.of_child, 400, "on")),
    Row("gc-child-off", "gc off, of frozen: the same", "frozen: tasks make cycles", of_gc(trials.of_child, 400, "off")),
)


def measure(row: Row, server: trials.Server, seconds: float) -> list[float]:
    """Both in turn, for so long and at least three times. -> the ratios"""
    ours, other = row.make(server)
    ours(), other()  # what is made at the first time is not counted
    ratios: list[float] = []
    end = time.monotonic() + seconds
    while len(ratios) < 3 or time.monotonic() < end:
        a, b = (ours(), other()) if len(ratios) % 2 else (other(), ours())[::-1]
        ratios.append(b / a)
    return sorted(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="of all rows together, about (default: 90)")
    parser.add_argument("--only", action="append", metavar="ROW", help="those rows whose names begin so")
    parser.add_argument("--server", help="redis-server or valkey-server (default: the bundled one)")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name.startswith(tuple(options.only))]
    for row in rows:
        with ExitStack() as stack:
            server = trials.Server(options.server or bundled_server())
            stack.callback(server.close)
            ratios = measure(row, server, options.seconds / len(rows))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"{row.what:40} {statistics.median(ratios):5.2f}   {spread:14} {row.kept}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
