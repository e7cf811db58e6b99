from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork.message import Header, Message, new_id
from prefork.worker import fast, frames, handoff
from prefork.worker.frames import ANSWER, DONE, FAILED, PROGRESS, READY, TOKEN, Answer, Given, Order, Terms
from prefork.worker.handoff import ChildEnd, MasterEnd

PATIENCE_S = 60


@pytest.fixture(scope="module", params=["pure", "compiled"], autouse=True)
def part(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it on both paths."""
    if request.param == "compiled" and fast.built is None:
        pytest.skip("the compiled part is not built here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "compiled", fast.built if request.param == "compiled" else None)
        yield


def order(body: bytes = b"[[],{}]", task: int = 0, attempt: int = 1, max_retries: int = 25, retried: int = 0) -> Order:
    message = Message(new_id(), "default", Header("t"), body, 1764000000000, 0)
    terms = Terms(message.header, task, 2, max_retries, 2.5, 1.5, expires=False, result_ttl_ms=86_400_000)
    return Order(message, terms, attempt, retried, expected_s=0.001, serial=1, flags=frames.WILL_LAST)


@contextmanager
def both_ends() -> Iterator[tuple[MasterEnd, ChildEnd]]:
    """Both ends in one process; each has a reading end of the token pipe of its own, as after a fork."""
    master = MasterEnd()
    token_r = os.dup(master.token_r)
    child = ChildEnd(master._child_task_r, token_r, master._child_answer_w)
    try:
        yield master, child
    finally:
        master.close()
        for fd in (master._child_task_r, token_r, master._child_answer_w):
            try:
                os.close(fd)
            except OSError:
                continue


def received(master: MasterEnd, n: int) -> list[Answer]:
    answers: list[Answer] = []
    poll = select.poll()
    poll.register(master.answer_r, select.POLLIN)
    while len(answers) < n:
        assert poll.poll(PATIENCE_S * 1000)
        answers += master.receive() or []
    return answers


def descriptors() -> set[str]:
    return set(os.listdir("/dev/fd"))


# -- one process ------------------------------------------------------------------------------------------------------


def test_an_order_arrives_with_all_that_its_attempt_needs() -> None:
    with both_ends() as (master, child):
        it = order(b'[[7],{"copy":true}]', task=3, attempt=4, max_retries=9, retried=2)
        assert master.hand([it])
        assert child.next() == Given(
            number=1, task=3, queue=2, flags=frames.WILL_LAST, attempt=4, retried=2, max_retries=9, timeout_s=2.5,
            soft_timeout_s=1.5, enqueued_ms=1764000000000, id=it.message.id, body=b'[[7],{"copy":true}]',
        )  # fmt: skip
        child.answer(1, DONE, b"result", 0.5, 0.25, 4096)
        assert received(master, 1) == [Answer(1, DONE, 0.5, 0.25, 4096, b"result")]
        assert master.settle(1) is it
        assert not master.unanswered
        assert master.settle(1) is None
        assert master.settle(99) is None


def test_orders_are_numbered_and_started_in_the_order_in_which_they_were_handed() -> None:
    with both_ends() as (master, child):
        orders = [order(b"%d" % n) for n in range(50)]
        assert master.hand(orders[:20])
        assert master.hand(orders[20:])
        assert list(master.unanswered.values()) == orders
        assert [(given.number, given.body) for _ in orders if (given := child.next())] == [
            (n + 1, b"%d" % n) for n in range(50)
        ]


@pytest.mark.parametrize("number", [70_000, 2**31])
def test_a_message_may_have_had_any_number_of_attempts(number: int) -> None:
    """A task that asks for another run each second, uncounted, has had 65,536 of them within a day."""
    with both_ends() as (master, child):
        master.hand([order(attempt=number, retried=number, max_retries=number)])
        given = child.next()
        assert given
        assert (given.attempt, given.retried, given.max_retries) == (number, number, number)


@pytest.mark.parametrize("id", ["a", "x" * 32, "ü" * 16])
def test_an_id_of_somebody_elses_making_arrives_as_it_is(id: str) -> None:
    with both_ends() as (master, child):
        it = order()
        it.message.id = id
        master.hand([it])
        given = child.next()
        assert given
        assert given.id == id


def test_an_id_that_is_too_long_does_not_stop_the_hand_off() -> None:
    with both_ends() as (master, child):
        it, other = order(), order()
        it.message.id = "x" + "ü" * 40
        master.hand([it, other])
        assert child.next()
        given = child.next()
        assert given
        assert given.id == other.message.id


def test_frames_are_passed_over_whose_tokens_were_taken_back() -> None:
    with both_ends() as (master, child):
        first, second, third = order(b"1"), order(b"2" * 100_000), order(b"3")
        master.hand([first])
        assert child.next()
        master.hand([second])
        assert master.take_back() == [second]
        assert list(master.unanswered.values()) == [first]
        master.hand([third])
        given = next_while_writing(master, child)
        assert given
        assert (given.number, given.body) == (3, b"3")


def next_while_writing(master: MasterEnd, child: ChildEnd) -> Given | None:
    """The child reads in a thread of its own, while the master goes on to write."""
    found: list[Given | None] = []
    thread = threading.Thread(target=lambda: found.append(child.next()), daemon=True)
    thread.start()
    end_s = time.monotonic() + PATIENCE_S
    while thread.is_alive():
        assert time.monotonic() < end_s, "the child waits for ever"
        master.write_on()
        thread.join(0.001)
    return found[0]


def test_take_back_takes_the_oldest_first_and_no_more_than_asked() -> None:
    with both_ends() as (master, child):
        orders = [order() for _ in range(10)]
        master.hand(orders)
        assert child.next()
        assert master.take_back(3) == orders[1:4]
        assert master.take_back() == orders[4:]
        assert master.take_back() == []
        assert list(master.unanswered.values()) == orders[:1]


def test_after_finish_the_child_does_what_it_holds_and_ends() -> None:
    with both_ends() as (master, child):
        orders = [order() for _ in range(3)]
        master.hand(orders)
        master.finish()
        master.finish()
        assert [given.number for _ in orders if (given := child.next())] == [1, 2, 3]
        assert child.next() is None
        assert child.next() is None
        assert master.take_back() == []


def test_a_child_whose_master_is_gone_ends() -> None:
    with both_ends() as (master, child):
        master.hand([order(b"x" * 1_000_000)])
        assert master.backlog
        master.close()
        assert child.next() is None
        with pytest.raises(OSError, match=r"."):
            child.answer(1, DONE)


def test_a_child_that_has_a_token_and_waits_for_its_frame_ends_with_its_master() -> None:
    with both_ends() as (master, child):
        os.write(master.token_w, TOKEN.pack(1))
        master.close()
        assert child.next() is None


def test_a_master_whose_child_is_gone_hears_it_and_keeps_what_it_held() -> None:
    with both_ends() as (master, child):
        one, two = order(), order()
        master.hand([one, two])
        assert child.next()
        child.answer(1, DONE)
        os.write(master._child_answer_w, ANSWER.pack(2, DONE, 50, 0, 0, 0) + b"half")  # it died in the middle
        os.close(master._child_answer_w)
        os.close(master._child_task_r)
        assert [answer.number for answer in received(master, 1)] == [1]
        assert master.settle(1) is one
        with pytest.raises(EOFError):
            master.receive()
        assert master.take_back() == [two]
        assert master.hand([order(b"x" * 200_000)])  # nobody reads it, and nobody is hurt
        assert master.write_on()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000) | st.integers(60_000, 70_000) | st.just(1 << 20), min_size=1, max_size=12))
def test_frames_of_all_sizes_go_through_a_pipe_that_takes_little_at_a_time(sizes: list[int]) -> None:
    with both_ends() as (master, child):
        rng = random.Random(len(sizes))
        bodies = [rng.randbytes(size) for size in sizes]
        whole = [master.hand([order(body)]) for body in bodies]
        assert whole[-1] is not bool(master.backlog)
        for n, body in enumerate(bodies):
            given = next_while_writing(master, child)
            assert given
            assert (given.number, given.body) == (n + 1, body)
        assert master.write_on()
        assert not master.backlog


def test_large_and_small_orders_are_handed_together_and_taken_back_one_by_one() -> None:
    with both_ends() as (master, child):
        orders = [order(size * b"x") for size in (10, 300_000, 0, 70_000, 200_000, 20)]
        master.hand(orders)
        assert master.take_back(2) == orders[:2]
        for one in orders[2:]:
            given = next_while_writing(master, child)
            assert given
            assert (given.id, given.body) == (one.message.id, one.message.body)
        assert not master.backlog


def test_a_large_order_goes_through_a_pipe_that_the_system_does_not_make_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff, "WIDE_BYTES", (1 << 31) + 1)  # more than Linux makes of any pipe
    with both_ends() as (master, child):
        master.hand([order(b"x" * 300_000)])
        given = next_while_writing(master, child)
        assert given
        assert len(given.body) == 300_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([READY, DONE, FAILED, PROGRESS]), st.binary(max_size=60)), max_size=8),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_answers_may_come_in_pieces_of_any_size(answers: list[tuple[int, bytes]], pieces: list[int]) -> None:
    data = b"".join(ANSWER.pack(n, kind, len(said), n / 2, 0.5, n) + said for n, (kind, said) in enumerate(answers))
    got: list[Answer] = []
    with both_ends() as (master, _):
        at = turn = 0
        while at < len(data):
            size = pieces[turn % len(pieces)]
            os.write(master._child_answer_w, data[at : at + size])
            at, turn = at + size, turn + 1
            got += master.receive() or []
        assert not master.receive()
        assert not master._answers
    assert got == [Answer(n, kind, n / 2, 0.5, n, said) for n, (kind, said) in enumerate(answers)]


GARBAGE = [
    ANSWER.pack(1, 6, 0, 0, 0, 0),
    ANSWER.pack(1, 255, 0, 0, 0, 0),
    ANSWER.pack(1, DONE, frames.LARGEST_ANSWER + 1, 0, 0, 0),
    b"Traceback (most recent call last):\n" * 3,
    b"\xff" * ANSWER.size,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda it: it[:12])
def test_garbage_in_the_answers_is_an_error_and_not_an_answer(garbage: bytes) -> None:
    with both_ends() as (master, _):
        os.write(master._child_answer_w, garbage)
        with pytest.raises(ValueError, match="an answer of kind"):
            master.receive()


@given(st.binary(min_size=1, max_size=200))
def test_no_bytes_at_all_are_worse_than_garbage(data: bytes) -> None:
    with both_ends() as (master, _):
        os.write(master._child_answer_w, data)
        try:
            answers = master.receive() or []
        except ValueError:
            return
        assert all(answer.kind <= frames.BOOT_FAILED for answer in answers)


def test_what_was_answered_before_the_garbage_is_not_lost_with_it() -> None:
    """It is done: to run it again were wrong, and to charge it with a crash as well."""
    with both_ends() as (master, child):
        it = order()
        master.hand([it])
        child.next()
        child.answer(1, DONE, b"result")
        os.write(master._child_answer_w, b"\xff" * ANSWER.size)
        answers: list[Answer] = []
        for _ in range(2):
            try:
                answers += master.receive() or []
            except ValueError:
                break
        assert [answer.payload for answer in answers] == [b"result"]


def test_an_answer_is_whole_whatever_its_size() -> None:
    with both_ends() as (master, child):
        said = random.Random(1).randbytes(3_000_000)
        thread = threading.Thread(target=lambda: child.answer(1, DONE, said))
        thread.start()
        assert [answer.payload for answer in received(master, 1)] == [said]
        thread.join()


def test_no_descriptor_is_left_open() -> None:
    before = descriptors()
    for _ in range(50):
        master = MasterEnd()
        master.forked()
        assert len(set(master.descriptors())) == 4
        master.hand([order()])
        master.finish()
        assert len(set(master.descriptors())) == 3
        master.close()
        assert master.descriptors() == ()
        master.close()
    assert descriptors() <= before  # what other tests have left may go meanwhile


def test_descriptors_do_not_reach_a_program_that_a_task_runs() -> None:
    with both_ends() as (master, _):
        seen = subprocess.run([sys.executable, "-c", "import os; print(os.listdir('/dev/fd'))"], capture_output=True,
                              text=True, close_fds=False)  # fmt: skip
        for fd in master.descriptors():
            assert f"'{fd}'" not in seen.stdout


# -- a forked child ---------------------------------------------------------------------------------------------------


@contextmanager
def forked(live: object) -> Iterator[tuple[MasterEnd, int]]:
    master = MasterEnd()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(PATIENCE_S)
            live(master.child_end())  # type: ignore[operator]
        finally:
            os._exit(0)
    master.forked()
    try:
        yield master, pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        master.close()


def echo(end: ChildEnd) -> None:
    while given := end.next():
        end.answer(given.number, DONE, given.body)


def test_a_forked_child_answers_all_that_it_is_handed() -> None:
    with forked(echo) as (master, _):
        bodies = [random.Random(n).randbytes(n * 997 % 300_000) for n in range(40)]
        got: list[bytes] = []
        poll = select.poll()
        poll.register(master.answer_r, select.POLLIN)
        for body in bodies:
            master.hand([order(body)])
        end_s = time.monotonic() + PATIENCE_S
        while len(got) < len(bodies):
            assert time.monotonic() < end_s
            master.write_on()
            poll.poll(5)
            got += [answer.payload for answer in master.receive() or []]
        assert got == bodies
        master.finish()
        poll.poll(PATIENCE_S * 1000)
        with pytest.raises(EOFError):
            master.receive()


def test_a_forked_child_has_its_own_ends_only() -> None:
    def count(end: ChildEnd) -> None:
        mine = {end.task_r, end.token_r, end.answer_w}
        end.answer(0, DONE, repr(len({int(fd) for fd in descriptors() if int(fd) >= min(mine)} & mine)).encode())
        end.next()
        os._exit(0)

    with forked(count) as (master, _):
        assert [answer.payload for answer in received(master, 1)] == [b"3"]
        assert fcntl.fcntl(master.token_r, fcntl.F_GETFL) & os.O_NONBLOCK


def test_each_token_goes_to_the_child_or_back_to_the_master_and_to_one_of_them_only() -> None:
    """The race that the whole hand-off rests on: 100,000 tokens or more, read by both at random."""
    total = 100_000
    with forked(echo) as (master, _):
        rng = random.Random(7)
        poll = select.poll()
        poll.register(master.answer_r, select.POLLIN)
        body: dict[int, bytes] = {}
        ran: list[int] = []
        back: list[int] = []
        handed = 0
        end_s = time.monotonic() + PATIENCE_S
        while len(ran) + len(back) < total:
            assert time.monotonic() < end_s, f"{len(ran)} run, {len(back)} taken back"
            if handed == total and min(len(ran), len(back)) <= 1000:
                total += 1000
            if handed < total and len(master.unanswered) < 600:
                n = min(rng.randint(1, 64), total - handed)
                orders = [order(b"%d" % (handed + k) * rng.randint(0, 3)) for k in range(n)]
                for k, it in enumerate(orders):
                    body[handed + k + 1] = it.message.body
                    it.retried = handed + k + 1  # its number, told back by take_back
                master.hand(orders)
                handed += n
            if rng.random() < 0.4:
                back += [it.retried for it in master.take_back(rng.choice([1, 3, 50, 1 << 13]))]
            if master.backlog:
                master.write_on()
            poll.poll(1 if handed == total else 0)
            for answer in master.receive() or []:
                assert master.settle(answer.number)
                assert answer.payload == body[answer.number]
                ran.append(answer.number)
        assert not master.unanswered
        assert sorted(ran + back) == list(range(1, total + 1))
        assert ran == sorted(ran)


def test_after_a_childs_death_it_is_exact_what_ran_what_waited_and_what_was_done() -> None:
    def live(end: ChildEnd) -> None:
        for _ in range(3):
            given = end.next()
            assert given
            end.answer(given.number, DONE, b"done")
        end.next()
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(live) as (master, _):
        orders = [order(b"%d" % n) for n in range(10)]
        master.hand(orders)
        answers = received(master, 3)
        assert [master.settle(answer.number) for answer in answers] == orders[:3]
        with pytest.raises(EOFError):
            received(master, 1)
        assert master.take_back() == orders[4:]
        assert list(master.unanswered.values()) == [orders[3]]


def test_a_token_is_never_torn() -> None:
    assert TOKEN.size == 8
    assert 4096 % TOKEN.size == 0 == select.PIPE_BUF % TOKEN.size
    assert struct.calcsize("<Q") == TOKEN.size
