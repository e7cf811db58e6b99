"""From a configuration to an app: what both commands need before they can begin."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import quote

from prefork.config import Settings
from prefork.errors import AppError, ConfigError, PreforkError
from prefork.signing import Signer, from_file

if TYPE_CHECKING:
    from prefork.app import Prefork

LONGEST_SAID = 300
OURS = str(Path(__file__).parent.parent) + os.sep
NOT_THE_APPS = (*(sysconfig.get_path(of) + os.sep for of in ("stdlib", "platstdlib", "purelib", "platlib")), "<")


def load_app(settings: Settings) -> Prefork:
    """Import the app that the configuration names, from its directory, and connect it to its broker.

    Raises AppError, in one line that says where in the app's own code it went wrong.
    """
    from prefork.app import Prefork  # not for a command that loads none

    assert settings.app
    try:
        os.chdir(settings.directory)
    except OSError as error:  # it is there, but the user that this has become may not enter it
        raise ConfigError("directory", None, f"{settings.directory} can't be entered: {error.strerror}") from None
    sys.path.insert(0, str(settings.directory))
    name, _, attribute = settings.app.partition(":")
    module = _import(name, settings.directory)
    try:
        app = getattr(module, attribute)
    except AttributeError:
        there = [key for key, value in vars(module).items() if isinstance(value, Prefork)]
        hint = f"; did you mean {name}:{there[0]}?" if there else "; it has no Prefork at all"
        raise AppError(f"module {name}{_file(module)} has no {attribute!r}{hint}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise AppError(f"cannot get {settings.app}: {_said(error)} ({_where(error)})") from None
    if not isinstance(app, Prefork):
        raise AppError(f"{settings.app} is a {type(app).__name__}, not a Prefork; name the app: app = Prefork(...)")
    if not app.tasks:
        raise AppError(
            f"{settings.app} has no tasks; decorate functions with @{attribute}.task, and import their modules in "
            f"{name}"
        )
    app.connect_to(broker_of(settings), settings.prefix)
    app.signer = signer_of(settings) or app.signer
    return app


def broker_of(settings: Settings) -> str | None:
    """The URL of the broker by the configuration, with its password; None if it names none. Raises ConfigError."""
    file = settings.broker_password_file
    if file is None:
        return settings.broker
    scheme, separator, rest = (settings.broker or "").partition("://")
    if not separator:
        raise ConfigError("broker_password_file", None, "give the broker too, as in broker = redis://user@host:6379/0")
    userinfo, _, place = rest.rpartition("@")
    if ":" in userinfo:
        raise ConfigError("broker_password_file", None, "the broker's URL has a password too; leave one of them out")
    try:
        password = file.read_text("utf-8").strip()
    except OSError as error:
        said = f"cannot be read ({error.strerror}); create it, and give this user the right to"
        raise ConfigError(file, None, f"broker_password_file: {said}") from None
    except UnicodeDecodeError:
        raise ConfigError(
            file, None, "broker_password_file: is not UTF-8; write the password into it, and no more"
        ) from None
    if not password or len(password.splitlines()) > 1:
        raise ConfigError(file, None, "broker_password_file: holds no single line; write the password into it")
    return f"{scheme}://{userinfo}:{quote(password, safe='')}@{place}"


def signer_of(settings: Settings) -> Signer | None:
    """Who signs and verifies, by the configuration; None if it has no keys. Raises ConfigError, which quotes none."""
    file, keys = settings.signing_keys_file, settings.signing_keys
    if file is None:
        return None if keys is None else _signer("signing_keys", None, lambda: Signer(keys))
    if keys is not None:
        raise ConfigError("signing_keys_file", None, "signing_keys is given too; leave one of them out")
    return _signer("signing_keys_file", file, lambda: from_file(file))


def _signer(key: str, file: Path | None, make: Callable[[], Signer]) -> Signer:
    try:
        return make()
    except OSError as error:
        said = f"cannot be read ({error.strerror}); create it, and give this user the right to"
    except ValueError as error:
        said = str(error)
    raise ConfigError(file or key, None, f"{key}: {said}" if file else said)


def _import(name: str, directory: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            parent = sys.modules.get(error.name.rpartition(".")[0])
            if parent and not hasattr(parent, "__path__"):
                raise AppError(
                    f"there is no module {name}: {parent.__name__}{_file(parent)} is not a package; correct `app`"
                ) from None
            raise AppError(
                f"there is no module {name}; it is looked for in {directory} (see `directory`) and where "
                f"{sys.executable} has its packages"
            ) from None
        raise AppError(f"cannot import {name}: {_said(error)} ({_where(error)})") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise AppError(f"cannot import {name}: {_said(error)} ({_where(error)})") from None


def left_behind() -> list[str]:
    """What an app's import has left running, which a forked child can't use: threads and connections, by name."""
    import psutil

    threads = [f"thread {t.name!r}" for t in threading.enumerate() if t is not threading.main_thread()]
    try:
        sockets = [f"connection to {c.raddr.ip}:{c.raddr.port}" for c in psutil.Process().net_connections() if c.raddr]
    except (psutil.Error, OSError, AttributeError):
        sockets = []
    return threads + sockets


def _file(module: ModuleType) -> str:
    return f" ({module.__file__})" if getattr(module, "__file__", None) else ""


def _said(error: BaseException) -> str:
    """What an error of the app says, on one line that a terminal may show."""
    if isinstance(error, SystemExit):
        text = f"it calls sys.exit({error.code!r})"
    else:
        try:
            text = str(error)
        except BaseException:
            text = ""
        # Ours say all that there is to say; of others the class is the half of it.
        if not isinstance(error, PreforkError) and type(error) is not ModuleNotFoundError:
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    line = (text.strip().splitlines() or [""])[0]
    short = line if len(line) <= LONGEST_SAID else line[:LONGEST_SAID] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)


def _where(error: BaseException) -> str:
    """The last place in the app's own code that an error came through."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((OURS, "<frozen"))]
    own = [f for f in frames if not f.filename.startswith(NOT_THE_APPS) and "-packages/" not in f.filename]
    last = (own or frames)[-1:]
    return f"{last[0].filename}:{last[0].lineno}" if last else "at its import"
