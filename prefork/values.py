"""The values of a configuration, from the text that a user wrote. Each parser raises ValueError that says what fits."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_UNITS = {"d": Fraction(86400), "h": Fraction(3600), "m": Fraction(60), "s": Fraction(1), "ms": Fraction(1, 1000)}
_SIZES = {"": 1} | {f"{k}b": 1000**n for n, k in enumerate("kmgtp", 1)}
_SIZES |= {f"{k}ib": 1024**n for n, k in enumerate("kmgtp", 1)}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([kmgtp]i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?) ?(ms|[smhd])?")
LONGEST_PIDFILE = 98  # a socket's path has 103 bytes at most on macOS, and this one ends in .sock


@dataclass(frozen=True, slots=True)
class Queues:
    """What a worker listens to: `weights` None means strict order, the first name first; else one weight per name."""

    names: tuple[str, ...]
    weights: tuple[int, ...] | None = None


def duration(text: str) -> float:
    """Seconds in `8`, `0.5`, `500ms`, `30s`, `5m`, `2h` or `180d`; ValueError for anything else."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a time, as 10, 500ms, 30s, 5m, 2h or 180d, not {quote(text)}")
    return float(Fraction(match[1]) * _UNITS[match[2] or "s"])


def queue_name(name: str) -> str:
    """`name` itself when a queue may be called so, else ValueError: it becomes a part of keys in Redis."""
    if not _plain(name, "{}:,"):
        rule = "1 to 100 characters without whitespace, '{', '}', ':' or ','"
        raise ValueError(f"{quote(name)} is not a queue name ({rule})")
    return name


def _plain(text: str, banned: str) -> bool:
    return 1 <= len(text) <= 100 and all(c.isprintable() and not c.isspace() and c not in banned for c in text)


def quote(raw: str) -> str:
    return repr(raw if len(raw) <= 60 else raw[:59] + "…")


def whole(text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text):
        raise ValueError
    return int(text)


def within(read: Callable[[str], float], low: str, high: str, *, none: bool = False) -> Callable[[str], float | None]:
    """A parser of what `read` reads, from `low` to `high`, both written as a user would; `none`: that word is None."""

    def parse(raw: str) -> float | None:
        if none and raw.lower() == "none":
            return None
        with suppress(ValueError):
            if read(low) <= (value := read(raw)) <= read(high):
                return value
        kind = "a whole number" if read is whole else "a time in seconds (or as 500ms, 5m, 2h, 1d)"
        raise ValueError(f"must be {kind} from {low} to {high}{' or none' * none}, not {quote(raw)}")

    return parse


def size(raw: str) -> int | None:
    if raw.lower() == "none":
        return None
    match = _SIZE.fullmatch(raw)
    size = int(Fraction(match[1]) * _SIZES[(match[2] or "").lower()]) if match else 0
    if not 1 << 20 <= size <= 1 << 50:
        raise ValueError(f"must be a size from 1MiB to 1PiB, as 200MB, 1.5GB or 512MiB, or none, not {quote(raw)}")
    return size


def one_of(*words: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw.lower() not in (known := {word.lower(): word for word in words}):
            raise ValueError(f"must be one of {', '.join(known)}, not {quote(raw)}")
        return known[raw.lower()]

    return parse


def durability(raw: str) -> str:
    """`fsync` or `replicas:N`."""
    if not isinstance(raw, str) or not re.fullmatch("fsync|replicas:[1-9][0-9]?", raw):
        raise ValueError(f"must be 'fsync' or 'replicas:N' with N from 1 to 99, not {raw!r}")
    return raw


def app(raw: str) -> str:
    module, _, attribute = raw.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(f"must have the form module:attribute, as in shop.tasks:app, not {quote(raw)}")
    return raw


def queues(raw: str) -> Queues:
    items = [[part.strip() for part in item.split(":", 1)] for item in raw.split(",")]
    if [""] in items:
        raise ValueError("has an empty name; remove the comma too many")
    names = tuple(queue_name(item[0]) for item in items)
    for at, name in enumerate(names):
        if name in names[:at]:
            raise ValueError(f"names {quote(name)} twice; remove one")
    bare = [item[0] for item in items if len(item) == 1]
    if len(bare) == len(items):
        return Queues(names)
    if bare:
        raise ValueError(f"{quote(bare[0])} has no weight but others have; give all of them one (mail:3) or none")
    for name, weight in items:
        if not re.fullmatch("[1-9][0-9]{0,2}|1000", weight):
            raise ValueError(f"the weight of {name!r} must be a whole number from 1 to 1000, not {quote(weight)}")
    return Queues(names, tuple(int(weight) for _, weight in items))


def prefix(raw: str) -> str:
    if not _plain(raw, "{}"):
        raise ValueError(f"must be 1 to 100 characters without whitespace, '{{' or '}}', not {quote(raw)}")
    return raw


def directory(raw: str) -> Path:
    folder = Path(raw).absolute()  # `resolve` would pin what a symlink like `current` means today
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {str(folder)!r}; create it or correct the path")
    return folder


def pidfile(raw: str) -> Path:
    path = Path(raw).absolute()
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file in it")
    if len(os.fsencode(path)) > LONGEST_PIDFILE:
        raise ValueError(f"has more than {LONGEST_PIDFILE} bytes, too long for the status socket beside it")
    return path


def path(raw: str) -> Path:
    return Path(raw).absolute()


def signing_keys(raw: str) -> tuple[str, ...]:
    """They are checked by who signs with them; no error here may quote one."""
    return tuple(key.strip() for key in raw.split(","))


def user(raw: str) -> str:
    name, colon, group = raw.partition(":")
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise ValueError(f"there is no user {quote(name)} on this host") from None
    if colon:
        try:
            grp.getgrnam(group)
        except KeyError:
            raise ValueError(f"there is no group {quote(group)} on this host") from None
    return raw
