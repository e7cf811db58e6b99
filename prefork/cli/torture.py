"""`prefork torture`: real workers under random load and random faults, and an account of every task."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from prefork.cli.output import print_json, print_table
from prefork.errors import PreforkError

MOST_MINUTES = 7 * 24 * 60
BAR = 30
EXPLAIN = """\
Starts a private server, workers and producers; kills, stops and cuts them at random; then says what became of each
task. Nothing outside of it is touched. With --broker the faults that need the server's process are left out, and all
keys begin with torture-. Exit code 0: nothing was lost, and each repeat is explained by a fault; 1: something was.
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add this command."""
    parser = commands.add_parser(
        "torture", parents=[common], help="prove that nothing is lost: random load, random faults, an account",
        description=EXPLAIN, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=2.0, metavar="N", help="how long (default: 2)")
    parser.add_argument("--seed", default="", metavar="S", help="the same seed brings the same load and faults")
    parser.add_argument("--server-binary", default="", metavar="PATH", help="a redis-server or valkey-server")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="masters (default: 2)")
    parser.add_argument("--children", type=int, default=4, metavar="N", help="children of each (default: 4)")
    parser.add_argument("--rate", type=float, default=500.0, metavar="N", help="tasks a second (default: 500)")
    parser.add_argument("--pause", type=float, default=1.5, metavar="S", help="mean between two faults (default: 1.5)")
    parser.add_argument("--keep", action="store_true", help="keep ledger and logs also if all is well")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """-> 0 if nothing was lost. Raises PreforkError."""
    from prefork.torture.runner import Order, Torture

    if options.config or options.prefix:
        raise PreforkError("torture has an app and a prefix of its own; it takes --broker or --server-binary")
    if options.broker and options.server_binary:
        raise PreforkError("give --broker or --server-binary, not both")
    for name, least, most in (
        ("minutes", 0.01, MOST_MINUTES), ("workers", 1, 64), ("children", 1, 1000), ("rate", 1, 100_000),
        ("pause", 0.05, 3600),
    ):  # fmt: skip
        if not least <= getattr(options, name) <= most:
            raise PreforkError(f"--{name} is from {least:,} to {most:,}, not {getattr(options, name)}")
    seed = options.seed or os.urandom(4).hex()
    order = Order(
        options.minutes, seed, workers=options.workers, children=options.children, rate=options.rate,
        pause_s=options.pause, broker=options.broker or "", binary=options.server_binary, keep=options.keep,
    )  # fmt: skip
    if not options.json:
        print(f"torture of {options.minutes:g} min, seed {seed}", file=sys.stderr)
    report = Torture(order, _Bar(options.minutes * 60).show).run()
    if options.json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["ok"] else 1


class _Bar:
    """One line that is written over and over, where there is a terminal."""

    def __init__(self, length_s: float) -> None:
        self._length_s, self._begun_s, self._on = length_s, time.monotonic(), sys.stderr.isatty()

    def show(self, share: float, said: dict[str, Any]) -> None:
        """Draw it."""
        if self._on:
            full = round(min(1.0, share) * BAR)
            words = "  ".join(f"{name} {value:,}" for name, value in said.items())
            passed = time.monotonic() - self._begun_s
            print(f"\r\x1b[K[{'#' * full}{'.' * (BAR - full)}] {passed / 60:.1f} min  {words}", end="", file=sys.stderr)
            if share >= 1 and said.get("waiting") == 0:
                print(file=sys.stderr)
                self._on = False


def _print(report: dict[str, Any]) -> None:
    rows = [
        ("accepted", report["accepted"]), ("  perhaps accepted, and were", report["unsure_accepted"]),
        ("  follow-ups", report["follow_ups"]), ("done", report["done"]), ("dead, as they should", report["dead"]),
        ("dead, their child killed too often", report["dead_by_faults"]), ("cancelled", report["cancelled"]),
        ("lost", report["lost"]), ("attempts", report["attempts"]), ("run again after a fault", report["repeats"]),
        *((f"  {why}", n) for why, n in report["repeats_explained"].items()),
        ("faults", report["faults"]), *((f"  {name}", n) for name, n in report["faults_by_name"].items()),
        ("workers started", report["masters_started"]), ("leases lost", report["leases_lost"]),
    ]  # fmt: skip
    print_table(("what", "number"), rows)
    for line in report["findings"]:
        print(line)
    if report["ok"]:
        print("nothing was lost, and each repeat is explained")
    else:
        print(f"NOT AS IT SHOULD BE: {report['broken']}; ledger and logs are in {report['folder']}")
