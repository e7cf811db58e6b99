"""The compiled part does what the Python beside it does, or leaves it to that; whatever it is given."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork import Context, Prefork, Retry, SoftTimeout
from prefork.broker.keys import Keys
from prefork.config import load
from prefork.message import Header, Message, State, new_id
from prefork.worker import fast, frames, handoff
from prefork.worker.child import Child
from prefork.worker.clock import ServerClock
from prefork.worker.frames import ANSWER, DONE, FRAME, TOKEN, Answer, Order, Terms
from prefork.worker.handoff import MasterEnd
from prefork.worker.logs import Handler
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.process import Process
from prefork.worker.settlement import Settlement
from prefork.worker.slate import Slate
from prefork.worker.slots import Slot
from prefork.worker.work import Work
from tests.conftest import PATIENCE_S, until

if fast.built is None:
    pytest.skip("the compiled part is not built here", allow_module_level=True)

BUILT: Any = fast.built
ID = new_id()


@contextmanager
def part(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "compiled", BUILT if name == "compiled" else None)
        yield


# -- frames -----------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 70_000) | st.sampled_from([-1, 2**16, 2**32 - 1, 2**32, 2**64, True, None, 1.5])
SECONDS = st.sampled_from([0.0, 0, 1.5, 30, 10**400, None, "1"])
ORDERS = st.builds(
    lambda id, body, ms, task, queue, most, hard_s, soft_s, attempt, retried, flags: Order(
        Message(id, "default", Header("t"), body, ms, 0),
        Terms(Header("t"), task, queue, most, hard_s, soft_s, expires=False, result_ttl_ms=86_400_000),
        attempt, retried, 0.1, 1, flags,
    ),
    st.sampled_from([ID, "", "x" * 40, "ü" * 40, "\ud800"]), st.binary(max_size=40) | st.just(b"x" * 70_000),
    NUMBERS, NUMBERS, NUMBERS, NUMBERS, SECONDS, SECONDS, NUMBERS, NUMBERS, NUMBERS,
)  # fmt: skip
USUAL = st.builds(
    lambda id, body, attempt: Order(
        Message(id, "default", Header("t"), body, 1764000000000, 0),
        Terms(Header("t"), 3, 1, 25, 2.5, 30, expires=False, result_ttl_ms=86_400_000), attempt, 7, 0.1, 1, 1,
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.binary(max_size=400), st.integers(1, 2**32 - 1),
)  # fmt: skip


@given(st.lists(USUAL | ORDERS, max_size=5), st.integers(1, 2**63))
def test_frames_are_the_same_or_none(orders: list[Order], first: int) -> None:
    made = BUILT.frames(orders, first)
    if made is not None:
        assert made == b"".join(piece for n, order in enumerate(orders, first) for piece in order.frame(n))


@given(st.lists(USUAL, max_size=5))
def test_usual_frames_are_made(orders: list[Order]) -> None:
    assert BUILT.frames(orders, 1) is not None


def test_what_is_no_order_is_left_to_python() -> None:
    order = copy.copy(USUAL_ORDER)
    del order.message
    for odd in (object(), None, order, Order(None, None, 1, 1, 1, 1)):  # type: ignore[arg-type]
        assert BUILT.frames([USUAL_ORDER, odd], 1) is None
        data = ANSWER.pack(1, DONE, 0, 0, 0, 0)
        assert BUILT.done(data, {1: odd}, {}, {}, 0.0, 1) == (0, 0, 0.0, 0, 0.0)


USUAL_ORDER = Order(
    Message(ID, "default", Header("plain"), b"[[],{}]", 1764000000000, 0),
    Terms(Header("plain"), 0, 0, 25, 0.0, 0.0, expires=False, result_ttl_ms=0), 1, 0, 1e-5, 1,
)  # fmt: skip


KEPT_ORDER = replace(
    USUAL_ORDER, terms=Terms(Header("plain"), 0, 0, 25, 0.0, 0.0, expires=False, result_ttl_ms=86_400_000)
)


@pytest.mark.parametrize("given", [(), (1,), ([], "1"), ([],), (None, 1), (b"", {}, {}, {}), ([], [], [], "q", 1, {})])
def test_wrong_arguments_are_an_error(given: tuple[object, ...]) -> None:
    for function in (BUILT.frames, BUILT.done, BUILT.orders, BUILT.run):
        with pytest.raises(TypeError):
            function(*given)


# -- claims and answers: two masters, of which one is compiled --------------------------------------------------------


class Clock(ServerClock):
    """One that stands still."""

    def now_ms(self) -> int:
        return 1764000000000


class Desk:
    """The part of a master that makes orders and reads answers, with one child that is not there."""

    def __init__(self, name: str, conf: Path) -> None:
        self.name = name
        app = Prefork("shop")
        own = {"plain": {"result_ttl": 0}, "kept": {}, "expiring": {"expires": 60}, "ü": {}, '"': {}}
        for task, options in own.items():
            app.task(name=task, **options)(lambda: None)  # type: ignore[call-overload]
        loop = Loop()
        self.settlement = Settlement(
            app.tasks, Clock().now_ms, prefix="p", dead_max=1, dead_ttl_s=1, max_crashes=3,
            fenced=lambda said: None, later=lambda delay_s, call: None,
        )  # fmt: skip
        for queue in ("default", "other"):
            self.settlement.add_queue(Keys("p", queue))
        self.pool = Pool(loop, 1, None, lambda *_: None)
        self.work = self.pool.owner = Work(app, load(conf), loop, Clock(), self.settlement, self.pool)
        self.work.shutdown = SimpleNamespace(begun=False)  # type: ignore[assignment]
        self.work.claims = SimpleNamespace(channel=None)  # type: ignore[assignment]
        self.work.on_ready = lambda child: None
        self.work.times.observe("plain", 0.001)
        self.end = MasterEnd()
        self.child = Process(1, 1, self.end, None, Slot(self.pool.slots, open=True))  # type: ignore[arg-type]
        self.killed = ""
        self.pool.kill = lambda child, why: setattr(self, "killed", why)  # type: ignore[method-assign]

    def claimed(self, raws: list[tuple[bytes, bytes, bytes | None]], queue: str = "default") -> list[Order]:
        with part(self.name):
            self.work.claimed(queue, [it[0] for it in raws], [it[1] for it in raws], [it[2] for it in raws], 7)
        ready = list(self.work.dispatcher.ready)
        self.work.dispatcher.ready.clear()
        for order in ready:
            order.ready_since_s = 0.0  # the one thing that differs
        return ready

    def answered(self, orders: list[Order], pieces: list[bytes]) -> None:
        with part(self.name):
            self.end.hand(orders)
            self.child.slot.handed(sum(it.expected_s for it in orders), 1.0, len(orders))
            for piece in filter(None, pieces):
                os.write(self.end._child_answer_w, piece)
                for _ in range(2):
                    self.pool.read(self.child)

    def seen(self) -> dict[str, Any]:
        boxes = self.settlement.outboxes
        slot = self.child.slot
        return {
            "plain": {name: box.plain for name, box in boxes.items()},
            "records": {name: box.records for name, box in boxes.items()},
            "unanswered": list(self.end.unanswered), "known": self.work.times.known, "mix": self.work.times.mix_s,
            "slot": (slot.outstanding, pytest.approx(slot.load_s, abs=1e-9), slot.end_s > 0), "killed": self.killed,
        }  # fmt: skip

    def close(self) -> None:
        self.end.forked()
        self.end.close()


@contextmanager
def desks() -> Iterator[tuple[Desk, Desk]]:
    conf = Path(os.environ["TMPDIR"]) / "desk.conf"
    conf.write_text("[prefork]\napp = shop:app\nqueues = default, other\n")
    both = Desk("pure", conf), Desk("compiled", conf)
    try:
        yield both
    finally:
        for desk in both:
            desk.close()


HEADS = st.sampled_from([b'{"task":"plain"}', b'{"task":"kept"}', b'{"task":"expiring"}', b'{"task":"strange"}',
                         b'{"task":"plain","timeout_s":5}', b'{"task":"plain","max_retries":2}', b"{}", b"", b" ",
                         b'{"task":"plain"} ' + b" " * 1200, b"\xff"])  # fmt: skip
MESSAGES = st.builds(
    lambda version, ms, priority, head, body: b" ".join((version, ms, priority, head)) + b"\n" + body,
    st.sampled_from([b"1"] * 9 + [b"2", b"", b"01"]),
    st.sampled_from([b"1764000000000"] * 6 + [b"0", b"0007", b"253402300799999", b"253402300800000", b"-1", b"+1", b"",
                                              b"1_0", b"9" * 30, b"x"]),
    st.sampled_from([b"0"] * 6 + [b"-0", b"7", b"-100", b"100", b"101", b"-101", b"--1", b"", b"+5", b"1000"]),
    HEADS, st.sampled_from([b"[[7],{}]", b"", b"\n", b"x" * 20_000]),
)  # fmt: skip
CLAIMED = st.tuples(
    st.sampled_from([ID.encode()] * 6 + [b"", b"\xff", "ü".encode(), b"x" * 100]),
    MESSAGES | st.binary(max_size=30) | st.just(b'1 1764000000000 0 {"task":"plain"}\n[[],{}]'),
    st.sampled_from([None] * 6 + [b"", b'{"attempts":3}', b"x"]),
)


@given(st.lists(st.lists(CLAIMED, max_size=6), max_size=3))
def test_a_claim_brings_the_same_orders_and_outcomes(claims: list[list[tuple[bytes, bytes, bytes | None]]]) -> None:
    with desks() as (pure, compiled):
        for claim in claims:
            orders = pure.claimed(claim)
            assert compiled.claimed(claim) == orders
            assert [type(it.message.body) for it in compiled.claimed(claim)] == [
                type(it.message.body) for it in pure.claimed(claim)
            ]
        said = [[(id, record[0]) for id, record in desk.settlement.outboxes["default"].records] for desk in
                (pure, compiled)]  # fmt: skip
        assert said[0] == said[1]


def test_what_has_begun_in_time_does_not_expire_when_it_is_put_back() -> None:
    late = b'1 %d 0 {"task":"expiring"}\n[[],{}]' % (Clock().now_ms() - 61_000)
    states = [None, State(started_ms=1), State(started_ms=1, due_ms=2)]
    with desks() as both:
        for desk in both:
            raws = [(b"m%d" % n, late, state and state.encode()) for n, state in enumerate(states)]
            assert [order.message.id for order in desk.claimed(raws)] == ["m1"]


def test_the_second_message_with_a_header_is_a_usual_one() -> None:
    with desks() as (_, desk):
        message = (ID.encode(), b'1 1764000000000 0 {"task":"kept"}\n[[],{}]', None)
        desk.claimed([message])
        usual, known = desk.work.intake.usual["default"], desk.work.times.known
        orders, missing = BUILT.orders([message[0]] * 2, [message[1]] * 2, [None] * 2, "default", 1, usual, known, 0.05)
        assert missing == 0
        assert [it.serial for it in orders] == [1, 2]


def test_only_what_is_done_is_settled() -> None:
    for kind in (*range(8), 255):
        boxes, known = {"default": SimpleNamespace(plain=[], records=[])}, {"plain": [0.001, 0.001]}
        held = {1: USUAL_ORDER}
        size = BUILT.done(ANSWER.pack(1, kind, 0, 0.1, 0, 9), held, boxes, known, 0.1, 5)[0]
        assert (size, boxes["default"].plain, list(held)) == ((ANSWER.size, [ID], []) if kind == DONE else (0, [], [1]))


@pytest.mark.parametrize("head", ["1 0 101 ", "1 0 -101 ", "1 253402300800000 0 ", "2 0 0 ", "1 0 0", "1  0 "])
def test_a_head_that_is_none_is_left_to_python(head: str) -> None:
    usual = {b'{"task":"plain"}': (Header("plain"), USUAL_ORDER.terms)}
    raw = head.encode() + b'{"task":"plain"}\n[]'
    assert BUILT.orders([b"x"], [raw], [None], "default", 1, usual, {}, 0.05) == ([None], 1)


KINDS = st.sampled_from([DONE] * 8 + list(range(8)))
ANSWERS = st.builds(
    lambda number, kind, payload, ran_s, cpu_s, peak: (
        ANSWER.pack(number, kind, len(payload), ran_s, cpu_s, peak) + payload
    ),
    st.integers(0, 14) | st.just(2**64 - 1), KINDS,
    st.sampled_from([b""] * 8 + [b"7", b"[1,2,3]", b"\xff", b"x" * 2048, b"x" * 2049]),
    st.sampled_from([1e-6, 0.0, 0.003, 2.0, -1.0, float("nan"), float("inf"), 1e10]),
    st.sampled_from([0.0, 0.5, -0.5, -2.0, float("nan")]), st.sampled_from([0, 4096, 2**32 - 1]),
)  # fmt: skip
GOOD = st.builds(lambda number, ran_s, value: ANSWER.pack(number, DONE, len(value), ran_s, 0.0, 4096) + value,
                 st.integers(1, 12), st.floats(0, 0.1) | st.floats(0, 1e10, exclude_max=True),
                 st.sampled_from([b"", b"null", b'{"n":7}']))  # fmt: skip


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from(["plain", "kept", "kept", "expiring", "ü", '"']), max_size=12),
    st.booleans(),
    st.lists(GOOD | ANSWERS | st.binary(max_size=50), max_size=12),
    st.lists(st.integers(1, 150), max_size=5),
)
def test_answers_have_the_same_outcomes(names: list[str], known: bool, answers: list[bytes], cuts: list[int]) -> None:
    data = b"".join(answers)
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    pieces.append(data[at:])
    with desks() as both:
        for desk in both:
            orders = []
            for n, name in enumerate(names):
                queue = "other" if n % 3 == 2 else "default"
                if known:
                    desk.work.times.observe(name, 0.0005)
                orders += desk.claimed([(b"id%d" % n, b'1 1764000000000 0 {"task":"%s"}\n[]' % name.encode(), None)],
                                       queue)  # fmt: skip
            desk.answered(orders, pieces)
        pure, compiled = (desk.seen() for desk in both)
        for seen in (pure, compiled):  # when it is tried again is chance
            seen["records"] = {
                name: [(id, record[:1] if record[0] == "retry" else record) for id, record in it]
                for name, it in seen["records"].items()
            }
        assert compiled == pure


# -- the child's loop -------------------------------------------------------------------------------------------------


class Odd(BaseException):
    """One that is no Exception."""


def shop(folder: Path) -> Prefork:
    """Tasks that do whatever tasks may do."""
    app = Prefork("shop")

    def task(**options: Any) -> Callable[[Callable[..., Any]], Any]:
        return lambda function: app.task(name=function.__name__, retry_delay=1, **options)(function)

    @task(result_ttl=0)
    def plain(*args: Any, **kwargs: Any) -> str:
        with (folder / "ran").open("a") as file:
            file.write(f"{args} {kwargs}\n")
        return "not kept"

    @task()
    def kept(value: Any = None) -> Any:
        return value

    @task()
    def strange() -> Any:
        return object()

    @task()
    def no_number() -> Any:
        return [1.0, float("nan")]

    @task(result_ttl=0)
    def fails(kind: str) -> None:
        errors = {"value": ValueError("no"), "retry": Retry("later", delay=3), "exit": SystemExit(3), "odd": Odd("odd")}
        raise errors[kind]

    @task(takes_context=True)
    def told(context: Context, n: int) -> int:
        return n + context.attempt

    @task()
    async def waits(n: int) -> int:
        return n

    @task(soft_timeout=1, result_ttl=0)
    def soft() -> None:
        try:
            time.sleep(PATIENCE_S)
        except SoftTimeout:
            return

    @task(result_ttl=0)
    def forks() -> None:
        if pid := os.fork():
            os.waitpid(pid, 0)

    @task(result_ttl=0)
    def late_signal() -> None:
        def hear(*_: object) -> None:
            raise Odd("a signal")

        signal.signal(signal.SIGUSR1, hear)
        signal.raise_signal(signal.SIGUSR1)

    @task(result_ttl=0)
    def prints() -> None:
        print("no newline", end="")

    return app


BODIES: list[tuple[str, bytes]] = [
    *[("plain", b"[[%d],{}]" % n) for n in range(30)],
    ("plain", b'[[],{"a":1,"b":[2]}]'),
    ("plain", b"[[100000000000000000000000000],{}]"),
    ("plain", b"[[18446744073709551615],{}]"),
    ("plain", b"[[1234567890123456789],{}]"),
    ("plain", b'[["%s"],{}]' % (b"x" * 70_000)),
    ("plain", b'[["%s"],{}]' % (b"x" * 60_000)),
    *[
        ("plain", body)
        for body in (b"", b"[]", b"{}", b"[[],[]]", b"[{},{}]", b"[[],{},1]", b"\xff", b"[" * 3000, b"null")
    ],
    ("kept", b"[[],{}]"),
    ("kept", b'[[{"a":[1,2,3]}],{}]'),
    ("kept", b'[[],{"value":7}]'),
    ("kept", b"[[1,2,3],{}]"),
    ("kept", b'[[{"a":null}],{}]'),
    ("kept", b'[["a null in a text"],{}]'),
    ("kept", b'[["nul", "\xc3\xbc"],{}]'),
    *[("kept", b'[["%s"],{}]' % (b"x" * size)) for size in (2045, 2046, 2047, 60_000)],
    ("strange", b"[[],{}]"),
    ("no_number", b"[[],{}]"),
    *[("fails", b'[["%s"],{}]' % kind) for kind in (b"value", b"retry", b"exit", b"odd", b"nothing")],
    ("told", b"[[4],{}]"),
    ("waits", b"[[5],{}]"),
    ("soft", b"[[],{}]"),
    ("forks", b"[[],{}]"),
    ("late_signal", b"[[],{}]"),
    ("prints", b"[[],{}]"),
    ("plain", b"[[99],{}]"),
]


def lived(name: str, folder: Path) -> tuple[list[tuple[int, int, Any]], str, int]:
    """What a real child answers to all of it, what its plain tasks saw, and how it ended."""
    folder.mkdir()
    app = shop(folder)
    tasks = list(app.tasks.values())
    index = {task.name: n for n, task in enumerate(tasks)}
    master, slate, own = MasterEnd(), Slate(), os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            with part(name):
                Child(1, app, tasks, ("default",), master.child_end(), slate, Handler(2, "text")).live(own)
        finally:
            os._exit(99)
    master.forked()
    try:
        orders: list[Order] = []
        for task, body in BODIES:
            soft_s = app.tasks[task].options.soft_timeout_s or 0.0
            terms = Terms(Header(task), index[task], 0, 25, 0.0, soft_s, expires=False, result_ttl_ms=86_400_000)
            flags = frames.WILL_LAST if len(orders) % 7 == 0 else 0
            orders.append(Order(Message(ID, "default", terms.header, body, 1, 0), terms, 1, 0, 1e-5, 1, flags))
        answers: list[Answer] = []
        end_s = time.monotonic() + PATIENCE_S
        master.hand(orders)
        while len(answers) < len(orders) + 1:
            assert time.monotonic() < end_s, answers[-1:]
            master.write_on()
            select.select([master.answer_r], [], [], 0.01)
            answers += master.receive() or []
        master.finish()
        status = os.waitpid(pid, 0)[1]
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        master.close()
        slate.close()
    told = []
    for answer in answers:
        assert 0 <= answer.ran_s < PATIENCE_S
        assert answer.cpu_s >= 0
        told.append((answer.number, answer.kind, orjson.loads(answer.payload) if answer.payload else None))
    return told, (folder / "ran").read_text(), status


def test_a_child_answers_the_same(tmp_path: Path) -> None:
    pure, compiled = lived("pure", tmp_path / "pure"), lived("compiled", tmp_path / "compiled")
    assert compiled == pure
    assert len(pure[0]) == len(BODIES) + 1
    assert pure[2] == 0


class Loose(SimpleNamespace):
    """What `run` needs of a child and its ends. Of the frames so much has been read; then the master is gone."""

    def __init__(self, sent: bytes, buffered: int) -> None:
        self.task_r, task_w = os.pipe()
        self.token_r, self.token_w = os.pipe()
        self.answer_r, self.answer_w = os.pipe()
        for fd in (self.token_r, self.answer_r):
            os.set_blocking(fd, False)
        buffer, rest = sent[:buffered], sent[buffered:]
        os.write(task_w, rest)
        os.close(task_w)
        lock = SimpleNamespace(acquire=lambda: self.held.append(1), release=lambda: self.held.pop())
        super().__init__(_buffer=buffer, _at=0, _look_s=0.0, _peak_kib=77, _is_copy=False, running=0, task="", held=[],
                         ran=[], task_id="", lock=lock)  # fmt: skip
        self.function = lambda *args, **kwargs: self.ran.append((args, kwargs))

    def run(self, **other: Any) -> Any:
        given = {
            "child": self, "end": self, "task_r": self.task_r, "token_r": self.token_r, "answer_w": self.answer_w,
            "lock": self.lock, "log": self, "stopper": self,
            "tasks": ((self, "plain", False), None, (self, "kept", True)), "prints": (),
            "loads": orjson.loads, "dumps": orjson.dumps, "clock": lambda: 1.0, "look": lambda now_s: 0.25, **other,
        }  # fmt: skip
        return BUILT.run(*given.values())

    def close(self) -> None:
        for fd in (self.task_r, self.token_r, self.answer_r, self.answer_w):
            os.close(fd)


@contextmanager
def loose(sent: bytes, *tokens: int, buffered: int = 0) -> Iterator[Loose]:
    it = Loose(sent, buffered)
    os.write(it.token_w, b"".join(map(TOKEN.pack, tokens)))
    os.close(it.token_w)  # no more of them
    try:
        yield it
    finally:
        it.close()


def framed(number: int, body: bytes = b"[[],{}]", task: int = 0, flags: int = 0, soft_s: float = 0.0) -> bytes:
    return FRAME.pack(number, len(body), task, 0, flags, 1, 0, 25, 0.0, soft_s, 1, ID.encode()) + body


FRAMES = st.builds(
    framed, st.integers(1, 4), st.sampled_from([b"[[7],{}]", b"[]", b"[[],{}]"]),
    st.sampled_from([0, 0, 0, 1, 2, 3, 65535]), st.sampled_from([0, 0, 0, 1]),
)  # fmt: skip


@given(
    st.lists(FRAMES | st.binary(max_size=90), max_size=5),
    st.lists(st.integers(0, 5) | st.just(2**64 - 1), max_size=5),
    st.integers(0, 500),
)
def test_whatever_frames_there_are_each_token_is_answered_or_told(
    frames: list[bytes], tokens: list[int], buffered: int
) -> None:
    """Unless its frame does not come, since the master is gone."""
    sent = b"".join(frames)
    with loose(sent, *tokens, buffered=buffered) as it:
        told = it.run()
        answered = [number for number, _ in answers_in(read(it.answer_r))]
        assert answered == tokens[: len(answered)]
        rest = it._buffer[it._at :] + read(it.task_r)
        assert sent.endswith(rest)
        if told is None:
            assert answered == tokens or is_cut(rest)
        else:
            assert told[0] == tokens[len(answered)]
        assert len(it.ran) == len(answered) + (told is not None and told[1] is not None)
        assert it.running == 0
        assert not it.held


def is_cut(rest: bytes) -> bool:
    """Whether a frame has not come to its end."""
    return len(rest) < FRAME.size or len(rest) < FRAME.size + FRAME.unpack_from(rest)[1]


@pytest.mark.parametrize("buffered", [0, 1, FRAME.size - 1, FRAME.size, FRAME.size + 3, 200, 1000])
def test_frames_are_read_as_they_come(buffered: int) -> None:
    sent = b"".join(framed(number, b"[[%d],{}]" % number) for number in range(1, 6))
    with loose(sent, 1, 2, 3, 4, 5, buffered=buffered) as it:
        assert it.run() is None
        assert [args for args, _ in it.ran] == [(1,), (2,), (3,), (4,), (5,)]
        assert it._buffer[it._at :] == b""


def test_a_frame_that_comes_later_than_its_token_is_waited_for() -> None:
    """As one does that the pipe had no room for: neither is the token taken twice, nor does the task wait for more."""
    sent = framed(1, b"[[7],{}]")
    with loose(b"", 1) as it:
        os.close(it.task_r)
        it.task_r, task_w = os.pipe()

        def write() -> None:
            for part in (sent[:10], sent[10:-2], sent[-2:]):
                until(lambda: not waiting_in(it.task_r))
                os.write(task_w, part)

        writer = threading.Thread(target=write)
        writer.start()
        assert it.run() is None
        writer.join()
        os.close(task_w)
        assert it.ran == [((7,), {})]


def waiting_in(pipe_r: int) -> bool:
    """Whether there is something to read."""
    return bool(select.select([pipe_r], [], [], 0)[0])


def test_a_large_body_is_left_where_it_is() -> None:
    body = b'[["%s"],{}]' % (b"x" * handoff.READ_BYTES)
    sent = framed(1, body)
    with loose(sent[: handoff.READ_BYTES], 1) as it:  # what fits into the pipe
        assert it.run() == (1, None, None, None)
        assert it._buffer[it._at :] + read(it.task_r) == sent[: handoff.READ_BYTES]


def answers_in(data: bytes) -> list[tuple[int, bytes]]:
    """Number and payload of each."""
    found = []
    while data:
        number, _, size, *_ = ANSWER.unpack_from(data)
        found.append((number, data[ANSWER.size : ANSWER.size + size]))
        data = data[ANSWER.size + size :]
    return found


@pytest.mark.parametrize(
    ("value", "payload"),
    [(None, b"null"), (7, b"7"), ({"a": [1.5]}, b'{"a":[1.5]}'), ("x" * 2046, b'"%s"' % (b"x" * 2046))],
)
def test_a_usual_result_is_answered_with_its_task(value: object, payload: bytes) -> None:
    with loose(framed(1, task=2), 1) as it:
        it.function = lambda: value
        assert it.run() is None
        assert answers_in(read(it.answer_r)) == [(1, payload)]


@pytest.mark.parametrize("value", [float("nan"), [None], "null", object(), "x" * 2047, "\ud800", 1 << 80])
def test_an_unusual_result_is_left_to_python(value: object) -> None:
    with loose(framed(1, task=2), 1) as it:
        it.function = lambda: value
        assert it.run() == (1, 1.0, value, None)
        assert read(it.answer_r) == b""


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def test_what_fails_around_a_task_is_an_error_and_leaves_no_lock_behind() -> None:
    def broken(*_: object) -> float:
        raise OSError("broken")

    for other in ({"clock": broken}, {"look": broken}, {"clock": lambda: "x"}, {"log": 1}, {"stopper": 1}, {"lock": 1},
                  {"child": 1}, {"prints": (1,)}, {"answer_w": -1}, {"token_r": -1}, {"task_r": -1}):  # fmt: skip
        with loose(framed(1), 1) as it:
            with pytest.raises((OSError, TypeError, AttributeError)):
                it.run(**other)
            assert not it.held


@pytest.mark.parametrize(
    "frame",
    [
        framed(1, flags=frames.WILL_LAST), framed(1, soft_s=1.0), framed(1, task=1), framed(1, task=9), framed(2),
        framed(1, b"x"), framed(1, b"[[1234567890123456789],{}]"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_is_unusual_is_told_and_not_run(frame: bytes) -> None:
    with loose(frame, 1) as it:
        assert it.run() == (1, None, None, None)
        assert (it.ran, it._at, it.running, read(it.answer_r)) == ([], 0, 0, b"")
        assert it._buffer == frame


@pytest.mark.parametrize("frame", [framed(1)[:-1], framed(1)[:40], b""], ids=range(3))
def test_nothing_is_run_of_which_the_master_has_not_sent_all(frame: bytes) -> None:
    with loose(frame, 1) as it:
        assert it.run() is None
        assert (it.ran, it.running, read(it.answer_r)) == ([], 0, b"")


def raise_signal() -> Any:
    """`raise` of C, which returns before the handler runs."""
    return ctypes.CDLL(None)["raise"]


@contextmanager
def heard(hear: Callable[..., None]) -> Iterator[bytes]:
    """Have a handler of SIGUSR1. -> a body with its number"""
    before = signal.signal(signal.SIGUSR1, hear)
    try:
        yield b"[[%d],{}]" % signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)


def says_odd(*_: object) -> None:
    raise Odd("a signal")


def test_a_signal_at_the_very_end_is_still_the_tasks() -> None:
    with heard(says_odd) as body, loose(framed(1, body), 1) as it:
        it.function = raise_signal()
        told = it.run()
        assert isinstance(told[3], Odd)
        assert it.running == 0


def test_a_signal_while_its_result_is_encoded_is_still_the_tasks() -> None:
    with heard(says_odd), loose(framed(1, task=2), 1) as it:
        it.function = lambda: signal.SIGUSR1.value
        told = it.run(dumps=raise_signal())
        assert isinstance(told[3], Odd)
        assert (told[2], it.running) == (None, 0)


def test_what_a_late_signal_raises_keeps_its_context() -> None:
    def hear(*_: object) -> None:
        try:
            raise KeyError("in the handler")
        except KeyError:
            says_odd()

    with heard(hear) as body, loose(framed(1, body), 1) as it:
        it.function = raise_signal()
        error = it.run()[3]
        assert isinstance(error, Odd)
        assert isinstance(error.__context__, KeyError)


def test_the_tasks_own_error_is_the_context_of_what_a_late_signal_raises() -> None:
    with heard(says_odd) as body, loose(framed(1, body), 1) as it:
        it.function = raise_signal()
        it.function.restype = {}.__getitem__  # fails in C, so that no handler runs before
        error = it.run()[3]
        assert isinstance(error, Odd)
        assert isinstance(error.__context__, KeyError)


def test_a_place_that_is_none_is_an_error() -> None:
    for at in (-1, 10_000, "x", 1 << 70):
        with loose(framed(1), 1, buffered=1000) as it:
            it._at = at
            with pytest.raises((TypeError, OverflowError)):
                it.run()


# -- memory -----------------------------------------------------------------------------------------------------------


def leaks(call: Callable[[], object], times: int = 1000) -> int:
    """Blocks that are left after so many calls."""
    for _ in range(100):
        call()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(times):
        call()
    gc.collect()
    return sys.getallocatedblocks() - before


MANY = 1 << 40  # small numbers are there already
FULL = b'[["a",[7]],{"k":[1]}]'


def test_nothing_is_left_behind() -> None:
    header = Header("plain")
    usual = {b'{"task":"plain"}': (header, USUAL_ORDER.terms)}
    ids = [ID.encode(), b"\xff", ID.encode()]
    raws = [b'1 1764000000000 0 {"task":"plain"}\n[[7],{}]'] * 2 + [b"x"]
    known = {"plain": [0.001, 0.001]}

    def done(kinds: tuple[int, ...] = (DONE, DONE), order: Order = USUAL_ORDER, value: bytes = b"") -> None:
        boxes = {"default": SimpleNamespace(plain=[], records=[])}
        data = b"".join(ANSWER.pack(MANY, kind, len(value), 0.1, 0, 9) + value for kind in kinds)
        BUILT.done(data, {MANY: order}, boxes, known, 0.1, 1764000000000)

    def run(buffer: bytes, **other: Any) -> None:
        with loose(buffer, 1, 2) as it, contextlib.suppress(OSError):
            it.run(**other)

    def broken(*_: object) -> float:
        raise OSError("broken")

    bad = SimpleNamespace(function=broken)
    calls: list[Callable[[], object]] = [
        lambda: BUILT.frames([USUAL_ORDER] * 3, 1),
        lambda: BUILT.frames([USUAL_ORDER, None], 1),
        lambda: BUILT.orders(ids, raws, [None] * 3, "default", 1, usual, known, 0.05),
        lambda: BUILT.orders(ids, raws, [None] * 3, "default", 1, {}, {}, 0.05),
        done,
        lambda: done((DONE, frames.FAILED)),
        lambda: done(order=KEPT_ORDER, value=b"[7]"),
        lambda: done(order=KEPT_ORDER),
        lambda: run(framed(1, FULL) + framed(2, FULL)),
        lambda: run(framed(1, FULL) + framed(2, FULL, task=1)),
        lambda: run(framed(1, FULL, task=2) + framed(2, FULL, task=2)),
        lambda: run(framed(1, FULL, task=2), dumps=broken),
        lambda: run(framed(1, FULL), tasks=((SimpleNamespace(function=lambda *args, **kwargs: [7]), "kept", True),)),
        lambda: run(framed(1, b"x")),
        lambda: run(framed(1, FULL), look=broken),
        lambda: run(framed(1, FULL), clock=broken),
        lambda: run(framed(1, FULL), tasks=((bad, "bad", False),)),
        lambda: run(framed(1, FULL), answer_w=-1),
    ]
    shared = (*usual, header, USUAL_ORDER, USUAL_ORDER.terms, USUAL_ORDER.message, known, bad, broken, orjson.loads,
              *usual.values(), *ids, *raws)  # fmt: skip
    gc.collect()  # what other tests have left
    before = [sys.getrefcount(it) for it in shared]
    assert [left for left in map(leaks, calls) if left > 500] == []  # one for each call would be 1000
    assert all(sys.getrefcount(it) < n + 500 for it, n in zip(shared, before, strict=True))
