"""What a claim has brought becomes orders; or outcomes at once: of an unknown task, expired, not to be read.

The usual message, without a history and with a header that was seen lately, is one in C where that is built.
"""

from __future__ import annotations

import logging
from typing import Any

from prefork.app import Prefork
from prefork.config import Settings
from prefork.errors import BadMessage
from prefork.message import LONGEST_CACHED, Header, Message, decode
from prefork.task import Task
from prefork.worker import fast, frames
from prefork.worker.clock import ServerClock
from prefork.worker.dispatch import RunTimes
from prefork.worker.frames import Order, Terms
from prefork.worker.settlement import Settlement

log = logging.getLogger("prefork")
TITLE_AFTER_S = 0.05
MOST_TERMS = 1000  # headers with options of their own may be as many as messages


class Intake:
    """Makes orders of messages, and keeps what they have in common: `Terms`, by header."""

    def __init__(
        self, app: Prefork, settings: Settings, tasks: list[Task[..., Any]], clock: ServerClock, settlement: Settlement,
        times: RunTimes,
    ) -> None:  # fmt: skip
        self._settings, self._clock, self._settlement, self._times = settings, clock, settlement, times
        self._tasks, self._signer = app.tasks, app.signer
        self._index = {task.name: number for number, task in enumerate(tasks)}
        self._queue_index = {name: number for number, name in enumerate(settings.queues.names)}
        self._terms: dict[str, dict[int, Terms]] = {name: {} for name in settings.queues.names}
        self.usual: dict[str, dict[bytes, tuple[Header, Terms]]] = {name: {} for name in settings.queues.names}

    def orders(
        self, queue: str, ids: list[bytes], messages: list[bytes], states: list[bytes | None], serial: int
    ) -> list[Order]:
        """The orders among what a claim has brought, in its order; `serial`: of the first message."""
        if fast.compiled and self._signer is None:
            orders, missing = fast.compiled.orders(
                ids, messages, states, queue, serial, self.usual[queue], self._times.known, TITLE_AFTER_S
            )
            return self._orders(queue, ids, messages, states, serial, orders) if missing else orders
        return self._orders(queue, ids, messages, states, serial, [None] * len(ids))

    def _orders(
        self, queue: str, ids: list[bytes], messages: list[bytes], states: list[bytes | None], serial: int,
        made: list[Order | None],
    ) -> list[Order]:  # fmt: skip
        orders = []
        signer, terms_of = self._signer, self._terms[queue]
        for at, (raw_id, raw, state, it) in enumerate(zip(ids, messages, states, made, strict=True), serial):
            if it is not None:
                orders.append(it)
                continue
            try:
                if signer is not None:
                    raw = signer.verified(raw_id, queue, raw)
                message = decode(raw_id, queue, raw, state)
                terms = terms_of.get(id(message.header)) or self._learn(message)
                if terms is None:
                    self._settlement.unknown(message)
                elif terms.expires and self._has_expired(message, self._clock.now_ms()):
                    self._settlement.expired(message)
                else:
                    orders.append(self._order(message, terms, at))
                    if fast.compiled and signer is None and not terms.expires:
                        self._remember(raw, terms, self.usual[queue])
            except BadMessage as error:
                self._settlement.bad(raw_id, queue, str(error), type(error).__name__)
            except Exception as error:  # no message, however strange, may end the worker again and again
                log.exception("message %r cannot be handled", raw_id)
                self._settlement.bad(raw_id, queue, f"message {raw_id!r} cannot be handled: {error!r}")
        return orders

    def _remember(self, raw: bytes, terms: Terms, usual: dict[bytes, tuple[Header, Terms]]) -> None:
        """The next message with this header is a usual one."""
        head = raw[: raw.index(b"\n")]
        if len(head) <= LONGEST_CACHED:
            if len(usual) >= MOST_TERMS:
                usual.clear()
            usual[head.split(b" ", 3)[3]] = terms.header, terms

    def _learn(self, message: Message) -> Terms | None:
        """The terms of a header that was not seen lately; None if no such task is registered here."""
        header, terms_of = message.header, self._terms[message.queue]
        task = self._tasks.get(header.task)
        if task is None:
            return None
        options = task.options
        if len(terms_of) >= MOST_TERMS:
            terms_of.clear()
        # By identity, since to compare headers takes longer than all the rest; the terms keep theirs alive.
        terms_of[id(header)] = terms = Terms(
            header, self._index[task.name], self._queue_index[message.queue],
            options.max_retries if header.max_retries is None else min(int(header.max_retries), 1000),
            timeout_s=header.timeout_s or options.timeout_s or self._settings.timeout_s or 0.0,
            soft_timeout_s=header.soft_timeout_s or options.soft_timeout_s or 0.0,
            expires=any(it is not None for it in (header.expires_ms, header.expires_s, options.expires_s)),
            result_ttl_ms=round(options.result_ttl_s * 1000),
        )  # fmt: skip
        return terms

    def _order(self, message: Message, terms: Terms, serial: int) -> Order:
        state, expected_s = message.state, self._times.expect_s(message.header.task)
        return Order(
            message, terms, state.attempts + 1 if state else 1, state.retried if state else 0, expected_s,
            serial, frames.WILL_LAST if expected_s > TITLE_AFTER_S else 0,
        )  # fmt: skip

    def _has_expired(self, message: Message, now_ms: int) -> bool:
        header, state = message.header, message.state
        if state and state.started_ms and not state.due_ms:
            return False  # it has begun in time, and was put back; a retry waits again
        if header.expires_ms is not None:
            return now_ms > header.expires_ms
        expires_s = self._tasks[header.task].options.expires_s if header.expires_s is None else header.expires_s
        return expires_s is not None and now_ms > message.enqueued_ms + expires_s * 1000
