"""The tables at the end, for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.results import Results, Summary
from benchmarks.sides import PREFORK

LABELS = {
    "rate": "tasks/s",
    "worker_us": "CPU of the worker, µs a task",
    "server_us": "CPU of the server, µs a task",
    "commands": "commands",
    "all_commands": "commands, with those in scripts",
    "p50": "median, ms",
    "p99": "99th percentile, ms",
    "one": "one by one, /s",
    "bulk": "in bulk, /s",
    "bytes": "bytes a task",
    "makespan": "makespan, s",
    "cpu": "CPU, %",
    "after": "memory, of one process",
    "whole": "memory, MB",
}
VERDICTS = {True: "[green]ok[/]", False: "[red]short[/]", None: ""}


def shown(value: float) -> str:
    """Three digits that count, all of those before the point."""
    if math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(summary: Summary) -> str:
    """From the least to the greatest."""
    if len(summary.values) == 1:
        return ""
    return f"{shown(min(summary.values))} to {shown(max(summary.values))}"


def print_figures(console: Console, all_results: list[Results], other: str = "") -> None:
    """Each row's figures with their targets; beside those of another checkout, if there is one."""
    table = Table("row", "what", "target", "figure", "spread", "")
    for column in (f"in {other.partition('@')[2]}", "ratio", "spread") if other else ():
        table.add_column(column)
    for results in all_results:
        name = results.row.name
        for figure in results.row.figures:
            if (summary := results.of(figure)) is None:
                continue
            cells = [name, figure.what, figure.target, f"{shown(summary.median)} {figure.unit}".strip()]
            cells += [spread(summary), VERDICTS[summary.good]]
            if other:
                theirs, ratio = results.of(figure, other), Summary(results.ratios(figure.key, other))
                cells += [shown(theirs.median) if theirs else "", shown(ratio.median), spread(ratio)]
            table.add_row(*cells)
            name = ""
    console.print(table)
    for results in all_results:
        for failure in results.failures:
            console.print(f"[red]{results.row.name}[/]: {failure}", highlight=False, soft_wrap=True)


def print_sides(console: Console, all_results: list[Results]) -> None:
    """All sides beside one another, by medians."""
    names = list(dict.fromkeys(name for results in all_results for name in results.rounds))
    if len(names) < 2:
        return
    table = Table("row", "value", *names, title="medians")
    for results in all_results:
        for label, cells in _compared(results, names):
            table.add_row(results.row.name, label, *cells)
    console.print(table)


def _compared(results: Results, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    if set(results.rounds) == {PREFORK}:
        return
    for key in results.row.compared:
        medians = []
        for name in names:
            values = [value for value in results.values(name, key) if not math.isnan(value)]
            medians.append(shown(statistics.median(values)) if values else "")
        yield LABELS.get(key, key), medians
