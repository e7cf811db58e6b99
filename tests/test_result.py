from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefork import (
    BrokerError,
    Prefork,
    ResultUnavailable,
    TaskError,
    TaskFailed,
    TaskResult,
    TaskResults,
    TaskStatus,
    WaitTimeout,
)
from prefork.broker import verbs
from prefork.broker.keys import Keys
from prefork.message import State
from tests.conftest import PATIENCE_S, SLACK_S, Project, Server

QUEUE = Keys("prefork", "default")
NOW_MS = 1764000000000


def job(n: int = 0) -> int:
    return n


@pytest.fixture
def app(server: Server) -> Iterator[Prefork]:
    app = Prefork("shop", server.url)
    app.task(name="job")(job)
    app.task(name="quiet", result_ttl=0)(job)
    yield app
    app.client.close()


class Hand:
    """Does by hand, with the scripts, what a worker does."""

    def __init__(self, app: Prefork) -> None:
        self.call = app.client.call
        self.call(verbs.beat(QUEUE, "w1", 60_000, first=True))

    def claim(self, n: int = 1) -> list[str]:
        return [id.decode() for id in self.call(verbs.claim(QUEUE, "w1", n))[3]]

    def settle(self, *records: verbs.Argument, dead_ttl_ms: int = 10**9) -> None:
        self.call(verbs.settle(QUEUE, "w1", 100, dead_ttl_ms, [], records))

    def done(self, id: str, value: Any, ttl_ms: int = 60_000, **more: Any) -> None:
        record = {"status": "SUCCESSFUL", "task": "job", "attempts": 1, "enqueued_ms": NOW_MS, "started_ms": NOW_MS + 5}
        record |= {"finished_ms": NOW_MS + 9, "value": value, **more}
        self.settle("done", id, ttl_ms, json.dumps(record).encode())

    def dead(self, id: str, state: State, ttl_ms: int = 60_000) -> None:
        record = {"status": "FAILED", "task": "job", "attempts": state.attempts, "finished_ms": NOW_MS + 9}
        self.settle("dead", id, state.encode(), ttl_ms, json.dumps({**record, "errors": state.errors}).encode())


@pytest.fixture
def hand(app: Prefork) -> Hand:
    return Hand(app)


def error(n: int = 1) -> dict[str, Any]:
    return {"class": "shop.errors.NoRoute", "message": f"no route {n}", "traceback": f"Traceback {n}\n"}


def not_finished(it: TaskResult[Any]) -> None:
    assert not it.is_finished
    assert it.finished_at is None
    with pytest.raises(ValueError, match=r"^Task has not finished yet$"):
        _ = it.return_value


# -- each state -------------------------------------------------------------------------------------------------------


def test_a_new_task_is_ready(app: Prefork) -> None:
    it = app.tasks["job"].enqueue(1)
    for _ in range(2):
        assert it.status is TaskStatus.READY
        assert it.status == "READY"
        assert (it.attempts, it.errors, it.progress, it.started_at) == (0, [], None, None)
        assert it.enqueued_at is not None
        assert it.enqueued_at.tzinfo is UTC
        assert abs(it.enqueued_at - datetime.now(UTC)) < timedelta(seconds=30)
        not_finished(it)
        assert repr(it) == f"<job {it.id} READY>"
        it.refresh()


def test_a_delayed_task_is_ready_too(app: Prefork) -> None:
    it = app.tasks["job"].using(run_after=60).enqueue(1)
    it.refresh()
    assert it.status is TaskStatus.READY


def test_a_claimed_task_is_running(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    it.refresh()
    assert (it.status, it.attempts) == (TaskStatus.RUNNING, 1)
    assert it.started_at is not None
    assert it.enqueued_at is not None
    assert it.started_at >= it.enqueued_at
    not_finished(it)


def test_a_running_task_tells_its_progress(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.settle("state", it.id, State(progress=[3, 10, "pages"]).encode())
    it.refresh()
    assert (it.status, it.progress, it.attempts) == (TaskStatus.RUNNING, (3, 10, "pages"), 1)


def test_a_task_that_waits_for_its_retry_is_ready_with_its_errors(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    state = State(attempts=1, retried=1, started_ms=NOW_MS, errors=[error()])
    hand.settle("retry", it.id, 60_000, state.encode(), 1)
    it.refresh()
    assert (it.status, it.attempts) == (TaskStatus.READY, 1)
    assert it.errors == [TaskError("shop.errors.NoRoute", "Traceback 1\n", "no route 1")]
    assert it.errors[0].exception_class == "NoRoute"
    assert it.started_at == datetime.fromtimestamp(NOW_MS / 1000, UTC)
    not_finished(it)


def test_a_second_attempt_is_counted_while_it_runs(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.settle("retry", it.id, 0, State(attempts=1, retried=1, started_ms=NOW_MS, errors=[error()]).encode(), 1)
    assert hand.claim() == [it.id]
    it.refresh()
    assert (it.status, it.attempts, len(it.errors)) == (TaskStatus.RUNNING, 2, 1)
    assert it.started_at == datetime.fromtimestamp(NOW_MS / 1000, UTC)


@pytest.mark.parametrize("value", [None, 0, "text", [1, {"a": None}], 2**63, -1.5, "ü\x00"], ids=repr)
def test_a_task_that_succeeded_has_its_value(app: Prefork, hand: Hand, value: Any) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.done(it.id, value)
    it.refresh()
    assert (it.status, it.is_finished, it.attempts) == (TaskStatus.SUCCESSFUL, True, 1)
    assert it.return_value == value
    assert it.wait(timeout=0) == value
    assert it.started_at == datetime.fromtimestamp(NOW_MS / 1000 + 0.005, UTC)
    assert it.finished_at == datetime.fromtimestamp(NOW_MS / 1000 + 0.009, UTC)
    assert it.errors == []


def test_a_task_that_failed_has_its_errors(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.dead(it.id, State(attempts=2, errors=[error(1), error(2)]))
    it.refresh()
    assert (it.status, it.is_finished, it.attempts) == (TaskStatus.FAILED, True, 2)
    assert [e.message for e in it.errors] == ["no route 1", "no route 2"]
    assert it.finished_at is not None
    with pytest.raises(ValueError, match=r"^Task failed$"):
        _ = it.return_value
    with pytest.raises(TaskFailed) as caught:
        it.wait(timeout=0)
    failed = caught.value
    assert (failed.task_name, failed.task_id, failed.message) == ("job", it.id, "no route 2")
    assert (failed.exception_class_path, failed.traceback) == ("shop.errors.NoRoute", "Traceback 2\n")
    assert str(failed) == f"job {it.id} failed: shop.errors.NoRoute: no route 2\nTraceback 2"


def test_a_dead_letter_outlives_its_result(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.dead(it.id, State(attempts=3, errors=[error(3)]), ttl_ms=1)
    time.sleep(0.01)
    it.refresh()
    assert (it.status, it.attempts, it.errors[0].message) == (TaskStatus.FAILED, 3, "no route 3")
    assert it.finished_at is not None
    assert abs(it.finished_at - datetime.now(UTC)) < timedelta(seconds=30)


def test_a_task_that_keeps_no_result_and_failed_is_known_as_a_dead_letter(app: Prefork, hand: Hand) -> None:
    it = app.tasks["quiet"].enqueue(1)
    hand.claim()
    hand.dead(it.id, State(attempts=1, errors=[error()]), ttl_ms=0)
    it.refresh()
    assert (it.status, it.errors[0].message) == (TaskStatus.FAILED, "no route 1")


def test_what_was_never_a_message_is_a_failed_task_too(app: Prefork, hand: Hand, server: Server) -> None:
    id = "f" * 32
    server.client.hset(QUEUE.messages, id, b"garbage")
    server.client.rpush(QUEUE.pending, id)
    server.client.sadd("prefork:queues", "default")
    assert app.result(id).status is TaskStatus.READY
    hand.claim()
    hand.settle("dead", id, State(errors=[error()]).encode(), 0, b"")
    it = app.result(id)
    assert (it.status, it.errors[0].message, it.task_name) == (TaskStatus.FAILED, "no route 1", "")


@pytest.mark.parametrize("damaged", [b"{", b"[]", b"null", b'{"errors":7}', b'{"attempts":"x"}', b"\xff"])
def test_a_damaged_state_keeps_nobody_from_asking(app: Prefork, server: Server, damaged: bytes) -> None:
    it = app.tasks["job"].enqueue(1)
    server.client.hset(QUEUE.state, it.id, damaged)
    it.refresh()
    assert (it.status, it.attempts, it.errors, it.progress) == (TaskStatus.READY, 0, [], None)


def test_nothing_is_known_of_a_task_whose_result_has_expired(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.done(it.id, 5, ttl_ms=1)
    time.sleep(0.01)
    for ask in (it.refresh, lambda: it.wait(timeout=1), lambda: asyncio.run(it.arefresh())):
        with pytest.raises(
            ResultUnavailable, match=rf"nothing is known of task {it.id} in queue default: its result has"
        ):
            ask()
    with pytest.raises(ResultUnavailable, match="nothing is known"):
        app.result(it.id)


def test_a_task_that_keeps_no_result_cannot_be_waited_for(app: Prefork, hand: Hand) -> None:
    it = app.tasks["quiet"].enqueue(1)
    begun = time.monotonic()
    with pytest.raises(ResultUnavailable, match=r"^quiet keeps no result to wait for: its result_ttl is 0$"):
        it.wait(timeout=PATIENCE_S)
    assert time.monotonic() - begun < PATIENCE_S / 2
    it.refresh()
    assert it.status is TaskStatus.READY
    hand.claim()
    hand.settle("done", it.id, 0, b"")
    with pytest.raises(
        ResultUnavailable, match=rf"^quiet {it.id} has finished and keeps no result: its result_ttl is 0"
    ):
        it.refresh()


# -- wait -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.05, -1])
def test_waiting_ends_at_its_timeout(app: Prefork, timeout: float) -> None:
    it = app.tasks["job"].enqueue(1)
    begun = time.monotonic()
    with pytest.raises(WaitTimeout, match=rf"^job {it.id} is READY after {timeout:g} s$") as caught:
        it.wait(timeout=timeout)
    assert time.monotonic() - begun < SLACK_S
    assert isinstance(caught.value, TimeoutError)


def test_waiting_ends_soon_after_the_task(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    ended: list[float] = []

    def finish() -> None:
        time.sleep(0.2)
        hand.done(it.id, 7)
        ended.append(time.monotonic())

    thread = threading.Thread(target=finish)
    thread.start()
    assert it.wait(timeout=60) == 7
    told = time.monotonic()
    thread.join()
    assert told - ended[0] < SLACK_S


@pytest.mark.parametrize("known", [True, False])
def test_waiting_for_a_broker_that_stands_still_ends_soon_after_the_timeout(own_server: Server, known: bool) -> None:
    """Not at the limit of what an enqueue may take."""
    app = Prefork("shop", own_server.url, limit_s=600)
    app.task(name="job")(job)
    it = app.tasks["job"].enqueue(1)
    assert own_server.process
    own_server.process.send_signal(signal.SIGSTOP)
    if not known:
        app.client.close()  # nor can a new connection be used
    begun = time.monotonic()
    with pytest.raises(BrokerError, match="does not answer in time"):
        it.wait(timeout=0.2)
    assert time.monotonic() - begun < SLACK_S
    own_server.process.send_signal(signal.SIGCONT)
    it.refresh()
    assert it.status is TaskStatus.READY


def test_a_wait_survives_the_loss_of_its_connection(app: Prefork, hand: Hand, server: Server) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()

    def disturb() -> None:
        for _ in range(5):
            time.sleep(0.05)
            server.client.client_kill_filter(_type="pubsub")
        hand.done(it.id, 7)

    thread = threading.Thread(target=disturb)
    thread.start()
    assert it.wait(timeout=60) == 7
    thread.join()


def test_many_may_wait_for_one_task(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    values: list[Any] = []
    threads = [threading.Thread(target=lambda: values.append(app.result(it.id).wait(timeout=60))) for _ in range(5)]
    for thread in threads:
        thread.start()
    hand.done(it.id, 7)
    for thread in threads:
        thread.join()
    assert values == [7] * 5


# -- cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"priority": 5}, {"run_after": 60}], ids=str)
def test_a_task_that_has_not_started_can_be_cancelled(app: Prefork, hand: Hand, options: dict[str, Any]) -> None:
    it = app.tasks["job"].using(**options).enqueue(1)
    assert it.cancel() is True
    assert hand.claim(10) == []
    it.refresh()
    assert (it.status, it.is_finished, it.attempts) == (TaskStatus.FAILED, True, 0)
    assert it.errors == [TaskError("prefork.Cancelled", "", "cancelled before it started")]
    assert it.finished_at is not None
    with pytest.raises(TaskFailed, match=rf"^job {it.id} failed: prefork\.Cancelled: cancelled before it started$"):
        it.wait()
    assert it.cancel() is False


def test_who_waits_hears_of_the_cancellation(app: Prefork) -> None:
    it = app.tasks["job"].enqueue(1)
    other = app.result(it.id)
    timer = threading.Timer(0.1, other.cancel)
    timer.start()
    with pytest.raises(TaskFailed, match=r"prefork\.Cancelled"):
        it.wait(timeout=60)
    timer.join()


def test_a_task_that_runs_or_has_finished_cannot_be_cancelled(app: Prefork, hand: Hand) -> None:
    one, two, three = (app.tasks["job"].enqueue(n) for n in range(3))
    hand.claim(3)
    assert one.cancel() is False
    hand.done(two.id, 1)
    hand.dead(three.id, State(attempts=1, errors=[error()]))
    assert two.cancel() is False
    assert three.cancel() is False
    for it, status in ((one, TaskStatus.RUNNING), (two, TaskStatus.SUCCESSFUL), (three, TaskStatus.FAILED)):
        it.refresh()
        assert it.status is status


def test_a_cancelled_task_that_keeps_no_result_leaves_none(app: Prefork, hand: Hand, server: Server) -> None:
    it = app.tasks["quiet"].enqueue(1)
    assert it.cancel() is True
    with pytest.raises(ResultUnavailable):
        it.refresh()
    assert not [key for key in server.client.scan_iter() if it.id.encode() in key]


def test_a_task_cancelled_between_two_attempts_keeps_what_happened_before(app: Prefork, hand: Hand) -> None:
    it = app.tasks["job"].enqueue(1)
    hand.claim()
    hand.settle("retry", it.id, 60_000, State(attempts=1, retried=1, started_ms=NOW_MS, errors=[error()]).encode(), 1)
    assert it.cancel() is True
    it.refresh()
    assert it.status is TaskStatus.FAILED
    assert it.attempts == 1
    assert [e.exception_class_path for e in it.errors] == ["shop.errors.NoRoute", "prefork.Cancelled"]


# -- with a real worker -----------------------------------------------------------------------------------------------

CODE = """
    @app.task(max_retries=1, retry_delay=0)
    def fails():
        raise KeyError("no such order")

    @app.task(takes_context=True)
    def parent(context):
        return context.enqueue(add.using(queue_name="elsewhere").s(1)).id

    @app.task(expires=0.05)
    def soon():
        return 1
"""


def test_a_result_of_a_real_worker_says_all_that_happened(project: Project) -> None:
    project.add(CODE)
    tasks = project.tasks
    late = tasks.soon.enqueue()
    time.sleep(0.1)
    worker = project.worker("queues = default, elsewhere\nconcurrency = 2")

    added = tasks.add.enqueue(1, b=2)
    assert added.wait(timeout=60) == 3
    assert (added.status, added.attempts, added.errors) == (TaskStatus.SUCCESSFUL, 1, [])
    assert added.enqueued_at <= added.started_at <= added.finished_at

    failed = tasks.fails.enqueue()
    with pytest.raises(TaskFailed) as caught:
        failed.wait(timeout=60)
    assert caught.value.exception_class_path == "builtins.KeyError"
    assert caught.value.message == "'no such order'"
    assert 'raise KeyError("no such order")' in caught.value.traceback
    assert (failed.attempts, len(failed.errors)) == (2, 2)

    with pytest.raises(TaskFailed, match=r"prefork\.Expired"):
        late.wait(timeout=60)
    assert late.attempts == 0
    assert worker.stop() == 0


def test_a_queue_to_which_only_follow_ups_were_ever_sent_is_known_like_any_other(project: Project) -> None:
    project.add(CODE)
    project.worker("queues = default, elsewhere")
    follow_up = project.tasks.parent.enqueue().wait(timeout=60)
    assert project.tasks.app.result(follow_up).wait(timeout=60) == 3
    assert "elsewhere" in project.tasks.app.client.queues()


# -- the results of many -----------------------------------------------------------------------------------------------


def many() -> TaskResults[int]:
    it: TaskResults[int] = TaskResults(Prefork("shop"))
    it.add(["a", "b", "c"], [("mail", "send", 1), ("mail", "send", 1), ("print", "send", 2)])
    it.add(["d"], [("print", "send", 2)])
    return it


def test_results_of_many_are_a_sequence() -> None:
    it = many()
    assert [result.id for result in it] == it.ids == ["a", "b", "c", "d"]
    assert (it[-1].id, it[1:3][1].id, len(it), list(it[9:])) == ("d", "c", 4, [])
    assert [(r.queue_name, r.task_name, r._enqueued_ms) for r in it] == [("mail", "send", 1)] * 2 + [
        ("print", "send", 2)
    ] * 2
    assert it[0] in it
    with pytest.raises(IndexError):
        it[4]


def test_what_was_learnt_of_one_of_many_is_kept() -> None:
    it = many()
    it[2].status = TaskStatus.FAILED
    assert it[2].status is TaskStatus.FAILED
    assert it[3].status is TaskStatus.READY


def test_results_that_nobody_looks_at_take_the_memory_of_their_ids() -> None:
    ids = [f"{n:032x}" for n in range(20_000)]
    tracemalloc.start()
    try:
        it: TaskResults[int] = TaskResults(Prefork("shop"))
        before = tracemalloc.get_traced_memory()[0]
        it.add(ids, (("mail", "send", 1) for _ in ids))
        assert tracemalloc.get_traced_memory()[0] - before < 12 * len(ids), "a pointer each"
    finally:
        tracemalloc.stop()
