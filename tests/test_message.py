from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import json
import time
import uuid
from collections import namedtuple
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork import message
from prefork.errors import BadMessage, NotJSON, PayloadTooLarge
from prefork.message import LATEST_MS, Header, Message, State, decode, derived_id, encode_body, encode_result, new_id
from prefork.worker.frames import Order, Terms

# -- ids --------------------------------------------------------------------------------------------------------------


def test_an_id_is_a_uuid_of_version_7_which_tells_when_it_was_made() -> None:
    before = time.time_ns() // 1_000_000
    it = uuid.UUID(new_id())
    after = time.time_ns() // 1_000_000
    assert (it.version, it.variant) == (7, uuid.RFC_4122)
    assert before <= it.int >> 80 <= after


def test_ids_are_distinct_and_sort_by_the_time_at_which_they_were_made() -> None:
    early = [new_id() for _ in range(2000)]
    time.sleep(0.002)
    late = [new_id() for _ in range(2000)]
    assert len({*early, *late}) == 4000
    assert max(early) < min(late)
    assert all(len(id) == 32 and id == id.lower() for id in early)


@given(st.integers(0, 2**48 - 1), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_id_of_a_follow_up_depends_on_its_parent_and_its_number_alone(unix_ms: int, one: int, two: int) -> None:
    parent = f"{unix_ms:012x}70008{0:015x}"
    id = derived_id(parent, one)
    assert id == derived_id(parent, one)
    assert (id == derived_id(parent, two)) == (one == two)
    assert id != parent
    it = uuid.UUID(id)
    assert (it.version, it.variant, it.int >> 80) == (7, uuid.RFC_4122, unix_ms)


def test_follow_ups_of_different_parents_have_different_ids() -> None:
    parents = [new_id() for _ in range(300)]
    assert len({derived_id(parent, n) for parent in parents for n in range(10)}) == 3000


# -- header and envelope ----------------------------------------------------------------------------------------------

SECONDS = st.floats(0.001, 3650 * 86_400)
MILLISECONDS = st.integers(0, LATEST_MS)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@st.composite
def headers(draw: Any) -> Header:
    maybe = lambda it: draw(st.none() | it)  # noqa: E731
    return Header(
        draw(TEXTS.filter(bool)),
        max_retries=maybe(st.integers(0, 1000)),
        timeout_s=maybe(SECONDS),
        soft_timeout_s=maybe(SECONDS),
        expires_s=maybe(SECONDS),
        expires_ms=maybe(MILLISECONDS),
        due_ms=maybe(MILLISECONDS),
        delay_s=maybe(SECONDS),
    )


def raw(header: bytes, body: bytes = b"[[],{}]", front: bytes = b"1 1764000000000 0 ") -> bytes:
    return front + header + b"\n" + body


@given(headers(), st.binary(max_size=200), MILLISECONDS, st.integers(-100, 100))
def test_what_was_encoded_is_decoded_again(header: Header, body: bytes, at: int, priority: int) -> None:
    it = decode(b"id", "q", raw(header.encode(), body, b"1 %d %d " % (at, priority)))
    assert it.header == header
    assert (it.id, it.queue, it.body, it.enqueued_ms, it.priority, it.state) == ("id", "q", body, at, priority, None)


def test_fields_of_a_header_that_are_not_known_are_passed_over() -> None:
    it = decode(b"id", "q", raw(b'{"task":"t","unique":{"for":3},"timeout_s":2,"traceparent":"00-ab","max_retries":4}'))
    assert it.header == Header("t", timeout_s=2, max_retries=4)


def test_a_header_without_options_is_the_name_alone() -> None:
    assert Header("shop.send").encode() == b'{"task":"shop.send"}'


DEEP = b"[" * 10_000 + b"]" * 10_000
DAMAGED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"t"',
    b"{}",
    b'{"task":null}',
    b'{"task":3}',
    b'{"task":["t"]}',
    b'{"task":"t","max_retries":"3"}',
    b'{"task":"t","max_retries":true}',
    b'{"task":"t","max_retries":[]}',
    b'{"task":"t","max_retries":null}',
    b'{"task":"t","timeout_s":{}}',
    b'{"task":"t","timeout_s":NaN}',
    b'{"task":"t","timeout_s":1e999}',
    b'{"task":"t","timeout_s":' + b"9" * 5000 + b"}",
    b'{"task":"\xff"}',
    b'{"task":"\\ud800"}',
    b'{"task":"t","timeout_s":' + DEEP + b"}",
    DEEP,
]


@pytest.mark.parametrize("header", DAMAGED, ids=lambda raw: raw[:40])
def test_a_damaged_header_is_a_bad_message_that_says_so_in_one_line(header: bytes) -> None:
    with pytest.raises(BadMessage, match=r"message 01ab in queue mail has a damaged header: .") as caught:
        decode(b"01ab", "mail", raw(header))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "is not in prefork's format: b''"),
        (b"hello", "is not in prefork's format: b'hello'"),
        (b'1 2 0 {"task":"t"}', "is not in prefork's format"),  # no body
        (b'2 2 0 {"task":"t"}\n[[],{}]', "has format version 2, this prefork reads version 1; upgrade this worker"),
        (b"\xff\xfe 2 0 {}\n[]", "has format version"),
        (b'1 soon 0 {"task":"t"}\n[[],{}]', "soon"),
        (b'1 2 high {"task":"t"}\n[[],{}]', "high"),
        (b"1 " + b"9" * 5000 + b' 0 {"task":"t"}\n[[],{}]', "digits"),
    ],
)
def test_what_is_not_a_message_is_said_to_be_none(value: bytes, said: str) -> None:
    with pytest.raises(BadMessage, match=r"message 01ab in queue mail") as caught:
        decode(b"01ab", "mail", value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("id", [b"\xff\xfe", b"\xed\xa0\x80" * 4], ids=repr)
def test_an_id_that_no_task_can_have_makes_a_bad_message(id: bytes) -> None:
    with pytest.raises(BadMessage, match="queue mail") as caught:
        decode(id, "mail", raw(b'{"task":"t"}'))
    assert len(str(caught.value).splitlines()) == 1


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_bad_message(value: bytes) -> None:
    with contextlib.suppress(BadMessage):
        decode(b"id", "q", value)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def handed_out(it: Message) -> None:
    """What the master does with a decoded message: nothing of it may fail there."""
    header, state = it.header, it.state or State()
    max_retries = 25 if header.max_retries is None else int(header.max_retries)
    timeout_s, soft_timeout_s = header.timeout_s or 0.0, header.soft_timeout_s or 0.0
    assert timeout_s >= 0
    terms = Terms(header, 0, 0, max_retries, timeout_s, soft_timeout_s, expires=False, result_ttl_ms=86_400_000)
    Order(it, terms, state.attempts + 1, state.retried, expected_s=0.001, serial=1).frame(1)


def handed_out_or_bad(header: bytes, front: bytes) -> None:
    try:
        it = decode(new_id().encode(), "q", raw(header, front=front))
    except BadMessage:
        return
    handed_out(it)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["task", *message.HEADER_OPTIONS]), JSONS | st.just("t")),
    st.integers() | st.integers(-3, 3),
    st.integers() | st.integers(-3, 3),
)
def test_a_header_of_any_json_is_a_message_that_can_be_handed_out_or_a_bad_one(
    header: dict[str, Any], enqueued: int, priority: int
) -> None:
    handed_out_or_bad(json.dumps({"task": "t", **header}).encode(), f"1 {enqueued} {priority} ".encode())


@pytest.mark.parametrize("number", [-1, 2**63, 2**64, 10**30])
def test_a_message_with_a_time_that_cannot_be_does_not_reach_a_child_half_way(number: int) -> None:
    handed_out_or_bad(b'{"task":"t"}', f"1 {number} 0 ".encode())


@pytest.mark.parametrize("number", [b"-1", b"70000", b"1e300", b"18446744073709551616"])
def test_a_message_with_a_number_of_retries_that_cannot_be_does_not_reach_a_child_half_way(number: bytes) -> None:
    handed_out_or_bad(b'{"task":"t","max_retries":' + number + b"}", b"1 2 0 ")


@pytest.mark.parametrize("name", ["timeout_s", "soft_timeout_s", "expires_s"])
def test_a_negative_time_limit_makes_a_bad_message(name: str) -> None:
    with pytest.raises(BadMessage, match=name):
        decode(b"01ab", "mail", raw(b'{"task":"t","%s":-5}' % name.encode()))


# -- state ------------------------------------------------------------------------------------------------------------


@given(
    st.builds(
        State,
        attempts=st.integers(0, 1000),
        retried=st.integers(0, 1000),
        crashes=st.integers(0, 9),
        unknown=st.integers(0, 9),
        due_ms=MILLISECONDS,
        started_ms=MILLISECONDS,
        errors=st.lists(st.dictionaries(TEXTS, TEXTS, max_size=3), max_size=3),
        workers=st.lists(TEXTS, max_size=3),
        progress=st.none() | st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9), TEXTS).map(list),
    )
)
def test_a_state_that_was_encoded_is_decoded_again(state: State) -> None:
    assert State.decode(state.encode()) == state


def test_what_is_empty_in_a_state_takes_no_room() -> None:
    assert State().encode() == b"{}"
    assert State(retried=2).encode() == b'{"retried":2}'
    assert State.decode(None) == State.decode(b"") == State()


def usable(state: State) -> None:
    """What the master does with a state: nothing of it may fail there."""
    handed_out(Message(new_id(), "q", Header("t"), b"", 0, 0, state))
    state.crashes += 1
    state.retried += 1
    assert state.unknown >= 0
    state.add_error({"class": "E"})
    assert [*state.workers[-9:], "w"]
    assert state.progress is None or len(state.progress) == 3
    state.encode()


@given(st.binary(max_size=100) | JSONS.map(json.dumps).map(str.encode))
def test_decoding_a_state_never_fails(value: bytes) -> None:
    usable(State.decode(value))


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(message.STATE_FIELDS), JSONS))
def test_a_damaged_state_never_keeps_a_message_from_running(fields: dict[str, Any]) -> None:
    usable(State.decode(json.dumps(fields).encode()))


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"attempts":"many"}',
        b'{"attempts":null}',
        b'{"attempts":70000}',
        b'{"retried":-1}',
        b'{"errors":{"a":1}}',
        b'{"errors":"none"}',
        b'{"workers":7}',
        b'{"started_ms":1e300}',
        b'{"progress":5}',
        b'{"attempts":' + DEEP + b"}",
        b"[1]",
        b"7",
        b"\xff",
    ],
    ids=lambda raw: raw[:30],
)
def test_a_state_of_the_wrong_types_counts_as_none(damaged: bytes) -> None:
    state = State.decode(damaged)
    usable(state)


def test_fields_of_a_state_that_are_not_known_are_passed_over() -> None:
    assert State.decode(b'{"attempts":3,"colour":"blue"}') == State(attempts=3)


def test_the_first_error_and_the_latest_ones_are_kept() -> None:
    state = State()
    for n in range(50):
        state.add_error({"n": n})
        assert len(state.errors) <= message.MAX_ERRORS_KEPT
    assert [error["n"] for error in state.errors] == [0, *range(41, 50)]


# -- arguments --------------------------------------------------------------------------------------------------------

NAMES = ("order", "lines")


class Colour(enum.Enum):
    RED = "red"
    WRONG = float("nan")


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


Pair = namedtuple("Pair", "one two")


class Ratio(float):
    """As numpy.float64 is one."""


def body(*args: Any, **kwargs: Any) -> bytes:
    return encode_body("shop.send", args, kwargs, NAMES)


def test_arguments_travel_as_a_list_and_a_dict() -> None:
    assert orjson.loads(body(7, [1, 2.5, "ü"], copy=True, note=None)) == [
        [7, [1, 2.5, "ü"]],
        {"copy": True, "note": None},
    ]


def test_dates_uuids_dataclasses_and_enums_travel_in_their_json_form() -> None:
    at = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    id = uuid.uuid4()
    sent = body(at, datetime.date(2026, 1, 2), id=id, colour=Colour.RED, point=Point(1, None))
    args, kwargs = orjson.loads(sent)
    assert args == ["2026-01-02T03:04:00+00:00", "2026-01-02"]
    assert kwargs == {"id": str(id), "colour": "red", "point": {"x": 1, "y": None}}


@given(st.lists(JSONS.filter(lambda it: "inf" not in repr(it) and "nan" not in repr(it)), max_size=3))
def test_whatever_json_carries_comes_out_as_it_went_in(args: list[Any]) -> None:
    try:
        sent = encode_body("t", tuple(args), {}, ())
    except NotJSON as error:
        assert "64-bit" in str(error)  # noqa: PT017
        return
    assert orjson.loads(sent) == [args, {}]


def loop() -> list[Any]:
    it: list[Any] = []
    it.append(it)
    return it


def nested(depth: int) -> list[Any]:
    it: list[Any] = []
    for _ in range(depth):
        it = [it]
    return it


NOT_JSON: list[tuple[Any, str, str]] = [
    ({1, 2}, "", "a set"),
    (frozenset(), "", "a frozenset"),
    (b"x", "", "a bytes"),
    (bytearray(), "", "a bytearray"),
    (object(), "", "an object"),
    (1j, "", "a complex"),
    (float("nan"), "", "nan, a float"),
    (float("-inf"), "", "-inf, a float"),
    (2**64, "", "an int (Integer exceeds 64-bit range)"),
    (-(2**63) - 1, "", "an int (Integer exceeds 64-bit range)"),
    ("\ud800", "", "a str (str is not valid UTF-8: surrogates not allowed)"),
    ([1, [2, {3}]], "[1][1]", "a set"),
    ({"a": {"b": [float("inf")]}}, "['a']['b'][0]", "inf, a float"),
    ({"a": (1, b"")}, "['a'][1]", "a bytes"),
    ({1: 2}, "", "a dict with the int 1 as a key"),
    ([{("a", "b"): 2}], "[0]", "a dict with the tuple ('a', 'b') as a key"),
    ({None: 2}, "", "a dict with the NoneType None as a key"),
    (datetime.timedelta(1), "", "a datetime.timedelta"),
    (Ratio(1.0), "", f"a {__name__}.Ratio"),
    ([Ratio(1.0)], "[0]", f"a {__name__}.Ratio"),
    (Pair(1, 2), "", f"a {__name__}.Pair"),
    ({"a": [Pair(1, 2)]}, "['a'][0]", f"a {__name__}.Pair"),
]


@pytest.mark.parametrize(("value", "path", "kind"), NOT_JSON, ids=lambda it: it if isinstance(it, str) else "")
def test_what_json_cannot_carry_is_named_with_its_argument_and_its_type(value: Any, path: str, kind: str) -> None:
    for args, kwargs, name in (
        ((value,), {}, "order"),
        ((1, value), {}, "lines"),
        ((1, 2, value), {}, "#3"),
        ((1,), {"ok": 1, "note": value}, "note"),
    ):
        with pytest.raises(NotJSON) as caught:
            body(*args, **kwargs)
        said = str(caught.value)
        assert said.startswith(f"shop.send: argument {name}{path} is {kind}")
        assert "; send JSON: str, int (64 bit), float" in said
        assert len(said.splitlines()) == 1
        assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    "key", ["\ud800", Colour, enum.StrEnum("Word", "ONE").ONE, type("Str", (str,), {})("s")], ids=repr
)
def test_a_key_that_json_cannot_carry_is_named_with_its_argument(key: Any) -> None:
    with pytest.raises(NotJSON, match=r"^shop\.send: argument order\[0\] is a dict with .* as a key; send JSON"):
        body([{key: 1}])


@pytest.mark.parametrize("value", [Colour.WRONG, Point(float("nan")), [Point([float("inf")])]], ids=repr)
def test_a_float_that_is_no_number_is_refused_within_an_enum_or_a_dataclass_too(value: Any) -> None:
    with pytest.raises(NotJSON, match=r"argument order.* is .*(nan|inf|Colour|Point)"):
        body(value)


def test_an_object_within_a_dataclass_is_named_by_its_argument() -> None:
    with pytest.raises(NotJSON, match=r"argument lines(\.x is a set| is a .*Point)"):
        body(1, Point({1}))


@pytest.mark.parametrize("value", [loop(), nested(300), nested(100_000)], ids=["itself", "300", "100000"])
def test_what_holds_itself_or_is_nested_too_deeply_is_refused(value: Any) -> None:
    with pytest.raises(NotJSON, match=r"argument order.* is nested too deeply") as caught:
        body(value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("depth", range(240, 260))
def test_a_depth_is_carried_or_refused_with_the_name_of_the_argument_also_beside_a_none(depth: int) -> None:
    for args in ((nested(depth),), (nested(depth), None)):
        try:
            sent = body(*args)
        except NotJSON as error:
            assert "argument order" in str(error)  # noqa: PT017
        else:
            assert orjson.loads(sent)[0][0] == nested(depth)


def test_the_culprit_is_named_when_a_keyword_has_the_name_of_a_positional_parameter() -> None:
    with pytest.raises(NotJSON, match="argument order is a set"):
        encode_body("t", ({1},), {"order": 1}, ("order",))  # def t(order, /, **others)


def test_what_json_cannot_carry_is_found_beside_a_large_text_too() -> None:
    large = "x" * 100_000
    for fault in (float("nan"), [float("inf")]):
        with pytest.raises(NotJSON, match="argument lines"):
            body(large, fault)
        with pytest.raises(NotJSON, match="argument b"):
            body(a=large, b=fault)
    assert orjson.loads(body(large, None)) == [[large, None], {}]
    assert orjson.loads(body("null" * 10_000)) == [["null" * 10_000], {}]


def test_a_large_body_is_decoded_like_any_other() -> None:
    large = orjson.dumps([["x" * 100_000], {}])
    assert decode(b"a", "q", raw(b'{"task":"t"}', large)).body == large


def test_none_is_an_argument_like_any_other() -> None:
    assert body(None, note=None) == b'[[null],{"note":null}]'
    assert body("null", ["null", None]) == b'[["null",["null",null]],{}]'


def test_arguments_beyond_the_limit_are_refused_with_both_sizes() -> None:
    room = message.MAX_PAYLOAD_BYTES - len(b'[[""],{}]')
    assert len(body("x" * room)) == message.MAX_PAYLOAD_BYTES
    with pytest.raises(
        PayloadTooLarge, match=r"^shop\.send: the arguments take 1,048,577 bytes, the limit is 1,048,576;"
    ):
        body("x" * (room + 1))


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_is_json() -> None:
    assert encode_result("t", None) == b"null"
    assert encode_result("t", {"a": (1, 2.5, "null", None)}) == b'{"a":[1,2.5,"null",null]}'


@pytest.mark.parametrize(("value", "path", "kind"), NOT_JSON, ids=lambda it: it if isinstance(it, str) else "")
def test_a_result_that_json_cannot_carry_is_named_with_its_type(value: Any, path: str, kind: str) -> None:
    with pytest.raises(NotJSON) as caught:
        encode_result("shop.send", value)
    said = str(caught.value)
    assert said.startswith(f"shop.send: its result{path} is {kind}")
    assert "return JSON" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "value", [loop(), nested(300), Colour.WRONG, Point(float("nan"))], ids=["itself", "deep", "enum", "point"]
)
def test_a_result_that_json_would_silently_change_or_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(NotJSON, match=r"^shop\.send: its result"):
        encode_result("shop.send", value)


def test_a_result_beyond_the_limit_is_refused_with_both_sizes() -> None:
    assert len(encode_result("t", "x" * (message.MAX_PAYLOAD_BYTES - 2))) == message.MAX_PAYLOAD_BYTES
    with pytest.raises(PayloadTooLarge, match=r"^t: its result takes 1,048,577 bytes, the limit is 1,048,576;"):
        encode_result("t", "x" * (message.MAX_PAYLOAD_BYTES - 1))
