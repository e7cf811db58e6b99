"""The arguments of a task, out of the body of its message."""

from __future__ import annotations

import json
from typing import Any

import orjson

ONE_DIGIT = bytes.maketrans(b"123456789", b"000000000")
LEAST_ROUNDED = 9.2e18


def decode(body: bytes | bytearray) -> tuple[list[Any], dict[str, Any]]:
    """Raises ValueError for a body that is not [args, kwargs] in JSON, or has integers of more than 64 bits."""
    try:
        args, kwargs = orjson.loads(body)
        if not (isinstance(args, list) and isinstance(kwargs, dict)):
            raise ValueError("the body is not [args, kwargs]")
        # orjson makes a float, silently, of an integer that has more than 64 bits.
        # Of the 19 digits or more that such an integer has, two are every ninth byte.
        if b"00" in body[::9].translate(ONE_DIGIT) and _may_be_rounded(args) | _may_be_rounded(kwargs):
            json.loads(body, parse_int=_int64)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return args, kwargs


def _may_be_rounded(value: Any) -> bool:
    """Whether there is a float in it that an integer of more than 64 bits may have become."""
    rest = [value]
    while rest:
        it = rest.pop()
        kind = type(it)
        if kind is float:
            if not -LEAST_ROUNDED < it < LEAST_ROUNDED:
                return True
        elif kind is dict:
            rest.extend(it.values())
        elif kind is list:
            rest.extend(it)
    return False


def _int64(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the integer {text if len(text) <= 30 else text[:30] + '…'} has more than 64 bits")
    return int(text)
