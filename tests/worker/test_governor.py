"""Who goes when memory is short, with made-up children and sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefork.worker import governor
from prefork.worker.governor import Governor
from prefork.worker.process import State
from tests.worker.test_claims import Loop


class Child(SimpleNamespace):
    __hash__ = object.__hash__


class Pool:
    """Children of these sizes; what they are at, "" for nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *children: tuple[int, str]) -> None:
        self.children = [
            Child(number=n, pid=-1 - n, head=at, killed_for="", state=State.READY, stack="")
            for n, (_, at) in enumerate(children)
        ]
        sizes = {-1 - n: size for n, (size, _) in enumerate(children)}
        monkeypatch.setattr(governor, "own_bytes", lambda pid: sizes.get(pid, 100))
        monkeypatch.setattr(governor, "resident_bytes", sizes.__getitem__)
        self.asked: list[Any] = []
        self.did: list[tuple[str, int]] = []

    def ask_stack(self, child: Any, then: Any) -> None:
        self.asked.append(then)

    def read(self, child: Any) -> None: ...

    def kill(self, child: Any, why: str) -> None:
        child.killed_for = why
        self.did.append(("kill", child.number))

    def take_back(self, child: Any) -> list[Any]:
        self.did.append(("take back", child.number))
        return ["waiting"]

    def finish(self, child: Any) -> None:
        child.state = State.FINISHING
        self.did.append(("finish", child.number))


def looks(pool: Pool, *, per_child: int | None = None, total: int | None = None) -> list[Any]:
    """-> what went back"""
    back: list[Any] = []
    Governor(Loop(), pool, per_child, total, back.extend)._look()  # type: ignore[arg-type]
    return back


def test_the_largest_of_those_that_run_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, (300, "a"), (500, "b"), (200, ""))
    looks(pool, total=1000)
    pool.asked.pop()("its stack")
    assert pool.did == [("kill", 1)]
    assert pool.children[1].stack == "its stack"


def test_nobody_is_killed_for_what_an_idle_child_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go on for ever, since no such kill frees anything."""
    pool = Pool(monkeypatch, (100, "a"), (900, ""))
    looks(pool, total=1000)
    assert not pool.asked
    assert pool.did == [("take back", 1), ("finish", 1)]


def test_what_was_replaced_is_waited_for_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, (100, "a"), (900, ""))
    it = Governor(Loop(), pool, None, 1000, lambda orders: None)  # type: ignore[arg-type]
    it._look()
    it._look()
    assert not pool.asked
    it._leaving = dict.fromkeys(it._leaving, 0.0)  # that time is over, and it has not ended
    it._look()
    assert len(pool.asked) == 1


def test_a_child_whose_tasks_are_too_short_to_be_found_at_one_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, (900, "a"))
    back = looks(pool, per_child=400)
    pool.children[0].head = "b"
    pool.asked.pop()("its stack")
    assert pool.did == [("take back", 0), ("finish", 0)]
    assert back == ["waiting"]


def test_one_that_has_ended_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, (900, "a"))
    looks(pool, per_child=400)
    pool.children.clear()
    pool.asked.pop()("its stack")
    assert pool.did == []


def test_nobody_goes_while_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(monkeypatch, (300, "a"), (500, ""))
    looks(pool, per_child=200, total=1000)
    assert pool.did == []
    assert not pool.asked
