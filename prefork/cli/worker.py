"""`prefork-worker`: run a worker, check what it would run, or ask one that runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prefork import config
from prefork.cli.exits import EXIT_DOWN, EXIT_INTERRUPTED, exit_code
from prefork.config import KEYS, Settings
from prefork.errors import PreforkError

OVERRIDES = ("concurrency", "queues", "log_level")
SECRET = ("broker", "broker_password_file", "signing_keys", "signing_keys_file")
PING_LIMIT_S, READY_LIMIT_S = 2.0, 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. -> its exit code: 0 only after a stop that was asked for"""
    options = _parser().parse_args(argv)
    try:
        flags = {key: raw for key in OVERRIDES if (raw := getattr(options, key)) is not None}
        if options.ping or options.ready:
            # They may come from an environment, or a file, that only the worker can read.
            flags |= dict.fromkeys(SECRET, "unused")
        settings = config.load(options.config, flags)
        if options.ping or options.ready:
            return _ask(options.config, settings, ready=options.ready)
        # A health check that runs every few seconds has no use for the rest, whose import takes most of its time.
        from prefork.cli import start

        if options.check:
            return start.check(settings)
        return start.run(settings, options.config, burst=options.burst)
    except PreforkError as error:
        print(f"prefork-worker: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:  # before the worker is up; then INT is a signal like others
        print("prefork-worker: interrupted before it was up", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefork-worker", description="Run the tasks of an app.")
    add = parser.add_argument
    add("-c", "--config", type=Path, required=True, metavar="FILE", help="the configuration, such as myapp.conf")
    add("-n", "--concurrency", metavar="N", help=KEYS["concurrency"].doc)
    add("-Q", "--queues", metavar="NAMES", help=KEYS["queues"].doc)
    add("--log-level", metavar="LEVEL", help=KEYS["log_level"].doc)
    add("--burst", action="store_true", help="run what is there, and exit")
    instead = parser.add_mutually_exclusive_group()
    add = instead.add_argument
    add("--check", action="store_true", help="check configuration, app and broker, say so in one line, and exit")
    add("--ping", action="store_true", help="ask the running worker whether its loop turns, and exit: 0 yes, 1 no")
    add("--ready", action="store_true", help="as --ping, and whether its children are up and the broker is reachable")
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and exit")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"prefork {version('prefork')}")
        parser.exit()


def _ask(conf: Path, settings: Settings, *, ready: bool) -> int:
    """Ask each worker of this configuration: without the app, without the broker."""
    from prefork.worker import status

    found = status.sockets(conf, settings.pidfile, settings.user)
    answered = 0
    for path in found:
        try:
            told = status.ask(path, READY_LIMIT_S if ready else PING_LIMIT_S)
        except TimeoutError:
            return _down(f"the worker behind {path} does not answer: its loop stands still")
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
            continue  # what a worker that was killed has left
        except OSError as error:
            return _down(f"cannot ask the worker behind {path}: {error.strerror or error}")
        answered += 1
        if ready and not told["ready"]:
            states = ", ".join(sorted({child["state"] for child in told["children"]})) or "none"
            return _down(f"pid {told['pid']} is not ready: {told['phase']}, broker {told['broker']}, children {states}")
    if not answered:
        return _down(f"no worker of {conf} answers here: none runs, or it is still starting")
    print("ready" if ready else "pong")
    return 0


def _down(said: str) -> int:
    print(f"prefork-worker: {said}", file=sys.stderr)
    return EXIT_DOWN


if __name__ == "__main__":
    sys.exit(main())
