"""`prefork`: look into the queues. Tables for people, `--json` for programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from prefork import config
from prefork.broker import doctor, survey
from prefork.broker.client import Client
from prefork.cli.load import EXIT_APP, EXIT_BROKER, EXIT_CONFIG, EXIT_USAGE, load_app
from prefork.errors import AppError, BrokerError, ConfigError, PreforkError, ResultUnavailable

MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. -> its exit code"""
    options = _parser().parse_args(argv)
    try:
        client = _client(options)
        run = {"queues": _queues, "show": _show, "doctor": _doctor}[options.command]
        return run(client, options)
    except ResultUnavailable as error:
        print(f"prefork: {error}", file=sys.stderr)
        return 1
    except PreforkError as error:
        print(f"prefork: {error}", file=sys.stderr)
        kinds = ((ConfigError, EXIT_CONFIG), (BrokerError, EXIT_BROKER), (AppError, EXIT_APP))
        return next((code for kind, code in kinds if isinstance(error, kind)), EXIT_USAGE)
    except BrokenPipeError:  # `prefork queues | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-c", "--config", type=Path, metavar="FILE", help="the worker's configuration")
    common.add_argument("--broker", metavar="URL", help="the broker; without it and -c, $PREFORK_BROKER holds")
    common.add_argument("--json", action="store_true", help="JSON in place of a table")
    parser = argparse.ArgumentParser(prog="prefork", description="Look into the queues of prefork.")
    parser.add_argument("--version", action="version", version=f"prefork {version('prefork')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("queues", parents=[common], help="what each queue holds")
    show = commands.add_parser("show", parents=[common], help="everything that is known of one task")
    show.add_argument("id", help="the task's id")
    commands.add_parser("doctor", parents=[common], help="what is wrong, or could go wrong, with the remedy")
    return parser


def _client(options: argparse.Namespace) -> Client:
    settings = config.load(options.config, {}, require_app=False) if options.config else None
    url = options.broker or (settings and settings.broker)
    prefix = (settings and settings.prefix) or "prefork"
    if not url and settings and settings.app:
        return load_app(settings).client
    url = url or os.environ.get("PREFORK_BROKER")
    if not url:
        raise PreforkError("no broker is named: give -c myapp.conf, --broker URL, or set PREFORK_BROKER")
    return Client(url, prefix)


def _queues(client: Client, options: argparse.Namespace) -> int:
    reports = survey.queues(client)
    if options.json:
        _print_json(reports)
    elif not reports:
        print(f"no queue was ever used under the prefix {client.prefix!r}; see `prefix` in the configuration")
    else:
        _print_table(reports[0].keys(), (report.values() for report in reports))
    return 0


def _show(client: Client, options: argparse.Namespace) -> int:
    known = survey.task(client, options.id)
    if options.json:
        _print_json(known)
        return 0
    errors = known.pop("errors", [])
    width = max(map(len, known))
    for name, value in known.items():
        print(f"{name:{width}}  {_plain(value if isinstance(value, str) else orjson.dumps(value).decode())}")
    for error in errors:
        attempt = f"attempt {error['attempt']}: " if "attempt" in error else ""
        print(_plain(f"\n{attempt}{error.get('class', '')}: {error.get('message', '')}"))
        if error.get("traceback"):
            print(_plain(error["traceback"].rstrip()))
    return 0


def _doctor(client: Client, options: argparse.Namespace) -> int:
    findings = list(doctor.examine(client))
    if options.json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(
                f"{MARKS[finding.level]}  {finding.what}"
                + (f"\n         -> {finding.remedy}" if finding.remedy else "")
            )
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    sys.stdout.flush()


def _print_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Columns as wide as they need to be; numbers to the right."""
    table = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else _plain(str(value))
    )


def _plain(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


if __name__ == "__main__":
    sys.exit(main())
