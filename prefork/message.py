"""A message: what travels from `enqueue` to settlement.

In the broker a message is one immutable value, from enqueue to settlement:

    1 1764000000000 0 {"task":"shop.tasks.send_invoice"}\\n[[7],{"copy":true}]
    │ │             │ └ header: the task's name, and what this message says of its own   └ body: args, kwargs
    │ │             └ priority
    │ └ enqueued, ms by the server's clock (the enqueue script puts version, time and priority in front)
    └ version of this format

What changes from attempt to attempt (`State`) stands beside it, under the same id, only for those that need it. So the
master reads the header and passes the body on as bytes, and a message that nobody can decode is kept as it came.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from hashlib import sha256
from typing import Any

import orjson

from prefork.errors import TEN_YEARS_S, BadMessage, NotJSON, PayloadTooLarge

VERSION = b"1"
MAX_PAYLOAD_BYTES = 1 << 20
LARGE_BYTES = 1 << 14  # to copy so much takes longer than what avoids it
MAX_ERRORS_KEPT = 10
MAX_ERROR_TEXT = 16_384
LONGEST_CACHED = 1024  # bytes of a header: what others have written is not to fill the memory
LATEST_MS = 253_402_300_799_999  # the end of the year 9999: no datetime can name a later moment


def new_id() -> str:
    """A UUIDv7 as 32 hexadecimal digits: sortable by time, unique without a server.

    Twelve bits more of the clock than the milliseconds make those of one process ascend. Source: RFC 9562, 5.7 and 6.2
    (method 3).
    """
    unix_ms, rest_ns = divmod(time.time_ns(), 1_000_000)
    random = os.urandom(8).hex()
    return f"{unix_ms:012x}7{rest_ns * 4096 // 1_000_000:03x}{VARIANT[random[0]]}{random[1:]}"


def new_ids(n: int) -> Iterator[str]:
    """The same, n times: the kernel is asked for all their random digits at once."""
    random = os.urandom(8 * n).hex()
    for at in range(0, 16 * n, 16):
        unix_ms, rest_ns = divmod(time.time_ns(), 1_000_000)
        yield f"{unix_ms:012x}7{rest_ns * 4096 // 1_000_000:03x}{VARIANT[random[at]]}{random[at + 1 : at + 16]}"


VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def derived_id(parent_id: str, index: int) -> str:
    """The id of follow-up number `index` of a task: the same for every attempt, so that a repeat enqueues it once."""
    unix_ms = int(parent_id[:12], 16) if is_id(parent_id) else 0
    return _uuid7(unix_ms, index, sha256(f"{parent_id}/{index}".encode()).digest()[:8])


def is_id(text: str) -> bool:
    """Whether it has the form of our ids."""
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def _uuid7(unix_ms: int, fraction: int, random: bytes) -> str:
    low = int.from_bytes(random, "big") & 0x3FFFFFFFFFFFFFFF | 0x8000000000000000
    return f"{unix_ms & 0xFFFFFFFFFFFF:012x}7{fraction & 0xFFF:03x}{low:016x}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a message says of itself. None: the task's own option, as the worker knows it, holds."""

    task: str
    max_retries: int | None = None
    timeout_s: float | None = None
    soft_timeout_s: float | None = None
    expires_s: float | None = None  # after it was enqueued
    expires_ms: int | None = None  # by the server's clock
    due_ms: int | None = None  # when it was asked to run, if later than enqueued
    delay_s: float | None = None  # the same, after it was enqueued

    def encode(self) -> bytes:
        """The header as JSON, without what is None."""
        options = {"task": self.task}
        for name in HEADER_OPTIONS:
            if (value := getattr(self, name)) is not None:
                options[name] = value
        return orjson.dumps(options)


HEADER_OPTIONS = ("max_retries", "timeout_s", "soft_timeout_s", "expires_s", "expires_ms", "due_ms", "delay_s")


@dataclass(slots=True)
class State:
    """What has happened to a message so far. Absent in the broker: nothing has."""

    attempts: int = 0
    retried: int = 0
    crashes: int = 0
    unknown: int = 0  # times that no such task was registered
    due_ms: int = 0  # of the latest retry
    started_ms: int = 0  # of the first attempt
    errors: list[dict[str, Any]] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    progress: list[Any] | None = None

    def encode(self) -> bytes:
        """The state as JSON, without what is empty."""
        return orjson.dumps({name: value for name in STATE_FIELDS if (value := getattr(self, name))})

    @classmethod
    def decode(cls, raw: bytes | None) -> State:
        """From JSON. What is damaged counts as absent: it must not keep a message from running."""
        try:
            told = orjson.loads(raw) if raw else {}
            orjson.dumps(told)  # it reads deeper than it writes
        except (ValueError, TypeError):
            return cls()
        known = told.items() if isinstance(told, dict) else ()
        return cls(**{name: value for name, value in known if name in STATE_FIELDS and _fits(name, value)})

    def add_error(self, error: dict[str, Any]) -> None:
        """Keep an attempt's error: the first one and the latest ones, as many as MAX_ERRORS_KEPT."""
        self.errors.append(error)
        if len(self.errors) > MAX_ERRORS_KEPT:
            del self.errors[1]


STATE_FIELDS = tuple(State.__dataclass_fields__)


def _fits(name: str, value: Any) -> bool:
    if name == "progress":
        return isinstance(value, list) and len(value) == 3
    if name in ("errors", "workers"):
        kind = dict if name == "errors" else str
        return isinstance(value, list) and all(isinstance(item, kind) for item in value)
    limit = LATEST_MS if name.endswith("_ms") else 1 << 31
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


@dataclass(slots=True)
class Message:
    """A claimed message, decoded as far as routing needs; the body is bytes that only a child reads."""

    id: str
    queue: str
    header: Header
    body: bytes | memoryview
    enqueued_ms: int
    priority: int
    state: State | None = None


def decode(raw_id: bytes, queue: str, raw: bytes, state: bytes | None = None) -> Message:
    """Decode an id and a value of the broker. Raises BadMessage, saying what is wrong with them."""
    try:
        id = raw_id.decode()
    except UnicodeDecodeError:
        raise BadMessage(f"a message in queue {queue} has the id {raw_id!r}, which is no text") from None
    at = raw.find(b"\n")
    try:
        if at < 0:
            raise ValueError(f"is not in prefork's format: {raw[:60]!r}")
        header, since_ms, rank = (_head if at <= LONGEST_CACHED else _head.__wrapped__)(raw[:at])
    except ValueError as error:
        raise BadMessage(f"message {id} in queue {queue} {error}") from None
    body = raw[at + 1 :] if len(raw) < LARGE_BYTES else memoryview(raw)[at + 1 :]
    return Message(id, queue, header, body, since_ms, rank, State.decode(state) if state else None)


@lru_cache(maxsize=1024)  # messages that were enqueued together have the very same head
def _head(raw: bytes) -> tuple[Header, int, int]:
    """What stands before the body. Raises ValueError, saying what is wrong."""
    try:
        version, enqueued_ms, priority, header = raw.split(b" ", 3)
    except ValueError:
        raise ValueError(f"is not in prefork's format: {raw[:60]!r}") from None
    if version != VERSION:
        raise ValueError(
            f"has format version {version[:20].decode('ascii', 'replace')}, this prefork reads version "
            f"{VERSION.decode()}; upgrade this worker"
        )
    try:
        told = (_header if len(raw) <= LONGEST_CACHED else _header.__wrapped__)(header)
        since_ms, rank = int(enqueued_ms), int(priority)
        if not (0 <= since_ms <= LATEST_MS and -100 <= rank <= 100):
            raise ValueError(f"enqueued at {since_ms}, priority {rank}")
    except ValueError as error:
        raise ValueError(f"has a damaged header: {error}") from None
    return told, since_ms, rank


@lru_cache(maxsize=1024)  # most messages of a task have the very same header
def _header(raw: bytes) -> Header:
    said = orjson.loads(raw)
    if not isinstance(said, dict) or not isinstance(said.get("task"), str):
        raise ValueError("no task name in it")
    options = {name: said[name] for name in HEADER_OPTIONS if name in said}
    for name, value in options.items():
        limit = TEN_YEARS_S if name.endswith("_s") else LATEST_MS
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
            raise ValueError(f"{name} is {value!r:.40}")
    return Header(said["task"], **options)


def encode_body(task: str, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> bytes:
    """Arguments as JSON: `[args, kwargs]`. `names`: the positional parameters, to name a culprit.

    Raises NotJSON, naming the argument and its type, and PayloadTooLarge.
    """
    try:
        body = orjson.dumps((args, kwargs))
    except (TypeError, RecursionError):
        body = b""
    # orjson writes NaN and the infinities as null, silently; only then is it worth to look for one.
    if not body or (not (len(body) > LARGE_BYTES and _all_text(args, kwargs)) and b"null" in body):
        positional = ((names[n] if n < len(names) else f"#{n + 1}", value) for n, value in enumerate(args))
        for name, value in (*positional, *kwargs.items()):
            if found := _not_json_in(value):
                raise NotJSON(f"{task}: argument {name}{found[0]} is {found[1]}; send JSON: {JSON_TYPES}")
        if not body:
            raise NotJSON(f"{task}: the arguments hold a value that JSON cannot carry; send JSON: {JSON_TYPES}")
    if len(body) > MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge(
            f"{task}: the arguments take {len(body):,} bytes, the limit is {MAX_PAYLOAD_BYTES:,}; "
            f"store the data elsewhere and send where it is"
        )
    return body


def _all_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether nothing in it can be a float: to look through a large text for a `null` takes longer than to write it."""
    return all(type(value) is str for value in (*args, *kwargs.values()))


def encode_result(task: str, value: Any) -> bytes:
    """A task's return value as JSON. Raises NotJSON and PayloadTooLarge."""
    try:
        raw = orjson.dumps(value)
        fault = _not_json_in(value) if b"null" in raw else None
    except (TypeError, RecursionError):
        raw, fault = b"", _not_json_in(value) or ("", f"a {type(value).__qualname__} that JSON cannot carry")
    if fault:
        raise NotJSON(f"{task}: its result{fault[0]} is {fault[1]}; return JSON ({JSON_TYPES}), or use result_ttl=0")
    if len(raw) > MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge(
            f"{task}: its result takes {len(raw):,} bytes, the limit is {MAX_PAYLOAD_BYTES:,}; "
            f"store the data elsewhere and return where it is, or use result_ttl=0"
        )
    return raw


JSON_TYPES = "str, int (64 bit), float, bool, None, list, tuple, dict with str keys, datetime, UUID, dataclass, Enum"


def _not_json_in(value: Any, depth: int = 0) -> tuple[str, str] | None:
    """Where in a value the first thing is that JSON can't carry, and what it is; None if there is none."""
    if type(value) is float:
        return ("", f"{value}, a float that JSON has no form for") if value - value != 0 else None
    if depth > 250:
        return "", "nested too deeply"
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str or not _is_unicode(key):
                return "", f"a dict with the {type(key).__qualname__} {key!r:.40} as a key"
            if found := _not_json_in(item, depth + 1):
                return f"[{key!r:.40}]{found[0]}", found[1]
        return None
    if is_dataclass(value) and not isinstance(value, type):
        for field_ in (it for it in fields(value) if it.name[0] != "_"):  # orjson leaves those out
            if found := _not_json_in(getattr(value, field_.name), depth + 1):
                return f".{field_.name}{found[0]}", found[1]
        return None
    if isinstance(value, Enum):
        return _not_json_in(value.value, depth + 1)
    if isinstance(value, list) or type(value) is tuple:
        for index, item in enumerate(value):
            if found := _not_json_in(item, depth + 1):
                return f"[{index}]{found[0]}", found[1]
        return None
    try:
        orjson.dumps(value)
    except (TypeError, RecursionError) as error:
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        said = f" ({error})" if kind in (int, str) else ""
        return "", f"{'an' if name[0] in 'aeiou' else 'a'} {name}{said}"
    return None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
