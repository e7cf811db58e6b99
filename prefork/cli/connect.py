"""Which broker, and which app, a command is about: `-c`, `--broker`, or the environment."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prefork import config
from prefork.broker.client import Client
from prefork.cli.load import broker_of, load_app
from prefork.errors import AppError, PreforkError

if TYPE_CHECKING:
    from prefork.app import Prefork


def common_flags(*, top: bool) -> argparse.ArgumentParser:
    """The flags that may stand before a command and after it."""
    flags = argparse.ArgumentParser(add_help=False, argument_default=None if top else argparse.SUPPRESS)
    flags.add_argument("-c", "--config", type=Path, metavar="FILE", help="the worker's configuration")
    flags.add_argument("--broker", metavar="URL", help="the broker; without it and -c, $PREFORK_BROKER holds")
    flags.add_argument("--prefix", help="what the names of all keys in the broker begin with (default: prefork)")
    flags.add_argument(
        "--json", action="store_const", const=True, default=False if top else argparse.SUPPRESS,
        help="JSON in place of a table",
    )  # fmt: skip
    return flags


def client_of(options: argparse.Namespace) -> Client:
    """The broker that the options name. Raises PreforkError."""
    settings = config.load(options.config, {}, require_app=False) if options.config else None
    url = options.broker or (settings and broker_of(settings))
    prefix = options.prefix or (settings and settings.prefix)
    if settings and settings.app and not (url and prefix):
        try:
            app = _load(settings)
        except AppError as error:
            raise AppError(f"{error} (with --broker and --prefix the app is not needed)") from None
        return Client(url or app.client.url, prefix or app.prefix)
    url = url or os.environ.get("PREFORK_BROKER")
    if not url:
        raise PreforkError("no broker is named: give -c myapp.conf, --broker URL, or set PREFORK_BROKER")
    return Client(url, prefix or "prefork")


def app_of(options: argparse.Namespace) -> Prefork | None:
    """The app that the configuration names, imported; None without one. Raises PreforkError."""
    settings = config.load(options.config, {}, require_app=False) if options.config else None
    if settings is None or settings.app is None:
        return None
    app = _load(settings)
    app.connect_to(options.broker, options.prefix)
    return app


def _load(settings: config.Settings) -> Prefork:
    """The app. What it prints at its import is no part of a command's output."""
    with contextlib.redirect_stdout(sys.stderr):
        return load_app(settings)
