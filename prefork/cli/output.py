"""Tables for people, JSON for programs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

WIDEST = 60  # characters of one cell
NARROWEST = 10  # of one that is shortened to fit the terminal


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    sys.stdout.flush()


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]], elastic: Collection[str] = ()) -> None:
    """Columns as wide as they need to be, numbers to the right.

    `elastic`: the columns that are shortened, the widest first, until a row fits the terminal, where there is one.
    """
    raw = [list(row) for row in rows]
    table = [list(head), *([cell(value) for value in row] for row in raw)]
    widths = [max(len(row[at]) for row in table) for at in range(len(head))]
    if sys.stdout.isatty():
        _fit(widths, [at for at, name in enumerate(head) if name in elastic], shutil.get_terminal_size().columns)
    number = [any(isinstance(row[at], int | float) for row in raw) for at in range(len(head))]
    for row in table:
        cells = (
            text.rjust(width) if right else shortened(text, width).ljust(width)
            for text, width, right in zip(row, widths, number, strict=True)
        )
        print("  ".join(cells).rstrip())


def _fit(widths: list[int], elastic: list[int], columns: int) -> None:
    while sum(widths) + 2 * (len(widths) - 1) > columns:
        widest = max(elastic, key=lambda at: widths[at], default=None)
        if widest is None or widths[widest] <= NARROWEST:
            return  # a terminal that is as narrow as that has to wrap the lines
        widths[widest] -= 1


def cell(value: Any) -> str:
    """One value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else shortened(str(value))


def shortened(text: str, most: int = WIDEST) -> str:
    """On one line, without what a terminal would take for a command, and not longer than that."""
    line = plain(text).replace("\n", " ").replace("\t", " ")
    return line if len(line) <= most else line[: most - 1] + "…"


def plain(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def ago(iso: str | None) -> str:
    """A moment in ISO 8601, as people say it: `3 min ago`, `in 2 h`."""
    if not iso:
        return "-"
    off_s = (datetime.now(UTC) - datetime.fromisoformat(iso)).total_seconds()
    return f"{span(off_s)} ago" if off_s >= 0 else f"in {span(-off_s)}"


def span(seconds: float) -> str:
    """A length of time in one unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def megabytes(size: int | None) -> str:
    """Bytes, in MB."""
    return "-" if size is None else f"{size / 1e6:.0f} MB"
