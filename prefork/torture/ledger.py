"""The ledger: what happened to each task, written outside the broker by those who saw it.

Each process appends to a file of its own, one write for each line or batch of lines, so that a SIGKILL costs at most
its own last line. A task is known by its *tag*, which it carries as its argument: unlike its id it is known before it
is accepted, and if it were accepted twice, under two ids, it would show. Times are microseconds of the system's
monotonic clock, which all processes share.

A producer writes                                   A child writes
    t TAG KIND US           it is to be enqueued        p PID MASTER US             who it is, first of all
    a TAG ID US             accepted                    s TAG ID ATTEMPT US         an attempt has begun
    u TAG - US              may have been accepted      e TAG OUTCOME US            it has ended
    r TAG - US              refused
    c TAG SAID US US        cancelled: asked when, told when
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

BUCKETS = 64
NEVER = 1 << 62  # when something ends that was never seen to end


def now_us() -> int:
    """The clock of the ledger."""
    return time.monotonic_ns() // 1000


class Pen:
    """One process's file."""

    def __init__(self, folder: Path, who: str) -> None:
        self._fd = os.open(folder / f"{who}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, *words: object) -> None:
        """One line; the time comes last."""
        os.write(self._fd, f"{' '.join(map(str, words))} {now_us()}\n".encode())

    def write_all(self, verb: str, rows: Iterable[tuple[object, ...]]) -> None:
        """A line for each, all at the same time."""
        end = f" {now_us()}\n"
        data = "".join(f"{verb} {' '.join(map(str, row))}{end}" for row in rows).encode()
        while data:
            data = data[os.write(self._fd, data) :]


@dataclass(slots=True)
class Run:
    """One attempt, as the child saw it. `outcome`: "" if it was cut off."""

    id: str
    attempt: int
    child: int
    master: int
    start_us: int
    end_us: int = NEVER
    outcome: str = ""

    @property
    def cut(self) -> bool:
        """Whether it was not seen to end."""
        return self.end_us == NEVER


@dataclass(slots=True)
class Story:
    """All that the ledger says of one task. `answer`: a (accepted), u, r, or "" when nobody lived to tell."""

    tag: str
    kind: str = ""
    asked_us: int = 0
    answer: str = ""
    answered_us: int = NEVER
    id: str = ""
    cancel: str = ""  # what the producer that cancelled it was told
    cancel_asked_us: int = 0
    cancelled_us: int = NEVER
    runs: list[Run] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Take in a line of a bucket."""
        verb, _, *words = line.split(" ")
        if verb == "R":
            id, attempt, child, master, start, end, outcome = words
            self.runs.append(Run(id, int(attempt), int(child), int(master), int(start), int(end), outcome))
        elif verb == "t":
            self.kind, self.asked_us = words[0], int(words[1])
        elif verb == "c":
            self.cancel, self.cancel_asked_us, self.cancelled_us = words[0], int(words[1]), int(words[2])
        else:
            self.answer, self.answered_us = verb, int(words[1])
            self.id = words[0] if verb == "a" else ""


def root(tag: str) -> str:
    """The task of whose follow-ups this is one; itself if it is none."""
    return tag.partition("/")[0]


def lines(path: Path) -> Iterator[str]:
    """The whole lines of a file; the last one may have been cut off by a kill."""
    with path.open(encoding="ascii", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                yield line[:-1]


def stories(folder: Path) -> Iterator[dict[str, Story]]:
    """The stories of all tasks, tag -> story, in parts that fit into memory; follow-ups are with their parents."""
    buckets = [folder / f"bucket-{n}" for n in range(BUCKETS)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("w", encoding="ascii")) for path in buckets]
        for path in sorted(folder.glob("*.log")):
            for tag, line in _combined(path):
                files[zlib.crc32(root(tag).encode()) % BUCKETS].write(line + "\n")
    for path in buckets:
        found: dict[str, Story] = {}
        for line in lines(path):
            tag = line.split(" ", 2)[1]
            found.setdefault(tag, Story(tag)).add(line)
        for story in found.values():
            story.runs.sort(key=lambda run: run.start_us)
        path.unlink()
        yield found


def _combined(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a producer as they are; of a child, one line `R TAG …` for each run. With the tag of each."""
    child = master = "0"
    tag, begun = "", ""
    for line in lines(path):
        verb, word, *words = line.split(" ")
        if verb == "p":
            child, master = word, words[0]
        elif verb == "s":
            if tag:
                yield tag, f"R {tag} {begun} {NEVER} "
            id, attempt, start = words
            tag, begun = word, f"{id} {attempt} {child} {master} {start}"
        elif verb == "e":
            if word == tag:
                outcome, end = words
                yield tag, f"R {tag} {begun} {end} {outcome}"
                tag = ""
        else:
            yield word, line
    if tag:
        yield tag, f"R {tag} {begun} {NEVER} "
