"""Asking before what can't be undone."""

from __future__ import annotations

import argparse
import sys

from prefork.cli.output import plain
from prefork.errors import PreforkError


def confirm(options: argparse.Namespace, what: str) -> None:
    """Ask, unless --yes was given. Raises PreforkError where nobody can be asked, or the answer is no."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise PreforkError(f"this would {what}; nobody is here to be asked, so say --yes")
    print(plain(f"This will {what}. Go on? [y/N] "), end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise PreforkError("nothing was done")


def counted(count: int, what: str) -> str:
    """`1 task`, `1,000 tasks`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
