from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import hiredis
import orjson
import pytest

from prefork import Prefork
from prefork.broker.channel import Lost
from prefork.broker.durability import parse
from prefork.broker.keys import Keys
from prefork.broker.verbs import Call
from prefork.message import Header, Message, State, new_id
from prefork.retry import UNKNOWN_TASK_DELAYS_S
from prefork.worker.evidence import of_failure
from prefork.worker.frames import DONE, DONE_WITH_FOLLOW_UPS, FAILED, Answer, Order, Terms
from prefork.worker.outbox import BATCH, MOST_BYTES, MOST_RECORDS, MOST_REFUSED
from prefork.worker.settlement import Settlement

NOW_MS = 1764000000000
WIDTH = {"done": 4, "retry": 5, "back": 3, "dead": 5, "drop": 5, "state": 3, "follow": 6}
Record = tuple[Any, ...]


class Wire:
    """Stands for a Channel: keeps what is sent until the test replies."""

    def __init__(self) -> None:
        self.due: list[tuple[Call, Any]] = []
        self.announced: list[tuple[str, Any]] = []
        self.waits: list[Any] = []
        self.restarts = 0

    def send(self, call: Call, callback: Any, limit_s: float = 10) -> None:
        self.due.append((call, callback))

    def send_words(self, words: tuple[Any, ...], callback: Any, limit_s: float = 10) -> None:
        if words[0] in ("WAIT", "WAITAOF"):
            self.waits.append(callback)
            return
        assert words[:2] == ("SADD", "a:b:queues")
        self.announced.append((words[2], callback))

    def restart(self) -> None:
        self.restarts += 1

    def reply(self, reply: Any, at: int = 0) -> None:
        self.due.pop(at)[1](reply)


def taken_apart(call: Call) -> tuple[list[str], list[Record]]:
    """What a settle carries: plain ids, and records as settle.lua reads them."""
    assert call.verb == "settle"
    n = int(call.arguments[6])
    plain, words, records = list(call.arguments[7 : 7 + n]), list(call.arguments[7 + n :]), []
    while words:
        width = WIDTH[str(words[0])]
        records.append(tuple(words[:width]))
        assert len(records[-1]) == width
        del words[:width]
    return plain, records  # type: ignore[return-value]


class Desk:
    """A settlement for queues `default` and `mail`, with what it has sent and said."""

    def __init__(self, max_crashes: int = 3) -> None:
        self.app = app = Prefork("shop")
        for name, options in {
            "job": {},
            "quiet": {"result_ttl": 0},
            "minute": {"result_ttl": 60, "retry_delay": 7},
            "function": {"retry_delay": lambda retried: 1 / 0},
        }.items():
            app.task(name=name, **options)(lambda: None)  # type: ignore[call-overload]
        self.wire = Wire()
        self.fenced: list[str] = []
        self.later: list[tuple[float, Any]] = []
        self.it = Settlement(
            app.tasks, lambda: NOW_MS, prefix="a:b", dead_max=100, dead_ttl_s=3600, max_crashes=max_crashes,
            fenced=self.fenced.append, later=lambda delay_s, callback: self.later.append((delay_s, callback)),
        )  # fmt: skip
        self.it.worker = "w1"
        for queue in ("default", "mail"):
            self.it.add_queue(Keys("a:b", queue))

    def message(self, task: str = "job", queue: str = "default", state: State | None = None, **header: Any) -> Message:
        return Message(new_id(), queue, Header(task, **header), b"[[],{}]", NOW_MS - 500, 0, state)

    def order(self, task: str = "job", max_retries: int = 25, **rest: Any) -> Order:
        message = self.message(task, **rest)
        state = message.state or State()
        ttl_ms = round(self.app.tasks[task].options.result_ttl_s * 1000)
        terms = Terms(message.header, 0, 0, max_retries, 5.0, 0.0, expires=False, result_ttl_ms=ttl_ms)
        return Order(message, terms, state.attempts + 1, state.retried, expected_s=0.001, serial=1)

    def answer(self, order: Order, kind: int, payload: bytes = b"", ran_s: float = 0.25) -> None:
        self.it.answered(order, Answer(1, kind, ran_s, 0.1, 1000, payload), self.wire)  # type: ignore[arg-type]

    def fail(self, order: Order, **verdict: Any) -> None:
        self.answer(order, FAILED, orjson.dumps({"error": error(), "delay_s": 15.0} | verdict))

    def flush(self) -> None:
        self.it.flush(self.wire)  # type: ignore[arg-type]

    def sent(self) -> tuple[list[str], list[Record]]:
        """Flush, and take apart what was sent for the queue `default`; the broker takes it."""
        self.flush()
        (call, _), *rest = self.wire.due
        assert not rest
        self.wire.reply([NOW_MS, 1])
        return taken_apart(call)

    def record(self) -> Record:
        """The only record that was sent."""
        plain, (record,) = self.sent()
        assert not plain
        return record


def error(message: str = "no route", traceback: str = "Traceback …\nOSError: no route\n") -> dict[str, Any]:
    return {"class": "builtins.OSError", "message": message, "traceback": traceback}


@pytest.fixture
def desk() -> Desk:
    return Desk()


# -- done -------------------------------------------------------------------------------------------------------------


def test_done_with_a_result_to_keep(desk: Desk) -> None:
    order = desk.order("minute")
    desk.answer(order, DONE, b'{"a":1}')
    verb, id, ttl_ms, record = desk.record()
    assert (verb, id, ttl_ms) == ("done", order.message.id, 60_000)
    assert orjson.loads(record) == {
        "status": "SUCCESSFUL", "task": "minute", "attempts": 1, "enqueued_ms": NOW_MS - 500,
        "started_ms": NOW_MS - 250, "finished_ms": NOW_MS, "ran_s": 0.25, "value": {"a": 1},
    }  # fmt: skip


@pytest.mark.parametrize("ahead_ms", [0, 5], ids=["just now", "the clock is read late"])
@pytest.mark.parametrize("history", [False, True], ids=["the first attempt", "with a history"])
def test_nothing_begins_before_it_is_enqueued_nor_ends_before_it_begins(
    desk: Desk, ahead_ms: int, history: bool
) -> None:
    """The milliseconds that it ran are rounded, and the server's clock is reckoned from when it was last read."""
    order = desk.order("minute", state=State() if history else None)
    order.message.enqueued_ms = enqueued_ms = NOW_MS + ahead_ms
    desk.answer(order, DONE, b"1", ran_s=0.0007)
    record = orjson.loads(desk.record()[3])
    assert (record["enqueued_ms"], record["started_ms"], record["finished_ms"]) == (enqueued_ms,) * 3


def test_a_failure_does_not_end_before_it_is_enqueued(desk: Desk) -> None:
    order = desk.order("minute", max_retries=0)
    order.message.enqueued_ms = NOW_MS + 5
    desk.fail(order)
    record = orjson.loads(desk.record()[4])
    assert (record["started_ms"], record["finished_ms"]) == (NOW_MS + 5, NOW_MS + 5)


def test_done_without_a_result_to_keep_costs_an_id_and_no_more(desk: Desk) -> None:
    orders = [desk.order("quiet") for _ in range(3)]
    for order in orders:
        desk.answer(order, DONE)
    assert desk.sent() == ([order.message.id for order in orders], [])


def test_done_at_last_tells_of_the_attempts_before(desk: Desk) -> None:
    state = State(attempts=2, retried=2, started_ms=NOW_MS - 90_000, errors=[error("1"), error("2")])
    desk.answer(desk.order("job", state=state), DONE, b"null")
    record = orjson.loads(desk.record()[3])
    assert (record["attempts"], record["started_ms"], record["value"]) == (3, NOW_MS - 90_000, None)
    assert [it["message"] for it in record["errors"]] == ["1", "2"]


# -- failed -----------------------------------------------------------------------------------------------------------


def test_a_failure_is_retried_by_the_servers_clock(desk: Desk) -> None:
    order = desk.order(max_retries=2)
    desk.fail(order, delay_s=15.5)
    verb, id, delay_ms, state, failed = desk.record()
    assert (verb, id, delay_ms, failed) == ("retry", order.message.id, 15_500, 1)
    it = State.decode(state)
    assert (it.attempts, it.retried, it.crashes, it.workers) == (1, 1, 0, ["w1"])
    assert (it.started_ms, it.due_ms) == (NOW_MS - 250, NOW_MS + 15_500)
    assert it.errors == [error() | of_failure(0, 0.1, 1000) | {"attempt": 1, "ran_s": 0.25}]


def test_a_failure_whose_retries_are_spent_is_a_dead_letter_with_the_evidence(desk: Desk) -> None:
    state = State(attempts=2, retried=2, errors=[error("1"), error("2")])
    order = desk.order("minute", max_retries=2, state=state)
    desk.fail(order, error=error("3"))
    verb, id, raw, ttl_ms, record = desk.record()
    assert (verb, id, ttl_ms) == ("dead", order.message.id, 60_000)
    it = State.decode(raw)
    assert (it.attempts, it.retried, [e["message"] for e in it.errors]) == (3, 2, ["1", "2", "3"])
    told = orjson.loads(record)
    assert (told["status"], told["task"], told["attempts"]) == ("FAILED", "minute", 3)
    assert (told["enqueued_ms"], told["finished_ms"]) == (NOW_MS - 500, NOW_MS)
    assert [e["message"] for e in told["errors"]] == ["1", "2", "3"]


@pytest.mark.parametrize("max_retries", [0, 1, 5])
def test_a_task_is_started_once_more_than_it_has_retries(max_retries: int) -> None:
    state: State | None = None
    for attempt in range(1, max_retries + 3):
        desk = Desk()
        desk.fail(desk.order(max_retries=max_retries, state=state))
        record = desk.record()
        if record[0] == "dead":
            assert attempt == max_retries + 1
            return
        state = State.decode(record[3])
    pytest.fail("it is retried for ever")


def test_what_must_not_be_retried_is_dead_at_once(desk: Desk) -> None:
    desk.fail(desk.order(), dead=True)
    assert desk.record()[0] == "dead"


def test_a_dead_letter_of_a_task_that_keeps_no_result_is_kept_all_the_same(desk: Desk) -> None:
    desk.fail(desk.order("quiet"), dead=True)
    verb, _, raw, ttl_ms, _ = desk.record()
    assert (verb, ttl_ms) == ("dead", 0)
    assert State.decode(raw).errors[0]["message"] == "no route"


def test_a_run_that_was_asked_for_is_no_failure(desk: Desk) -> None:
    desk.fail(desk.order(max_retries=3), asked=True, counted=True, delay_s=3)
    verb, _, delay_ms, raw, failed = desk.record()
    assert (verb, delay_ms, failed) == ("retry", 3000, 0)
    assert State.decode(raw).retried == 1


def test_a_run_that_was_asked_for_uncounted_uses_up_no_retry(desk: Desk) -> None:
    desk.fail(desk.order(max_retries=0, state=State(attempts=9)), asked=True, counted=False, delay_s=0)
    verb, _, delay_ms, raw, failed = desk.record()
    assert (verb, delay_ms, failed) == ("retry", 0, 0)
    assert (State.decode(raw).retried, State.decode(raw).attempts) == (0, 10)


def test_a_counted_run_that_was_asked_for_with_none_left_is_dead(desk: Desk) -> None:
    desk.fail(desk.order(max_retries=1, state=State(attempts=1, retried=1)), asked=True, counted=True, delay_s=3)
    assert desk.record()[0] == "dead"


@pytest.mark.parametrize("delay_s", [None, "soon", 1e300, -5, {}], ids=repr)
def test_whatever_a_child_says_of_the_delay_the_master_lives(desk: Desk, delay_s: Any) -> None:
    desk.fail(desk.order(), delay_s=delay_s)
    verb, _, delay_ms, raw, _ = desk.record()
    assert verb == "retry"
    assert 0 <= delay_ms <= 10 * 366 * 86_400_000
    assert State.decode(raw).retried == 1


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b'"x"', b"{}", b'{"error":{}}', b'{"error":null,"delay_s":1}'])
def test_whatever_a_child_answers_the_master_lives(desk: Desk, said: bytes) -> None:
    """A task may write to any descriptor, also to that of the answers."""
    desk.answer(desk.order(), FAILED, said)
    assert desk.record()[0] in ("retry", "dead")


def test_an_error_of_many_lines_is_logged_by_its_first(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="prefork"):
        for text in ("one\ntwo", "", "\n", "\x0b"):
            desk.fail(desk.order(), error=error(text, ""))
    assert all(record.getMessage().count("\n") == 0 for record in caplog.records)
    assert "builtins.OSError: one" in caplog.text


# -- timed out, crashed -----------------------------------------------------------------------------------------------


def test_an_attempt_that_was_killed_at_its_deadline_is_a_failure(desk: Desk) -> None:
    desk.it.timed_out(desk.order("minute"), 5.01)
    verb, _, delay_ms, raw, failed = desk.record()
    assert (verb, delay_ms, failed) == ("retry", 7000, 1)
    it = State.decode(raw)
    assert (it.attempts, it.retried, it.crashes) == (1, 1, 0)
    assert it.errors[0]["class"] == "prefork.TaskTimeout"
    assert "5 s" in it.errors[0]["message"]


def test_a_function_that_says_the_delay_is_not_run_in_the_master(desk: Desk) -> None:
    desk.it.timed_out(desk.order("function"), 5.01)
    assert 15_000 <= desk.record()[2] <= 44_000


def test_a_deadline_with_the_retries_spent_is_a_dead_letter(desk: Desk) -> None:
    desk.it.timed_out(desk.order(max_retries=0), 5.01)
    assert desk.record()[0] == "dead"


def test_a_crash_goes_back_to_the_front_and_is_counted_apart(desk: Desk) -> None:
    order = desk.order(state=State(attempts=3, retried=3, errors=[error()]))
    assert desk.it.crashed(order, "killed by SIGKILL (out of memory?)", 1.5, 800 << 10) == "back to queue default"
    verb, id, raw = desk.record()
    assert (verb, id) == ("back", order.message.id)
    it = State.decode(raw)
    assert (it.attempts, it.retried, it.crashes) == (4, 3, 1)
    assert it.errors[-1]["class"] == "prefork.ChildDied"
    assert it.errors[-1]["message"] == (
        "its child killed by SIGKILL (out of memory?) after 1.5 s, peak memory 800 MB"
    )  # fmt: skip


@pytest.mark.parametrize("max_crashes", [1, 2, 3])
def test_a_message_that_takes_its_child_down_again_and_again_is_dead_in_the_end(max_crashes: int) -> None:
    state: State | None = None
    for crash in range(1, max_crashes + 1):
        desk = Desk(max_crashes)
        said = desk.it.crashed(desk.order(state=state), "exited with 3", 0.1, 0)
        record = desk.record()
        if crash < max_crashes:
            assert record[0] == "back"
            state = State.decode(record[2])
        else:
            assert record[0] == "dead"
            assert said == "a dead letter now"
            assert State.decode(record[2]).crashes == max_crashes


# -- unknown, bad, expired, back, progress ----------------------------------------------------------------------------


def test_an_unknown_task_is_tried_again_on_a_schedule_and_then_dead() -> None:
    state: State | None = None
    for delay_s in UNKNOWN_TASK_DELAYS_S:
        desk = Desk()
        desk.it.unknown(desk.message("elsewhere", state=state))
        verb, _, delay_ms, raw, failed = desk.record()
        assert (verb, delay_ms, failed) == ("retry", delay_s * 1000, 0)
        state = State.decode(raw)
        assert state.attempts == state.retried == 0
    desk = Desk()
    desk.it.unknown(desk.message("elsewhere", state=state))
    verb, _, raw, ttl_ms, record = desk.record()
    assert (verb, ttl_ms) == ("dead", 86_400_000)
    (told,) = State.decode(raw).errors
    assert told["class"] == "prefork.UnknownTask"
    assert told["message"] == (
        "no task 'elsewhere' is registered here; registered are: function, job, minute, quiet"
    )  # fmt: skip
    assert orjson.loads(record)["errors"] == [told]


def test_a_message_that_cannot_be_decoded_is_a_dead_letter_as_it_is(desk: Desk) -> None:
    desk.it.bad(b"\xff" * 4, "default", "message … is not in prefork's format")
    verb, id, raw, ttl_ms, record = desk.record()
    assert (verb, id, ttl_ms, record) == ("dead", b"\xff" * 4, 0, b"")
    assert State.decode(raw).errors[0]["class"] == "prefork.BadMessage"


def test_an_expired_message_is_dropped_with_status_and_reason(desk: Desk) -> None:
    message = desk.message("minute", state=State(attempts=1, errors=[error()]))
    desk.it.expired(message)
    verb, id, ttl_ms, record, counter = desk.record()
    assert (verb, id, ttl_ms, counter) == ("drop", message.id, 60_000, "expired")
    told = orjson.loads(record)
    assert (told["status"], told["attempts"]) == ("FAILED", 1)
    assert [e["class"] for e in told["errors"]] == ["builtins.OSError", "prefork.Expired"]


def test_what_is_put_back_is_not_charged_and_keeps_its_order(desk: Desk) -> None:
    orders = [desk.order(state=State(attempts=1)) for _ in range(5)]
    for serial, order in enumerate(orders):
        order.serial = serial
    desk.it.put_back([orders[2], orders[0], orders[4], orders[1], orders[3]])
    # Each goes to the front: the last one of the batch will be claimed first.
    assert desk.sent()[1] == [("back", order.message.id, b"") for order in reversed(orders)]


@pytest.mark.parametrize("began_ms", [0, NOW_MS - 7000])
def test_what_had_begun_in_time_and_is_put_back_does_not_expire(desk: Desk, began_ms: int) -> None:
    order = desk.order(state=State(attempts=1, started_ms=began_ms) if began_ms else None)
    order.terms = replace(order.terms, expires=True)
    desk.it.put_back([order], begun=True)
    verb, id, state = desk.record()
    assert (verb, id) == ("back", order.message.id)
    assert State.decode(state) == State(attempts=bool(began_ms), started_ms=began_ms or NOW_MS)


def test_a_retry_that_had_begun_in_time_and_is_put_back_does_not_expire(desk: Desk) -> None:
    order = desk.order(state=State(attempts=1, retried=1, started_ms=NOW_MS - 7000, due_ms=NOW_MS - 3000))
    order.terms = replace(order.terms, expires=True)
    desk.it.put_back([order], begun=True)
    assert State.decode(desk.record()[2]) == State(attempts=1, retried=1, started_ms=NOW_MS - 7000)


def test_progress_is_kept_while_it_runs_and_gone_with_the_attempt(desk: Desk) -> None:
    order = desk.order()
    desk.it.progress(order.message, [3, 10, "pages"])
    verb, id, raw = desk.record()
    assert (verb, id, State.decode(raw)) == ("state", order.message.id, State(progress=[3, 10, "pages"]))
    desk.fail(order)
    assert State.decode(desk.record()[3]).progress is None


@pytest.mark.parametrize("reply", [Lost("gone"), hiredis.ReplyError("READONLY")], ids=repr)
def test_progress_that_cannot_be_told_does_not_pile_up(desk: Desk, reply: Exception) -> None:
    """A task that runs through a long outage: only the latest is worth keeping, also of what was sent in vain."""
    order = desk.order()
    for done in range(50):
        desk.it.progress(order.message, [done, 50, ""])
        if done % 10 == 5:
            desk.flush()
            desk.wire.reply(reply)
            for _, go_on in desk.later:
                go_on()
            desk.later.clear()
    assert desk.it.unsettled() == 0, "it runs: nothing of it is decided"
    assert State.decode(desk.record()[2]).progress == [49, 50, ""]
    assert desk.it.is_empty


def test_progress_of_many_is_sent_in_more_than_one_script(desk: Desk) -> None:
    for _ in range(MOST_RECORDS + 1):
        desk.it.progress(desk.order().message, [1, 2, ""])
    assert [len(desk.sent()[1]) for _ in range(2)] == [MOST_RECORDS, 1]
    assert desk.it.is_empty


def test_progress_of_a_run_that_is_over_is_not_told_of_the_next(desk: Desk) -> None:
    order = desk.order()
    desk.it.put_back([order])
    desk.it.progress(order.message, [1, 2, ""])
    desk.it.came_back("default", [order.message.id.encode()])
    assert desk.it.is_empty


def test_a_state_does_not_grow_for_ever(desk: Desk) -> None:
    state: State | None = None
    for n in range(40):
        desk.it.worker = f"w{n}"
        desk.fail(desk.order(max_retries=99, state=state))
        raw = desk.record()[3]
        state = State.decode(raw)
        assert len(raw) < 4000
    assert state
    assert state.workers == [f"w{n}" for n in range(30, 40)]
    assert len(state.errors) == 10


# -- send -------------------------------------------------------------------------------------------------------------


def test_nothing_to_settle_sends_nothing(desk: Desk) -> None:
    desk.flush()
    assert desk.wire.due == []
    assert desk.it.is_empty


def test_each_queue_is_settled_by_itself_and_one_batch_at_a_time(desk: Desk) -> None:
    first, other = desk.order("quiet"), desk.order("quiet", queue="mail")
    for order in (first, other):
        desk.answer(order, DONE)
    desk.flush()
    assert [call.keys[1] for call, _ in desk.wire.due] == [
        "a:b:{default}:active:w1",
        "a:b:{mail}:active:w1",
    ]
    second = desk.order("quiet")
    desk.answer(second, DONE)
    desk.flush()
    assert len(desk.wire.due) == 2
    assert desk.it.unsettled() == 3
    desk.wire.reply([NOW_MS, 1])
    desk.flush()
    assert taken_apart(desk.wire.due[1][0])[0] == [second.message.id]
    desk.wire.reply([NOW_MS, 1])
    desk.wire.reply([NOW_MS, 1])
    assert desk.it.is_empty
    assert desk.it.unsettled() == 0


def test_batches_have_a_bound_and_lose_nothing(desk: Desk) -> None:
    plain = [desk.order("quiet") for _ in range(BATCH + 10)]
    records = [desk.order("job") for _ in range(BATCH + 20)]
    for order in (*plain, *records):
        desk.answer(order, DONE, b"" if order.message.header.task == "quiet" else b"1")
    seen: list[str] = []
    batches = 0
    while not desk.it.is_empty:
        ids, some = desk.sent()
        assert len(ids) <= BATCH
        assert len(some) <= MOST_RECORDS
        seen += ids + [record[1] for record in some]
        batches += 1
    assert batches == -(-(BATCH + 20) // MOST_RECORDS)
    assert sorted(seen) == sorted(order.message.id for order in (*plain, *records))


def test_who_leaves_sends_all_that_is_left_behind_a_batch_that_is_not_answered(desk: Desk) -> None:
    orders = [desk.order("quiet") for _ in range(2 * BATCH + 10)] + [desk.order("job") for _ in range(5)]
    for order in orders:
        desk.answer(order, DONE, b"" if order.message.header.task == "quiet" else b"1")
    desk.flush()
    desk.it.send_rest(desk.wire)  # type: ignore[arg-type]
    batches = [taken_apart(call) for call, _ in desk.wire.due]
    assert [len(plain) for plain, _ in batches] == [BATCH, BATCH, 10]
    seen = [id for plain, records in batches for id in (*plain, *(record[1] for record in records))]
    assert sorted(seen) == sorted(order.message.id for order in orders)
    assert desk.it.unsettled() == len(orders)


@pytest.mark.parametrize(("task", "most"), [("quiet", BATCH), ("job", MOST_RECORDS)])
def test_nothing_is_claimed_while_a_batch_has_left_something_behind(desk: Desk, task: str, most: int) -> None:
    """A claim brings more than a batch takes: what is not settled would grow as long as there is anything to do."""
    for _ in range(most):
        desk.answer(desk.order(task), DONE, b"" if task == "quiet" else b"1")
    desk.flush()
    assert not desk.it.is_full
    for _ in range(most + 1):
        desk.answer(desk.order(task), DONE, b"" if task == "quiet" else b"1")
    assert not desk.it.is_full, "the next batch may take it all"
    desk.wire.reply([NOW_MS, most])
    desk.flush()
    assert desk.it.is_full
    desk.wire.reply([NOW_MS, most])
    desk.flush()
    assert not desk.it.is_full
    desk.wire.reply([NOW_MS, 1])
    assert desk.it.is_empty


def test_one_wait_for_the_disk_is_for_many_batches(desk: Desk) -> None:
    """One that is synced every second would take no more than a batch a second."""
    desk.it.durability, desk.it.wait_s = parse("fsync"), 1.0
    orders = [desk.order() for _ in range(2 * MOST_RECORDS + 1)]
    for order in orders:
        desk.answer(order, DONE, b"1")
    for on_disk in (0, 1):  # too late at first
        desk.flush()
        batches = [taken_apart(call)[1] for call, _ in desk.wire.due]
        assert [len(batch) for batch in batches] == [MOST_RECORDS, MOST_RECORDS, 1]
        assert [record[1] for batch in batches for record in batch] == [order.message.id for order in orders]
        assert not desk.it.is_full
        for batch in batches:
            desk.wire.reply([NOW_MS, len(batch)])
        assert desk.it.unsettled() == len(orders)
        (waited,) = desk.wire.waits
        desk.wire.waits.clear()
        waited([on_disk, 0])
        if not on_disk:
            desk.later.pop()[1]()
    assert desk.it.is_empty


def test_one_wait_is_for_all_queues(desk: Desk) -> None:
    """It holds the connection up, and with it the lease: by itself a missing replica takes a third of that."""
    desk.it.durability, desk.it.wait_s = parse("fsync"), 1.0
    for queue in ("default", "mail"):
        desk.answer(desk.order("quiet", queue=queue), DONE)
    desk.flush()
    later = desk.order("quiet", queue="mail")
    desk.answer(later, DONE)
    for due in 2, 1, 0:
        desk.flush()
        assert (len(desk.wire.due), len(desk.wire.waits)) == (due, 1)
        if due:
            desk.wire.reply([NOW_MS, 1])
    desk.wire.waits.pop()([1, 0])
    assert desk.it.unsettled() == 1
    desk.flush()
    assert [taken_apart(call)[0] for call, _ in desk.wire.due] == [[later.message.id]]


def test_a_script_that_had_to_be_sent_in_full_is_waited_for_once_more(desk: Desk) -> None:
    desk.it.durability, desk.it.wait_s = parse("fsync"), 1.0
    for _ in range(MOST_RECORDS + 1):
        desk.answer(desk.order(), DONE, b"1")
    desk.flush()
    desk.wire.reply([NOW_MS, 1])
    desk.wire.waits.pop()([1, 0])
    desk.flush()
    assert len(desk.wire.due) == 1, "nothing is sent twice"
    desk.wire.reply([NOW_MS, 1])
    assert desk.it.unsettled() == MOST_RECORDS + 1
    desk.wire.waits.pop()([1, 0])
    assert desk.it.is_empty


def test_a_batch_that_is_refused_among_many_has_all_of_them_sent_again(desk: Desk) -> None:
    desk.it.durability, desk.it.wait_s = parse("fsync"), 1.0
    orders = [desk.order() for _ in range(MOST_RECORDS + 1)]
    for order in orders:
        desk.answer(order, DONE, b"1")
    desk.flush()
    desk.wire.reply(hiredis.ReplyError("OOM"))
    desk.wire.reply([NOW_MS, 1])
    desk.wire.waits.pop()([1, 0])
    assert desk.it.unsettled() == len(orders)
    desk.later.pop()[1]()
    desk.flush()
    assert [len(taken_apart(call)[1]) for call, _ in desk.wire.due] == [MOST_RECORDS, 1]


def test_what_came_back_and_is_settled_no_more_keeps_nobody_from_claiming(desk: Desk) -> None:
    orders = [desk.order() for _ in range(MOST_RECORDS + 1)]
    desk.it.put_back(list(orders))
    desk.flush()
    assert desk.it.is_full
    desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    assert desk.it.refuses
    desk.it.came_back("default", [order.message.id.encode() for order in orders])
    assert not desk.it.is_full
    assert not desk.it.backs_wait
    assert not desk.it.refuses, "nothing is left that could be taken"


def test_large_results_are_sent_in_smaller_batches(desk: Desk) -> None:
    for _ in range(20):
        desk.answer(desk.order(), DONE, b'"' + b"x" * 1_000_000 + b'"')
    sizes = []
    while not desk.it.is_empty:
        sizes.append(sum(len(record[3]) for record in desk.sent()[1]))
    assert max(sizes) <= MOST_BYTES + 1_100_000
    assert len(sizes) == 20


def test_a_batch_whose_reply_was_lost_is_sent_again_first_of_all(desk: Desk) -> None:
    first, second, later = desk.order("quiet"), desk.order(), desk.order()
    desk.answer(first, DONE)
    desk.answer(second, DONE, b"1")
    desk.flush()
    desk.answer(later, DONE, b"2")
    desk.wire.reply(Lost("gone"))
    assert desk.it.unsettled() == 3
    plain, records = desk.sent()
    assert plain == [first.message.id]
    assert [record[1] for record in records] == [second.message.id, later.message.id]
    assert desk.it.is_empty
    assert not desk.later


def test_nothing_is_claimed_behind_a_batch_that_was_refused_until_it_is_taken(desk: Desk) -> None:
    """A script may be broken off when it has put some back: claimed behind it, they would be put back again."""
    desk.it.put_back([desk.order() for _ in range(2)])
    desk.flush()
    assert not desk.it.backs_wait
    desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    for _ in range(2):
        assert desk.it.barred == {"default"}, "the other queues go on"
        assert not desk.it.backs_wait
        assert not desk.it.is_full
        desk.later.pop()[1]()
        desk.flush()
        assert desk.it.barred == {"default"}
        desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    desk.later.pop()[1]()
    desk.flush()
    desk.wire.reply([NOW_MS, 2])
    assert desk.it.barred == set()


def test_what_was_claimed_behind_a_batch_that_was_broken_off_is_not_put_back_in_the_midst_of_its_run(
    desk: Desk,
) -> None:
    first, second = desk.order(), desk.order()
    desk.it.put_back([first, second])
    desk.flush()
    desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    desk.it.came_back("default", [second.message.id.encode()])
    desk.later.pop()[1]()
    assert desk.record()[:2] == ("back", first.message.id)


def test_what_is_refused_fills_up_and_what_is_forgotten_does_not(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(MOST_REFUSED):
        desk.answer(desk.order("quiet"), DONE)
    assert desk.it.barred == set(), "it is on its way"
    desk.flush()
    desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    assert desk.it.barred == {"default"}
    desk.it.forget_all()
    assert desk.it.barred == set()
    assert "the broker is back" in caplog.text


def test_a_queue_whose_outcomes_are_refused_does_not_hold_up_those_of_the_others(desk: Desk) -> None:
    desk.answer(desk.order(queue="mail"), DONE, b"1")
    desk.flush()
    desk.wire.reply(hiredis.ReplyError("WRONGTYPE"))
    for _ in range(3):
        desk.answer(desk.order(), DONE, b"1")
        assert len(desk.sent()[1]) == 1
    assert desk.it.unsettled() == 1
    assert desk.it.barred == {"mail"}


def test_a_refused_batch_is_kept_and_sent_again_after_a_pause(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.answer(desk.order("quiet"), DONE)
    desk.answer(desk.order("quiet", queue="mail"), DONE)
    desk.flush()
    for _ in range(2):
        desk.wire.reply(hiredis.ReplyError("OOM command not allowed"))
    desk.flush()
    assert desk.wire.due == []
    assert desk.it.unsettled() == 2
    assert caplog.text.count("OOM command not allowed") == 1
    ((delay_s, go_on),) = desk.later
    assert 0 < delay_s <= 5
    go_on()
    desk.flush()
    assert len(desk.wire.due) == 2


def test_a_worker_without_its_lease_is_told_so_and_may_forget_everything(desk: Desk) -> None:
    desk.answer(desk.order("quiet"), DONE)
    desk.flush()
    desk.answer(desk.order(), DONE, b"1")
    desk.wire.reply(hiredis.ReplyError("FENCED the lease of w1 is gone"))
    assert desk.fenced == ["FENCED the lease of w1 is gone"]
    assert desk.it.forget_all() == 2
    desk.flush()
    assert desk.wire.due == []
    assert desk.it.is_empty


def test_a_late_reply_to_a_forgotten_batch_brings_nothing_back(desk: Desk) -> None:
    desk.answer(desk.order("quiet"), DONE)
    desk.flush()
    desk.it.forget_all()
    fresh = desk.order("quiet")
    desk.answer(fresh, DONE)
    desk.flush()
    desk.wire.reply(Lost("gone"))
    desk.wire.reply([NOW_MS, 1])
    desk.flush()
    assert desk.wire.due == []
    assert desk.it.is_empty


def test_what_was_forgotten_while_the_disk_was_waited_for_is_no_trouble_of_its_successor(desk: Desk) -> None:
    desk.it.durability, desk.it.wait_s = parse("fsync"), 1.0
    for queue in "default", "mail":
        desk.answer(desk.order("quiet", queue=queue), DONE)
    desk.flush()
    desk.wire.reply(hiredis.ReplyError("FENCED w1"))
    desk.wire.reply([NOW_MS, 1])
    desk.it.forget_all()
    desk.wire.waits.pop()([0, 0])
    assert desk.it.is_empty
    assert not desk.it.refuses


@pytest.mark.parametrize(("durability", "reply"), [("fsync", 1), ("fsync", [b"1"]), ("replicas:1", b"OK")])
def test_a_damaged_answer_of_the_disk_is_a_broken_connection(desk: Desk, durability: str, reply: Any) -> None:
    desk.it.durability, desk.it.wait_s = parse(durability), 1.0
    desk.answer(desk.order("quiet"), DONE)
    desk.flush()
    desk.wire.reply([NOW_MS, 1])
    desk.wire.waits.pop()(reply)
    assert desk.wire.restarts == 1
    assert desk.it.unsettled() == 1
    assert not desk.it.refuses


# -- follow-ups -------------------------------------------------------------------------------------------------------


def follow_ups(*queues: str, result: bytes = b"null") -> bytes:
    return orjson.dumps([[queue, f"{n:032x}", 0, "", '{"task":"job"}\n[[],{}]'] for n, queue in enumerate(queues)]) + (
        b"\n" + result
    )


def test_follow_ups_of_the_same_queue_go_with_the_acknowledgement(desk: Desk) -> None:
    order = desk.order()
    desk.answer(order, DONE_WITH_FOLLOW_UPS, follow_ups("default", "default", result=b'{"a":"\\n"}'))
    _, records = desk.sent()
    assert [record[:3] for record in records[:2]] == [
        ("follow", order.message.id, f"{0:032x}"),
        ("follow", order.message.id, f"{1:032x}"),
    ]
    assert records[2][:2] == ("done", order.message.id)
    assert orjson.loads(records[2][3])["value"] == {"a": "\n"}
    assert records[0][3:] == (0, "", b'{"task":"job"}\n[[],{}]')


def test_follow_ups_of_a_task_that_keeps_no_result_too(desk: Desk) -> None:
    order = desk.order("quiet")
    desk.answer(order, DONE_WITH_FOLLOW_UPS, follow_ups("default", result=b""))
    plain, records = desk.sent()
    assert not plain
    assert [record[0] for record in records] == ["follow", "done"]
    assert records[1] == ("done", order.message.id, 0, b"")


@pytest.mark.parametrize("before", [MOST_RECORDS - 2, MOST_RECORDS - 1, MOST_RECORDS, 0])
def test_no_batch_parts_follow_ups_from_the_acknowledgement(desk: Desk, before: int) -> None:
    """One script does it all, or none of it: else a crash in between would spawn for an attempt that may yet fail."""
    for _ in range(before):
        desk.answer(desk.order(), DONE, b"1")
    parent = desk.order()
    desk.answer(parent, DONE_WITH_FOLLOW_UPS, follow_ups(*["default"] * (3 if before else 1000)))
    while not desk.it.is_empty:
        _, records = desk.sent()
        mine = [record[0] for record in records if record[1] == parent.message.id]
        assert not mine or mine[-1] == "done"
        assert not mine or mine[0] == "follow"


def test_follow_ups_to_other_queues_go_first_and_the_acknowledgement_waits(desk: Desk) -> None:
    order, other = desk.order(), desk.order()
    desk.answer(order, DONE_WITH_FOLLOW_UPS, follow_ups("mail", "default", "print", "mail"))
    desk.answer(other, DONE, b"1")
    mail, printed = (call for call, _ in desk.wire.due)
    assert (mail.verb, mail.keys[0]) == ("enqueue", "a:b:{mail}:m")
    assert (printed.verb, printed.keys[0]) == ("enqueue", "a:b:{print}:m")
    assert mail.arguments[3::4] == (f"{0:032x}", f"{3:032x}")
    assert not desk.it.is_empty
    assert desk.it.unsettled() == 2
    desk.wire.reply([NOW_MS, 2])
    desk.flush()
    assert [record[1] for record in taken_apart(desk.wire.due[1][0])[1]] == [other.message.id]
    desk.wire.reply([NOW_MS, 1])
    desk.wire.reply([NOW_MS, 1])
    _, records = desk.sent()
    assert [(record[0], record[1]) for record in records] == [("follow", order.message.id), ("done", order.message.id)]
    assert desk.it.is_empty


@pytest.mark.parametrize("durability", [None, "replicas:1"])
def test_follow_ups_go_first_once_more_to_who_may_be_another_broker(desk: Desk, durability: str | None) -> None:
    """After a failover it may lack them, while the task that made them is settled there as done."""
    desk.it.durability, desk.it.wait_s = parse(durability), 1.0
    order, settled = desk.order(), desk.order()
    for it in settled, order:
        desk.answer(it, DONE_WITH_FOLLOW_UPS, follow_ups("mail"))
        desk.wire.reply([NOW_MS, 1])
        desk.flush()
        replies = [[NOW_MS, 1], 1] if it is settled else [Lost("gone"), Lost("gone")]
        desk.wire.reply(replies[0])
        for wait in desk.wire.waits:
            wait(replies[1])
        desk.wire.waits.clear()
    desk.wire.announced.clear()
    desk.it.disconnected()
    assert desk.it.outboxes["default"].ids() == {order.message.id}, "it is still known here"
    assert desk.it.backs_wait is (durability is None), "what waits for another queue keeps nobody from claiming"
    desk.it.resend()
    desk.flush()
    assert [call.verb for call, _ in desk.wire.due] == ["enqueue" if durability else "settle"]
    if durability:
        assert [queue for queue, _ in desk.wire.announced] == ["mail"]
        desk.wire.reply([NOW_MS, 1])
        assert [record[:2] for record in desk.sent()[1]] == [("done", order.message.id)]


def test_outcomes_do_not_wait_for_follow_ups_that_are_refused(desk: Desk) -> None:
    parent, other = desk.order(), desk.order("quiet")
    desk.answer(parent, DONE_WITH_FOLLOW_UPS, follow_ups("mail"))
    desk.wire.reply(hiredis.ReplyError("OOM"))
    desk.answer(other, DONE)
    assert desk.sent()[0] == [other.message.id]
    desk.later.pop()[1]()
    assert [call.verb for call, _ in desk.wire.due] == ["enqueue"]
    desk.wire.reply([NOW_MS, 1])
    assert desk.record()[:2] == ("done", parent.message.id)
    assert not desk.it.refuses


def test_follow_ups_whose_reply_was_lost_are_sent_again(desk: Desk) -> None:
    order = desk.order()
    desk.answer(order, DONE_WITH_FOLLOW_UPS, follow_ups("mail", "print"))
    first = desk.wire.due[0][0]
    desk.wire.reply(Lost("gone"))
    desk.wire.reply([NOW_MS, 1])
    desk.flush()
    assert desk.wire.due == []
    assert not desk.it.is_empty
    desk.it.resend()
    assert [call for call, _ in desk.wire.due] == [first]
    desk.wire.reply(Lost("gone"))
    desk.it.resend()
    desk.wire.reply([NOW_MS, 0])
    assert [record[0] for record in desk.sent()[1]] == ["done"]
    desk.it.resend()
    assert desk.wire.due == []


def test_refused_follow_ups_are_sent_again_after_the_pause(desk: Desk) -> None:
    desk.answer(desk.order(), DONE_WITH_FOLLOW_UPS, follow_ups("mail", "print"))
    desk.wire.reply(hiredis.ReplyError("OOM"))
    desk.wire.reply(hiredis.ReplyError("OOM"))
    ((_, go_on),) = desk.later
    go_on()
    assert len(desk.wire.due) == 2


@pytest.mark.parametrize("arrives", [Lost("gone"), [NOW_MS, 1]], ids=["lost", "accepted"])
def test_a_worker_that_lost_its_lease_sends_no_more_of_its_follow_ups(desk: Desk, arrives: Any) -> None:
    """Its attempt does not count: the worker that took over will send them, if its own attempt succeeds."""
    desk.answer(desk.order(), DONE_WITH_FOLLOW_UPS, follow_ups("mail", "print"))
    desk.wire.reply(Lost("gone"))
    desk.it.forget_all()
    desk.wire.reply(arrives)
    desk.it.resend()
    desk.flush()
    assert desk.wire.due == []
    assert desk.it.is_empty


def test_a_queue_of_follow_ups_is_announced_so_that_it_can_be_found(desk: Desk) -> None:
    for _ in range(2):
        desk.answer(desk.order(), DONE_WITH_FOLLOW_UPS, follow_ups("mail", "print"))
    assert [queue for queue, _ in desk.wire.announced] == ["mail", "print"]


@pytest.mark.parametrize("reply", [Lost("gone"), hiredis.ReplyError("OOM")], ids=repr)
def test_an_announcement_that_did_not_get_through_is_made_again(desk: Desk, reply: Any) -> None:
    desk.answer(desk.order(), DONE_WITH_FOLLOW_UPS, follow_ups("mail"))
    desk.wire.announced.pop()[1](reply)
    desk.answer(desk.order(), DONE_WITH_FOLLOW_UPS, follow_ups("mail"))
    assert [queue for queue, _ in desk.wire.announced] == ["mail"]
