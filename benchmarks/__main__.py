"""Measures prefork on this machine, side by side with its bare limit and, if asked for, with peers.

Rounds are interleaved, ratios are taken within a round: so what else the machine does meets all alike. Absolute figures
hold for one run on one machine. Each measurement has a private server, without any persistence, on the loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import chart, sides, table
from benchmarks.results import Results, Summary
from benchmarks.rows import ROWS
from benchmarks.rows.row import PEERS, Row
from benchmarks.scene import FULL, QUICK, TINY, Scale, Scene, bundled_server
from benchmarks.sides import LIMIT, PREFORK, BenchError, Side

GUARD = "throughput"
GUARD_BOUND = 0.35  # of the limit; half of what is aimed at: only a real loss gets below that
GUARD_ROUNDS = 3
GUARD_OTHERS = 15.0  # percent of the machine, beyond which time says little
GUARD_BLIND = 50.0  # beyond which CPU does not either: batches stay small, caches cold


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure, or how it begins (default: all)")
    parser.add_argument("--list", action="store_true", help="say what can be measured, and exit")
    parser.add_argument("--quick", action="store_true", help="less of everything: less than three minutes in all")
    parser.add_argument("--tiny", action="store_true", help="just enough to see that it works; no figures to tell")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each row (default: as the row needs)")
    parser.add_argument(
        "--guard", action="store_true",
        help=f"compare the throughput with the bare limit, in short; exit with 1 if it is below {GUARD_BOUND} of that",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="+", default=[], choices=sides.PEERS, metavar="PEER",
                        help=f"other projects to compare with: {', '.join(sides.PEERS)}")  # fmt: skip
    parser.add_argument("--project", type=Path, metavar="DIR", help="another checkout of prefork to compare with")
    parser.add_argument(
        "--server", metavar="PATH", help="a redis-server or valkey-server (default: the bundled Valkey)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values of all rounds there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw throughput and latency of all sides there")
    parser.add_argument("--cache", type=Path, default=cache(), metavar="DIR", help="where peers are installed")
    options = parser.parse_args()
    known = [name for name in ROWS for asked in options.rows or [""] if name.startswith(asked)]
    for asked in options.rows:
        if not any(name.startswith(asked) for name in ROWS):
            parser.error(f"there is no row {asked!r}; there are {', '.join(ROWS)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    options.rows = [ROWS[name] for name in dict.fromkeys(known)]
    options.scale = TINY if options.tiny else QUICK if options.quick or options.guard else FULL
    if options.guard:
        options.rows = [row for row in ROWS.values() if row.name.startswith(GUARD)]
    return options


def cache() -> Path:
    """Where peers are installed, if nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefork-bench"


def who(options: argparse.Namespace, console: Console) -> dict[str, Side]:
    """All sides by name, in the order in which they take turns. Raises BenchError."""
    found = {LIMIT: sides.limit(), PREFORK: sides.prefork()}
    if options.project:
        side = sides.prefork(options.project.resolve(), f"{PREFORK}@{options.project}")
        found[side.name] = side
    for name in options.peers:
        try:
            with console.status(f"looking for {name}, or installing it"):
                found[name] = sides.peer(name, options.cache)
        except BenchError as error:  # the others are worth having
            console.print(f"bench: {error}", highlight=False, soft_wrap=True)
    return found


def takes_part(row: Row, side: Side) -> bool:
    kind = PREFORK if side.name.startswith(PREFORK) else side.name if side.name == LIMIT else PEERS
    return kind in row.sides


def rounds_of(row: Row, options: argparse.Namespace) -> int:
    """How often it is measured."""
    return int(options.rounds or (GUARD_ROUNDS if options.guard else options.scale.pick(*row.rounds)))


def measure(results: Results, rounds: int, mine: list[Side], scale: Scale, binary: str, progress: Progress) -> None:
    """All rounds of a row: in each, every side in turn."""
    row = results.row
    bar = progress.add_task(row.name, total=rounds * len(mine), side="")
    for number in range(rounds):
        for side in mine:
            progress.update(bar, side=f"round {number + 1}, {side.name}")
            try:
                with Scene(side, scale, binary) as scene:
                    results.rounds[side.name].append(row.measure(scene))
            except Exception as error:  # the other rows are worth having
                results.rounds[side.name].append(None)
                said = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
                results.failures.append(f"round {number + 1}, {side.name}: {said}")
            progress.advance(bar)
    progress.update(bar, side="")


def machine(binary: str) -> dict[str, Any]:
    """Where this was measured."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "server": Path(binary).name,
    }


def guard(console: Console, everything: list[Results]) -> int:
    """Whether the throughput is a share of the limit that it has to be. -> 0 if so, or if nobody can tell"""
    verdicts = [verdict(results) for results in everything]
    for results, (_, said) in zip(everything, verdicts, strict=True):
        console.print(f"{results.row.name}: {said}", highlight=False, soft_wrap=True)
    return 0 if all(good for good, _ in verdicts) else 1


def verdict(results: Results) -> tuple[bool, str]:
    """Of one row of the guard. Where others use the machine, CPU judges in place of time, or nobody if they fill it."""
    if results.failures:
        return False, "not measured"
    by_time = Summary(results.ratios("rate", LIMIT)).median
    by_cpu = 1 / Summary(results.ratios("cpu_us", LIMIT)).median
    others = Summary(results.values(PREFORK, "others")).median
    said = f"{by_time:.2f} of the bare limit by time, {by_cpu:.2f} by CPU; others took {others:.0f} % of the machine"
    if others > GUARD_BLIND:
        return True, f"{said}, too much to judge"
    judged, kind = (by_cpu, "CPU") if others > GUARD_OTHERS else (by_time, "time")
    good = judged >= GUARD_BOUND
    return good, f"{said}, so {kind} counts; at least {GUARD_BOUND} is wanted: {'ok' if good else 'TOO SLOW'}"


def main() -> int:
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 130)
    if options.list:
        for row in options.rows:
            console.print(f"{row.name:21} {row.figures[0].what}", highlight=False)
        return 0
    try:
        binary = options.server or bundled_server()
        all_sides = who(options, console)
    except BenchError as error:
        console.print(f"bench: {error}", highlight=False, soft_wrap=True)
        return 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers are ended
    about, everything, interrupted = machine(binary), [], False
    columns = TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[side]}"), console=console) as progress:
        try:
            for row in options.rows:
                mine = [side for side in all_sides.values() if takes_part(row, side)]
                everything.append(Results(row, {side.name: [] for side in mine}))
                begun = time.monotonic()
                measure(everything[-1], rounds_of(row, options), mine, options.scale, binary, progress)
                if not console.is_terminal:  # where no bar moves
                    progress.print(f"{row.name}: {time.monotonic() - begun:.0f} s")
        except KeyboardInterrupt:
            interrupted = True
    table.print_figures(console, everything, next((name for name in all_sides if "@" in name), ""))
    table.print_sides(console, everything)
    if options.json:
        rounds = {results.row.name: results.rounds for results in everything}
        options.json.write_text(json.dumps({"machine": about, "scale": options.scale.level, "rows": rounds}) + "\n")
    if options.svg:
        options.svg.write_text(chart.svg(everything))
    if interrupted:
        return 130
    if options.guard:
        return guard(console, everything)
    return 1 if any(results.failures for results in everything) else 0


if __name__ == "__main__":
    sys.exit(main())
