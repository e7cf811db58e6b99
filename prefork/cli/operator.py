"""`prefork`: look into the queues and steer them. Tables for people, `--json` for programs."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from prefork.cli import acl, doctor, look, steer, torture
from prefork.cli.connect import common_flags
from prefork.cli.exits import EXIT_NOTHING, EXIT_USAGE, exit_code
from prefork.cli.output import plain
from prefork.errors import (
    InvalidOption,
    PreforkError,
    ResultUnavailable,
    TaskFailed,
    UnknownQueue,
    UnknownTask,
    WaitTimeout,
)

NOTHING_FOUND = (ResultUnavailable, UnknownQueue, UnknownTask, WaitTimeout, TaskFailed)
EXAMPLES = """\
examples:
  prefork queues -c myapp.conf                   what waits, runs and has failed
  prefork workers -c myapp.conf                  who works, and on what
  prefork list default --state dead              what has failed for good
  prefork show 01a20ba2946a7b09923474bb9927d8b7  everything about one task
  prefork retry --dead default                   run all of it again
  prefork cancel 01a20ba2946a7b09923474bb9927d8b7
  prefork enqueue shop.send_invoice --args '[7]' -c myapp.conf --wait 10
  prefork doctor --broker redis://broker:6379/0  what is wrong, and what to do
  prefork torture --minutes 2                    prove on this machine that nothing is lost

Without -c and --broker, the broker is $PREFORK_BROKER. `prefork COMMAND --help` tells more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. -> its exit code"""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has every character
    options = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        _check_encoding(options)
        code = run(options)
        sys.stdout.flush()
        return code
    except NOTHING_FOUND as error:
        _complain(error)
        return EXIT_NOTHING
    except PreforkError as error:
        _complain(error)
        # The options that a command is given are no fault of the configuration's.
        code = 1 if isinstance(error, InvalidOption) else exit_code(error)
        return EXIT_USAGE if code == 1 else code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `prefork queues | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _complain(error: PreforkError) -> None:
    """In one line that a terminal may show."""
    first = (str(error).splitlines() or [""])[0]
    print(plain(f"prefork: {first}"), file=sys.stderr)


def _check_encoding(options: argparse.Namespace) -> None:
    """Refuse what no queue, task or id can be called. Raises PreforkError."""
    for value in vars(options).values():
        for word in value if isinstance(value, list) else (value,):
            if isinstance(word, str) and not word.isascii():
                try:
                    word.encode()
                except UnicodeEncodeError:
                    raise PreforkError(f"{word!a} is not UTF-8") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefork", description="Look into the queues of prefork, and steer them.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, parents=[common_flags(top=True)],
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (look, doctor, steer, torture, acl):
        room.add(commands, common_flags(top=False))
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"prefork {version('prefork')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
