"""myapp.conf -> Settings. `KEYS` is the one table of what may be set; `load` reads file and flags by it.

1. `_read`: the section [prefork] of the file -> raw text of each key with its line; flags are laid over it.
2. Each raw text goes through the parser of its key, whose ValueError becomes a ConfigError with file:line or flag.
"""

from __future__ import annotations

import configparser
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prefork import values
from prefork.errors import ConfigError
from prefork.values import Queues, quote

SECTION = "prefork"
_ENVIRONMENT = re.compile(r"%\(ENV_([^)]*)\)s")
_COMMENT = re.compile(r"(?:^|\s)[#;].*")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a worker, checked. `_s` is seconds. What each one means stands in `KEYS`."""

    app: str | None  # None only after load(require_app=False)
    broker: str | None = field(repr=False)  # its URL may hold a password
    broker_password_file: Path | None  # absolute
    queues: Queues
    concurrency: int
    shutdown_timeout_s: float
    timeout_s: float | None
    max_tasks_per_child: int | None
    max_memory_per_child_bytes: int | None
    max_memory_bytes: int | None
    lease_s: float
    durability: str | None  # of outcomes; see broker/durability.py
    log_level: str
    log_format: str
    prefix: str | None
    directory: Path  # absolute, symlinks kept
    pidfile: Path | None  # absolute
    user: str | None  # name or name:group, both known here
    max_crashes: int
    max_takeovers: int
    dead_max: int
    dead_ttl_s: float
    signing_keys: tuple[str, ...] | None = field(repr=False)
    signing_keys_file: Path | None  # absolute


def usable_cores() -> int:
    """The number of cores this process may use (taskset and cpusets count, CPU quotas don't)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Key:
    """One key: `default` is written as in the file (None: see `doc`), `unit` ends the field's name in Settings."""

    name: str
    parse: Callable[[str], Any]
    default: str | None
    doc: str
    unit: str = ""
    lines: bool = False  # whether the value may go on over several lines

    @property
    def field(self) -> str:
        return f"{self.name}_{self.unit}" if self.unit else self.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


_number, _time = partial(values.within, values.whole), partial(values.within, values.duration)
FILES = ("broker_password_file", "directory", "pidfile", "signing_keys_file")  # relative to the file's folder
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_MANY = str(10**9)
_TABLE = (
    Key("app", values.app, None, "The app, as module:attribute. Required."),
    Key("broker", str, None, "URL of Redis or Valkey. Default: the app's own broker."),
    Key("broker_password_file", values.path, None, "File with the broker's password, for `broker`. Default: none."),
    Key("queues", values.queues, "default", "Strict order: mail, default. By weight: mail:3, default:1.", lines=True),
    Key("concurrency", _number("1", "1000"), None, "Number of children. Default: one for each usable core."),
    Key("shutdown_timeout", _time("0s", "1d"), "8", "Seconds that tasks may still run after TERM; 0: none.", "s"),
    Key("timeout", _time("1ms", "365d", none=True), "none", "Seconds until a task is killed, or none.", "s"),
    Key("max_tasks_per_child", _number("1", _MANY, none=True), "none", "Tasks until a child is replaced, or none."),
    Key("max_memory_per_child", values.size, "none", "Size, as 200MB, at which a child is replaced, or none.", "bytes"),
    Key(
        "max_memory",
        values.size,
        "none",
        "Size of all together at which the largest one is killed, or none.",
        "bytes",
    ),
    Key("lease", _time("1s", "1h"), "10", "Seconds of silence until others take over this worker's tasks.", "s"),
    Key("durability", values.durability, None, "What outcomes wait for: fsync or replicas:N. Default: nothing."),
    Key("log_level", values.one_of(*_LEVELS), "info", "debug, info, warning, error or critical."),
    Key("log_format", values.one_of("text", "json"), "text", "text for people, json for machines; one line each."),
    Key("prefix", values.prefix, None, "What the names of all keys in Redis begin with. Default: the app's own."),
    Key("directory", values.directory, None, "Folder to import the app from. Default: the folder of this file."),
    Key("pidfile", values.pidfile, None, "File for the pid, locked; the status socket is beside it. Default: none."),
    Key("user", values.user, None, "User, or user:group, to become before the app is imported. Default: nobody else."),
    Key("max_crashes", _number("1", _MANY), "3", "Deaths of its child that make a message a dead letter."),
    Key("max_takeovers", _number("1", _MANY), "10", "Deaths of its worker that make a message a dead letter."),
    Key("dead_max", _number("0", _MANY), "10000", "Dead letters kept for each queue; the oldest go first."),
    Key("dead_ttl", _time("1s", "3650d"), "180d", "Seconds that dead letters are kept.", "s"),
    Key("signing_keys", values.signing_keys, None, "Secrets that sign and verify messages. Default: the app's own."),
    Key(
        "signing_keys_file", values.path, None, "File with these secrets, one a line, in place of them. Default: none."
    ),
)
KEYS: dict[str, Key] = {key.name: key for key in _TABLE}


class _Found(NamedTuple):
    raw: str
    where: str | Path  # file or flag
    line: int | None = None


def load(path: Path | None = None, overrides: Mapping[str, str] = {}, *, require_app: bool = True) -> Settings:
    """The settings of the file at `path` (None: defaults only), with `overrides` (key -> raw text of its flag) over it.

    A relative `directory` is relative to the file's folder, from a flag to the current one. A value of the file that a
    flag replaces is not parsed. Raises ConfigError, at file:line or flag, for everything that is wrong.
    """
    found = {} if path is None else _read(path)
    for name, raw in overrides.items():
        if name not in KEYS:
            raise ConfigError("--" + name.replace("_", "-"), None, _unknown(name))
        found[name] = _Found(raw.strip(), KEYS[name].flag)
    if require_app and "app" not in found:
        form = "app = shop.tasks:app" if path else "--app shop.tasks:app"
        raise ConfigError(path or KEYS["app"].flag, None, f"no app is named; give it as module:attribute: {form}")
    found.setdefault("directory", _Found(".", path or KEYS["directory"].flag))

    parsed: dict[str, Any] = {k.field: None if k.default is None else k.parse(k.default) for k in KEYS.values()}
    parsed["concurrency"] = usable_cores()
    for name, (raw, where, line) in sorted(found.items(), key=lambda it: it[0] != "user"):  # others need to know it
        try:
            base = where.parent if isinstance(where, Path) else Path()
            parsed[KEYS[name].field] = _parse(KEYS[name], _with_environment(raw), base, parsed["user"])
        except (ValueError, OSError) as error:  # OSError: the current folder is gone
            raise ConfigError(where, line, f"{name}: {error}" if isinstance(where, Path) else str(error)) from None
    scheme, _, folder = (parsed["broker"] or "").partition(":")
    if scheme == "embedded" and folder.strip():  # the same folder for all who read this file, from wherever
        parsed["broker"] = "embedded:" + os.path.join(parsed["directory"], _at_home(folder.strip(), parsed["user"]))
    return Settings(**parsed)


def _with_environment(raw: str) -> str:
    """As supervisord does it; every other % stays, since URLs have some."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment has no {quote(match[1])}; set it, or correct %(ENV_…)s")
        return os.environ[match[1]]

    return _ENVIRONMENT.sub(value, raw)


def _parse(key: Key, raw: str, base: Path, user: str | None) -> object:
    if not raw:
        raise ValueError("has no value; give it one or leave the key out")
    unseen = next((c for c in raw if not c.isprintable() and c != "\t"), None)
    if unseen is not None:
        raise ValueError(f"holds the character {unseen!a}, which cannot be seen; remove it")
    return key.parse(os.path.join(base, _at_home(raw, user)) if key.name in FILES else raw)


def _at_home(path: str, user: str | None) -> str:
    """With `~` as the home of whom the worker becomes: before it does, after a reload, and for whoever asks it."""
    if user and re.match("~(/|$)", path):
        path = "~" + user.partition(":")[0] + path[1:]
    return os.path.expanduser(path)


class _Ini(configparser.ConfigParser):
    """The dialect: only `=`, keys keep their case, [DEFAULT] is nothing special. `lines`: key or [section] -> line."""

    def __init__(self) -> None:
        self.line, self.lines = 0, dict[str, int]()
        super().__init__(interpolation=None, delimiters=("=",), default_section="", empty_lines_in_values=False)

    def optionxform(self, optionstr: str) -> str:
        self.lines.setdefault(optionstr, self.line)  # called with each key just when its line is read
        return optionstr

    def ours(self, text: str) -> Iterator[str]:
        """The lines without comments, those of other sections blank: the app may write its own as it likes.

        configparser's own inline comments would keep `# a` in `redis://:p#w@host # a ; b`.
        """
        inside = True
        for self.line, full in enumerate(io.StringIO(text, newline=None), start=1):
            line = _COMMENT.sub("", full)
            if header := self.SECTCRE.match(line):
                inside = header["header"] == SECTION
                self.lines.setdefault(f"[{header['header']}]", self.line)
            yield line if inside else ""


def _read(path: Path) -> dict[str, _Found]:
    """The keys of [prefork], known but not parsed. No error here quotes a line: it may hold the broker's password."""
    text, ini = _text(path), _Ini()
    malformed = "this line is not 'key = value'; write it so, with '='"
    try:
        ini.read_file(ini.ours(text))
    except configparser.DuplicateSectionError as error:
        raise ConfigError(path, error.lineno, f"duplicate section {quote(str(error.section))}; merge them") from None
    except configparser.DuplicateOptionError as error:
        first = ini.lines[error.option]
        raise ConfigError(path, error.lineno, f"duplicate key, set on line {first} already; remove one") from None
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError(path, error.lineno, f"this line is in no section; put [{SECTION}] above it") from None
    except configparser.ParsingError as error:
        raise ConfigError(path, error.errors[0][0], malformed) from None
    if not ini.has_section(SECTION):
        missing = f"there is no section [{SECTION}]"
        for header, line in ini.lines.items():
            if difflib.get_close_matches(re.sub("[^a-z]", "", header.lower())[:60], (SECTION, "worker")):
                raise ConfigError(path, line, f"{missing}; did you mean it by {quote(header)}?")
        raise ConfigError(path, None, f"{missing}; put [{SECTION}] on a line above the settings")

    found = {}
    for name, raw in ini.items(SECTION):
        line = ini.lines[name]
        if not re.fullmatch(r"[\w.-]+", name):  # `broker: redis://:password@host?a=b`
            raise ConfigError(path, line, malformed)
        if name not in KEYS:
            raise ConfigError(path, line, _unknown(name))
        if "\n" in raw and not KEYS[name].lines:
            remedy = f"put the value of {name} on one line, or remove the spaces before a key"
            raise ConfigError(path, line + 1, f"an indented line continues the one before; {remedy}")
        found[name] = _Found(raw.replace("\n", " "), path, line)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(path, None, "there is no such file; create it or correct the path") from None
    except IsADirectoryError:
        raise ConfigError(path, None, "this is a folder; name the file in it") from None
    except OSError as error:
        raise ConfigError(path, None, f"cannot be read ({error.strerror}); give this user the right to") from None
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", error.object[: error.start]))
        text = f"the byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise ConfigError(path, line, text) from None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower()[:60], KEYS, n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(KEYS)}"
    return f"unknown key {quote(name)}; {remedy}"
