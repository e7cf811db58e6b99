"""`prefork`: look into the queues and steer them. Tables for people, `--json` for programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from prefork.cli import look, steer
from prefork.cli.connect import common_flags
from prefork.cli.exits import EXIT_NOTHING, EXIT_USAGE, exit_code
from prefork.errors import PreforkError, ResultUnavailable, TaskFailed, UnknownQueue, UnknownTask, WaitTimeout

NOTHING_FOUND = (ResultUnavailable, UnknownQueue, UnknownTask, WaitTimeout, TaskFailed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. -> its exit code"""
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except NOTHING_FOUND as error:
        print(f"prefork: {error}", file=sys.stderr)
        return EXIT_NOTHING
    except PreforkError as error:
        print(f"prefork: {error}", file=sys.stderr)
        code = exit_code(error)
        return EXIT_USAGE if code == 1 else code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `prefork queues | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefork", description="Look into the queues of prefork, and steer them.", parents=[common_flags(top=True)]
    )
    parser.add_argument("--version", action="version", version=f"prefork {version('prefork')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (look, steer):
        room.add(commands, common_flags(top=False))
    return parser


if __name__ == "__main__":
    sys.exit(main())
