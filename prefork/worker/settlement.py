"""What becomes of a message when an attempt of it has ended, or could not begin: decided here, in one place.

Done, retry, dead letter, expired, back to its queue: each becomes a record in its queue's outbox (outbox.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from prefork.broker import verbs
from prefork.broker.channel import Channel
from prefork.message import Message, State
from prefork.options import DAY_S, TEN_YEARS_S
from prefork.retry import default_retry_delay, unknown_task_delay_s
from prefork.task import Task
from prefork.worker import frames
from prefork.worker.evidence import of_failure
from prefork.worker.frames import Answer, Order
from prefork.worker.outbox import Outboxes

log = logging.getLogger("prefork")
Evidence = Mapping[str, Any]  # see evidence.py
NONE: Evidence = {}
SUCCESS = (
    b'{"status":"SUCCESSFUL","task":%b,"attempts":%d,"enqueued_ms":%d,"started_ms":%d,"finished_ms":%d,"ran_s":%.6f,'
    b'%b"value":%b}'
)


class Settlement(Outboxes):
    """What became of messages, decided; kept in the outboxes until the broker has it."""

    def __init__(
        self,
        tasks: Mapping[str, Task[..., Any]],
        now_ms: Callable[[], int],
        *,
        prefix: str,
        dead_max: int,
        dead_ttl_s: float,
        max_crashes: int,
        fenced: Callable[[str], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        super().__init__(prefix, dead_max, round(dead_ttl_s * 1000), fenced, later)
        self._tasks, self._now_ms, self._max_crashes = tasks, now_ms, max_crashes

    def answered(self, order: Order, answer: Answer, channel: Channel, pid: int = 0) -> None:
        """The child with this pid has ended an attempt: done or failed."""
        message = order.message
        ttl_ms = order.terms.result_ttl_ms
        if answer.kind == frames.DONE and not ttl_ms:
            self.outboxes[message.queue].plain.append(message.id)
            return
        if answer.kind == frames.FAILED:
            verdict = _verdict(answer.payload)
            verdict["error"] |= of_failure(pid, answer.cpu_s, answer.peak_kib)
            if order.cancelled:
                self.cancelled(order, f"cancelled after {answer.ran_s:.1f} s", answer.ran_s, error=verdict["error"])
            else:
                self._failed(order, verdict, answer.ran_s)
            return
        outbox = self.outboxes[message.queue]
        result = answer.payload
        here: list[verbs.Entry] = []
        elsewhere: list[verbs.Entry] = []
        if answer.kind == frames.DONE_WITH_FOLLOW_UPS:
            follow_ups, result = answer.payload.split(b"\n", 1)
            entries = [
                verbs.Entry(queue, id, priority, at, payload.encode())
                for queue, id, priority, at, payload in orjson.loads(follow_ups)
            ]
            elsewhere = [entry for entry in entries if entry.queue != message.queue]
            here = [entry for entry in entries if entry.queue == message.queue]
        follow = [word for entry in here for word in ("follow", message.id, *entry[1:])]
        record = self._success(message, answer.ran_s, result) if ttl_ms else b""
        # One record, so that no batch can part the follow-ups from the acknowledgement.
        done = message.id, (*follow, "done", message.id, ttl_ms, record)
        if elsewhere:
            self._after_follow_ups(elsewhere, outbox, done, channel)
        else:
            outbox.records.append(done)

    def _failed(self, order: Order, verdict: dict[str, Any], ran_s: float) -> None:
        message, error = order.message, verdict["error"]
        state = self._begun(message, ran_s)
        counted = verdict.get("counted", True)
        asked = f"{error['class']}: {error['message'].splitlines()[0] if error['message'] else ''}"
        state.add_error(error | {"attempt": state.attempts, "ran_s": round(ran_s, 6)})
        if verdict.get("dead"):
            return self._dead(message, state, f"failed ({asked})", error["traceback"])
        if counted and state.retried >= order.terms.max_retries:
            return self._dead(message, state, f"failed ({asked}), its {order.terms.max_retries} retries are spent",
                              error["traceback"])  # fmt: skip
        state.retried += counted
        delay_s = float(verdict["delay_s"])
        self._retry(message, state, delay_s, failed=not verdict.get("asked"))
        level = logging.INFO if verdict.get("asked") else logging.WARNING
        trace = "" if verdict.get("asked") or not error["traceback"] else f"\n{error['traceback'].rstrip()}"
        log.log(level, "%s %s attempt %d failed (%s); retry %d of %d in %.1f s%s", message.header.task, message.id,
                state.attempts, asked, state.retried, order.terms.max_retries, delay_s, trace)  # fmt: skip
        return None

    def timed_out(self, order: Order, ran_s: float, evidence: Evidence = NONE) -> None:
        """An attempt was killed at its deadline: a failure of the task, retried as any other."""
        said = f"killed after {ran_s:.1f} s, its timeout is {order.terms.timeout_s:g} s"
        error = _error("TaskTimeout", said, evidence)
        task = self._tasks[order.message.header.task]
        retried = order.message.state.retried if order.message.state else 0
        policy = task.options.retry_delay
        # A policy that is a function is the user's code, which does not run in the master.
        delay_s = default_retry_delay(retried) if policy is None or callable(policy) else float(policy)
        self._failed(order, {"error": error, "delay_s": delay_s}, ran_s)

    def cancelled(
        self,
        order: Order,
        said: str,
        ran_s: float = 0.0,
        evidence: Evidence = NONE,
        error: dict[str, Any] | None = None,
    ) -> None:
        """An operator has cancelled it: over, with that as its status and reason; `error`: what its attempt raised."""
        message = order.message
        state = self._begun(message, ran_s) if order.cancelled else message.state or State()
        if error and not error["class"].endswith(("Cancelled", "CancelledError")):
            state.add_error(dict(error))
        record = self._failure(message, state, _error("Cancelled", said, evidence))
        drop = ("drop", message.id, self._ttl_ms(message), record, "cancelled")
        self.outboxes[message.queue].records.append((message.id, drop))
        log.warning("%s %s %s", message.header.task, message.id, said)

    def crashed(self, order: Order, how: str, ran_s: float, peak_kib: int, evidence: Evidence = NONE) -> str:
        """The child died while it ran this: back to its queue, a dead letter after `max_crashes`. -> which, in words"""
        message = order.message
        state = self._begun(message, ran_s)
        state.crashes += 1
        said = f"its child {how} after {ran_s:.1f} s, peak memory {peak_kib >> 10} MB"
        state.add_error(_error("ChildDied", said, evidence) | {"attempt": state.attempts, "ran_s": round(ran_s, 6)})
        if state.crashes >= self._max_crashes:
            self._dead(message, state, f"took its child down {state.crashes} times, last: {said}", "")
            return "a dead letter now"
        self._back(message, state.encode())
        return f"back to queue {message.queue}"

    def unknown(self, message: Message) -> None:
        """No such task here: perhaps the new release has not come to this worker yet. Kept, tried again, then dead."""
        state = message.state or State()
        delay_s = unknown_task_delay_s(state.unknown)
        names = ", ".join(sorted(self._tasks)[:20])
        said = f"no task {message.header.task!r} is registered here; registered are: {names}"
        if delay_s is None:
            state.add_error(_error("UnknownTask", said))
            self._dead(message, state, said, "")
        else:
            state.unknown += 1
            self._retry(message, state, delay_s, failed=False)
            log.error("%s: %s; tried again in %g s", message.id, said, delay_s)

    def bad(self, id: bytes, queue: str, said: str, kind: str = "BadMessage") -> None:
        """It can't be decoded, or is not signed as it should be: a dead letter, as it is."""
        state = State()
        state.add_error(_error(kind, said))
        outbox = self.outboxes[queue]
        outbox.records.append((id, ("dead", id, state.encode(), 0, b"")))
        log.error("%s; kept as a dead letter", said)

    def expired(self, message: Message) -> None:
        """It had not started by its `expires`: dropped, with status and reason."""
        record = self._failure(message, message.state or State(), _error("Expired", "not started by its `expires`"))
        drop = ("drop", message.id, self._ttl_ms(message), record, "expired")
        self.outboxes[message.queue].records.append((message.id, drop))
        log.info("%s %s expired before it started", message.header.task, message.id)

    def put_back(self, orders: list[Order], *, begun: bool = False) -> None:
        """To the front of their queues, not charged, in the order in which they were claimed. Empties the list.

        `begun`: they have been, so that they do not expire any more.
        """
        # Each goes to the front, so that the first to be claimed again has to go there last.
        for order in sorted(orders, key=lambda order: order.serial, reverse=True):
            self._back(order.message, self._started(order.message) if begun and order.terms.expires else b"")
        orders.clear()

    def _started(self, message: Message) -> bytes:
        state = message.state or State()
        state.started_ms, state.due_ms = state.started_ms or self._now_ms(), 0
        return state.encode()

    def _back(self, message: Message, state: bytes) -> None:
        outbox = self.outboxes[message.queue]
        outbox.records.append((message.id, ("back", message.id, state)))
        outbox.backs_wait = True

    def progress(self, message: Message, said: list[Any]) -> None:
        """What a running task says of itself."""
        message.state = message.state or State()
        message.state.progress = said
        state = ("state", message.id, message.state.encode())
        self.outboxes[message.queue].progress[message.id] = state

    def _begun(self, message: Message, ran_s: float) -> State:
        state = message.state or State()
        state.attempts += 1
        state.started_ms = state.started_ms or max(self._now_ms() - round(ran_s * 1000), message.enqueued_ms)
        state.progress = None
        if not state.workers or state.workers[-1] != self.worker:
            state.workers = [*state.workers[-9:], self.worker]
        return state

    def _retry(self, message: Message, state: State, delay_s: float, *, failed: bool) -> None:
        delay_ms = round(delay_s * 1000)
        state.due_ms = self._now_ms() + delay_ms
        retry = ("retry", message.id, delay_ms, state.encode(), int(failed))
        self.outboxes[message.queue].records.append((message.id, retry))

    def _dead(self, message: Message, state: State, why: str, trace: str) -> None:
        record = self._failure(message, state)
        dead = ("dead", message.id, state.encode(), self._ttl_ms(message), record)
        self.outboxes[message.queue].records.append((message.id, dead))
        log.error("%s %s %s; a dead letter now%s", message.header.task, message.id, why,
                  f"\n{trace.rstrip()}" if trace else "")  # fmt: skip

    def _ttl_ms(self, message: Message) -> int:
        task = self._tasks.get(message.header.task)
        return round((task.options.result_ttl_s if task else DAY_S) * 1000)

    def _success(self, message: Message, ran_s: float, result: bytes) -> bytes:
        attempts, errors = 1, b""
        now_ms = max(self._now_ms(), message.enqueued_ms)  # the server's clock, as it was read here a while ago
        started_ms = max(now_ms - round(ran_s * 1000), message.enqueued_ms)
        if message.state:
            state = self._begun(message, ran_s)
            attempts, started_ms = state.attempts, min(state.started_ms, now_ms)
            errors = b'"errors":%b,' % orjson.dumps(state.errors)
        return SUCCESS % (
            orjson.dumps(message.header.task), attempts, message.enqueued_ms, started_ms, now_ms, ran_s, errors, result
        )  # fmt: skip

    def _failure(self, message: Message, state: State, error: dict[str, Any] | None = None) -> bytes:
        now_ms = max(self._now_ms(), message.enqueued_ms)
        return orjson.dumps({
            "status": "FAILED", "task": message.header.task, "attempts": state.attempts,
            "enqueued_ms": message.enqueued_ms, "started_ms": min(state.started_ms, now_ms),
            "finished_ms": now_ms,
            "errors": [*state.errors, error] if error else state.errors,
        })  # fmt: skip


def _verdict(payload: bytes) -> dict[str, Any]:
    """What a child says of a failure. What cannot be read (a task wrote into our pipe) is a failure all the same."""
    try:
        verdict: dict[str, Any] = orjson.loads(payload)
        if not all(isinstance(verdict["error"][name], str) for name in ("class", "message", "traceback")):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        verdict = {"error": _error("BadMessage", "its child's answer cannot be read")}
    delay_s = verdict.get("delay_s")
    if not isinstance(delay_s, int | float) or not 0 <= delay_s <= TEN_YEARS_S:
        verdict["delay_s"] = default_retry_delay(0)
    return verdict


def _error(kind: str, text: str, evidence: Evidence = NONE) -> dict[str, Any]:
    return {"class": f"prefork.{kind}", "message": text, "traceback": "", **evidence}
