"""`prefork doctor`: what is wrong, or could go wrong, each with its remedy; `--repair` does what can be done."""

from __future__ import annotations

import argparse
from typing import Any

from prefork.broker.client import Client
from prefork.broker.doctor import examine
from prefork.broker.finding import Finding
from prefork.cli.confirm import confirm, counted
from prefork.cli.connect import client_of
from prefork.cli.output import plain, print_json

MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}
MOST_ROUNDS = 20  # what is repaired may show what else is wrong
Commands = Any  # argparse names the type of `add_subparsers` privately


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add this command."""
    doctor = commands.add_parser("doctor", parents=[common], help="what is wrong, or could go wrong, with the remedy")
    doctor.add_argument("--repair", action="store_true", help="repair what can be, and say what was done")
    doctor.add_argument("--yes", action="store_true", help="do not ask whether to repair it")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look, repair if asked to, and tell. -> 1 if there is an error left"""
    client = client_of(options)
    findings = list(examine(client))
    repaired: list[tuple[Finding, str]] = []
    if options.repair and any(finding.mend for finding in findings):
        if not options.json:
            _print(finding for finding in findings if finding.mend)
        count = sum(finding.mend is not None for finding in findings)
        confirm(options, f"repair {counted(count, 'fault')}, as said behind each")
        findings = _repair(client, findings, repaired, quiet=options.json)
    if options.json:
        print_json([it.told(done) for it, done in repaired] + [finding.told() for finding in findings])
    else:
        _print(findings)
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _repair(
    client: Client, findings: list[Finding], repaired: list[tuple[Finding, str]], *, quiet: bool
) -> list[Finding]:
    """Repair, look again, until nothing is left that can be repaired. -> what is left"""
    for _ in range(MOST_ROUNDS):
        mendable = [(finding, finding.mend) for finding in findings if finding.mend]
        for finding, mend in mendable:
            repaired.append((finding, mend()))
            if not quiet:
                print(plain(f"repaired {repaired[-1][1]}"), flush=True)
        if not mendable:
            break
        findings = list(examine(client))
    return findings


def _print(findings: Any) -> None:
    for finding in findings:
        remedy = f"\n         -> {finding.remedy}" if finding.remedy else ""
        print(plain(f"{MARKS[finding.level]}  {finding.what}{remedy}"))
