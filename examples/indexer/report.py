"""What the demo shows: sums, progress and the closing table. Nothing here knows of tasks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from analysis import FileIndex
from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")


@dataclass
class Totals:
    """The sums over all files."""

    files: int = 0
    unparsed: int = 0
    lines: int = 0
    tokens: int = 0
    definitions: int = 0
    longest: tuple[int, str] = (0, "none")
    imports: set[str] = field(default_factory=set)

    def add(self, path: str, found: FileIndex) -> None:
        """Count one file."""
        self.files += 1
        self.unparsed += not found["parsed"]
        self.lines += found["lines"]
        self.tokens += found["tokens"]
        self.definitions += found["definitions"]
        self.imports.update(found["imports"])
        if found["longest"] > self.longest[0]:
            self.longest = found["longest"], f"{found['longest_name']} in {os.path.basename(path)}"


@dataclass
class Report:
    """What came of it: with prefork and in one process."""

    sums: Totals
    took_s: float
    tasks: int
    retries: int
    killed: int
    plain_sums: Totals
    plain_cpu_s: float

    @property
    def per_s(self) -> float:
        """Files indexed in a second, a task each."""
        return self.sums.files / self.took_s

    @property
    def speed_up(self) -> float:
        """How many times as fast as one process that has a core for itself."""
        return self.plain_cpu_s / self.took_s

    def faults(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if self.sums != self.plain_sums:
            found.append(f"the sums differ: {self.sums} with prefork, {self.plain_sums} without")
        if self.retries != 1:
            found.append(f"{self.retries} retries instead of 1")
        if self.killed != 1:
            found.append(f"{self.killed} tasks killed at the deadline instead of 1")
        return found

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"ok files={self.sums.files} tasks={self.tasks} retries={self.retries} killed={self.killed} "
            f"tasks/s={self.per_s:.0f} speed-up={self.speed_up:.2f} sums=equal"
        )

    def table(self) -> Table:
        """The figures for people."""
        sums = self.sums
        table = Table(show_header=False)
        table.add_row("files", f"{sums.files:,}, {sums.unparsed:,} of them not valid Python")
        table.add_row("lines, tokens", f"{sums.lines:,}, {sums.tokens:,}")
        table.add_row("definitions", f"{sums.definitions:,}")
        table.add_row("longest function", f"{sums.longest[1]}, {sums.longest[0]:,} lines")
        table.add_row("imports", f"{len(sums.imports):,} modules", end_section=True)
        table.add_row("tasks", f"{self.tasks:,}")
        table.add_row("retries", f"{self.retries:,}")
        table.add_row("killed at the deadline", f"{self.killed:,}", end_section=True)
        table.add_row("with prefork", f"{self.took_s:.2f} s, {self.per_s:,.0f} tasks/s")
        table.add_row("in one process", f"{self.plain_cpu_s:.2f} s of CPU")
        table.add_row("speed-up", f"{self.speed_up:.2f}")
        table.add_row("sums of both", "equal" if sums == self.plain_sums else "different")
        return table


def progress(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """The items, with a bar on a terminal and a few plain lines elsewhere."""
    if console.is_terminal:
        yield from track(items, what, total, console=console)
        return
    for done, item in enumerate(items, 1):
        yield item
        if done * 4 // total > (done - 1) * 4 // total:
            console.print(f"{what} {done}/{total}")
