"""Arguments come out of a body as they went in, or one clear error does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.message import encode_body
from prefork.worker.arguments import decode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(JSON, max_size=4), st.dictionaries(st.text(), JSON, max_size=4))
def test_what_was_enqueued_comes_out(args: list[object], kwargs: dict[str, object]) -> None:
    assert decode(encode_body("t", tuple(args), kwargs, ())) == (args, kwargs)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", ""), (b"nonsense", ""), (b"\xff", ""), (b"5", "iterable"),
        (b"[]", "not enough values"), (b"[[],{},1]", "too many values"), (b"[{},[]]", r"not \[args, kwargs\]"),
        (b"[" * 10_000, ""), (b'[["\\ud800"],{}]', ""),
        (b"[[18446744073709551616],{}]", "more than 64 bits"), (b'[[],{"a":[-9223372036854775809]}]', "more than 64"),
        (b"[[%s],{}]" % (b"9" * 400), ""),
    ],
)  # fmt: skip
def test_what_is_damaged_is_one_error(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){says}"):
        decode(body)


def test_the_largest_integers_stay_integers_and_large_floats_floats() -> None:
    (low, high, large), _ = decode(b"[[-9223372036854775808,18446744073709551615,1e30],{}]")
    assert (low, high) == (-(1 << 63), (1 << 64) - 1)
    assert isinstance(high, int)
    assert large == 1e30
