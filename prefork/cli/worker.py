"""`prefork-worker`: run a worker."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from prefork import config
from prefork.app import Prefork
from prefork.cli.load import EXIT_APP, EXIT_BROKER, EXIT_CONFIG, left_behind, load_app
from prefork.config import KEYS, Settings
from prefork.errors import AppError, BrokerError, ConfigError, InvalidOption, PreforkError
from prefork.worker import logs
from prefork.worker.master import Master

log = logging.getLogger("prefork")
OVERRIDES = ("concurrency", "queues", "log_level")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. -> its exit code: 0 only after a stop that was asked for"""
    options = _parser().parse_args(argv)
    try:
        settings = config.load(options.config, {key: raw for key in OVERRIDES if (raw := getattr(options, key))})
        handler = logs.set_up(settings.log_level, settings.log_format)
        app = load_app(settings)
        app.client.connection()
        if options.check:
            return _report(app, settings)
        app.client.close()
    except PreforkError as error:
        print(f"prefork-worker: {error}", file=sys.stderr)
        return _exit_code(error)
    if left := left_behind():
        log.warning("the import of %s leaves %s behind, which its children can't use; open them in @app.on_child_start",
                    settings.app, ", ".join(left[:5]))  # fmt: skip
    Master(app, settings, handler, burst=options.burst).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prefork-worker", description="Run the tasks of an app.")
    add = parser.add_argument
    add("-c", "--config", type=Path, required=True, metavar="FILE", help="the configuration, such as myapp.conf")
    add("-n", "--concurrency", metavar="N", help=KEYS["concurrency"].doc)
    add("-Q", "--queues", metavar="NAMES", help=KEYS["queues"].doc)
    add("--log-level", metavar="LEVEL", help=KEYS["log_level"].doc)
    add("--check", action="store_true", help="check configuration, app and broker, say so in one line, and exit")
    add("--burst", action="store_true", help="run what is there, and exit")
    add("--version", action="version", version=f"prefork {version('prefork')}")
    return parser


def _report(app: Prefork, settings: Settings) -> int:
    info = app.client.info()
    names = ", ".join(settings.queues.names)
    server = f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {info.get('redis_version')}"
    elsewhere = {t.options.queue_name for t in app.tasks.values()} - set(settings.queues.names)
    note = f"; nobody here listens to {', '.join(sorted(elsewhere))}" if elsewhere else ""
    print(f"ok: {settings.app} has {len(app.tasks)} tasks, {app.client.shown} is {server}, queues {names}{note}")
    return 0


def _exit_code(error: PreforkError) -> int:
    kinds = ((ConfigError, EXIT_CONFIG), (AppError, EXIT_APP), (BrokerError, EXIT_BROKER), (InvalidOption, EXIT_CONFIG))
    return next((code for kind, code in kinds if isinstance(error, kind)), 1)


if __name__ == "__main__":
    sys.exit(main())
