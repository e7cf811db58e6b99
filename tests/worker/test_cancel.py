"""A cancellation that is heard of before the task has come."""

from __future__ import annotations

from typing import Any

from prefork.message import Header, Message
from prefork.worker.cancel import Cancels
from prefork.worker.dispatch import Dispatcher
from prefork.worker.frames import Order, Terms
from prefork.worker.slots import Slots


class Nobody:
    """A pool without children."""

    children: tuple[()] = ()


class Settlement:
    def __init__(self) -> None:
        self.ended: list[str] = []

    def cancelled(self, order: Order, why: str) -> None:
        self.ended.append(order.message.id)


def order(id: str, serial: int) -> Order:
    terms = Terms(Header("t"), 0, 0, 25, 0.0, 0.0, expires=False, result_ttl_ms=0)
    return Order(Message(id, "q", terms.header, b"[[],{}]", 0, 0, None), terms, 1, 0, 1.0, serial)


def test_what_was_on_its_way_is_cancelled_when_it_comes_and_only_then() -> None:
    settlement, dispatcher = Settlement(), Dispatcher[Order](Slots())
    loop: Any = None
    it = Cancels(loop, Nobody(), dispatcher, settlement)  # type: ignore[arg-type]

    def come(*orders: Order, last: bool) -> None:
        dispatcher.add(list(orders), 0.0)
        it.come(list(orders), last=last)

    it.cancel("gone")  # nothing is on its way
    it.cancel("a", 200)
    it.cancel("b", 200)
    come(order("x", 100), order("a", 101), order("gone", 102), last=False)
    assert settlement.ended == ["a"]
    come(order("b", 200), last=False)
    assert settlement.ended == ["a"], "it was claimed later: revived, say"
    come(order("b", 199), last=True)
    assert settlement.ended == ["a", "b", "b"], "both of that id, as far as they are here"
    come(order("a", 103), last=True)
    assert [it.message.id for it in dispatcher.ready] == ["x", "gone", "a"]
