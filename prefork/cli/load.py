"""From a configuration to an app: what both commands need before they can begin."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from pathlib import Path

import psutil

from prefork.app import Prefork
from prefork.config import Settings
from prefork.errors import AppError

EXIT_USAGE, EXIT_BROKER, EXIT_APP, EXIT_CONFIG = 64, 69, 70, 78  # as sysexits.h names them


def load_app(settings: Settings) -> Prefork:
    """Import the app that the configuration names, from its directory, and connect it to its broker.

    Raises AppError, in one line that says where in the app's own code it went wrong.
    """
    assert settings.app
    os.chdir(settings.directory)
    sys.path.insert(0, str(settings.directory))
    name, _, attribute = settings.app.partition(":")
    try:
        module = importlib.import_module(name)
    except AppError as error:
        raise AppError(f"cannot import {name}: {error} ({_where(error)})") from None
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise AppError(
                f"there is no module {name}; it is looked for in {settings.directory} (see `directory`) and where "
                f"{sys.executable} has its packages"
            ) from None
        raise AppError(f"cannot import {name}: {error} ({_where(error)})") from None
    except SystemExit as error:
        raise AppError(f"cannot import {name}: it calls sys.exit({error.code!r}) ({_where(error)})") from None
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise AppError(f"cannot import {name}: {said} ({_where(error)})") from None
    app = getattr(module, attribute, None)
    if app is None:
        there = [key for key, value in vars(module).items() if isinstance(value, Prefork)]
        hint = f"; did you mean {name}:{there[0]}?" if there else "; it has no Prefork at all"
        raise AppError(f"module {name} has no {attribute!r}{hint}")
    if not isinstance(app, Prefork):
        raise AppError(f"{settings.app} is a {type(app).__name__}, not a Prefork; name the app: app = Prefork(...)")
    if not app.tasks:
        raise AppError(
            f"{settings.app} has no tasks; decorate functions with @{attribute}.task, and import their modules in "
            f"{name}"
        )
    app.connect_to(settings.broker, settings.prefix)
    return app


def left_behind() -> list[str]:
    """What an app's import has left running, which a forked child can't use: threads and connections, by name."""
    threads = [f"thread {t.name!r}" for t in threading.enumerate() if t is not threading.main_thread()]
    try:
        sockets = [f"connection to {c.raddr.ip}:{c.raddr.port}" for c in psutil.Process().net_connections() if c.raddr]
    except (psutil.Error, OSError, AttributeError):
        sockets = []
    return threads + sockets


def _where(error: BaseException) -> str:
    """The last place in the app's own code that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    own = [f for f in frames if not f.filename.startswith(("<frozen", ours))]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "at its import"
