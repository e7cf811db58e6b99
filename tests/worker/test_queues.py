from __future__ import annotations

import random
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefork.broker.keys import Keys
from prefork.worker.queues import Queue, shares


def queues_of(*weights: int) -> list[Queue]:
    return [Queue(Keys("p", f"q{n}"), weight) for n, weight in enumerate(weights)]


WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(WEIGHTS, st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.booleans())
def test_the_shares_are_as_many_as_were_asked_for(weights: list[int], asked: list[int], strict: bool) -> None:
    queues = queues_of(*weights)
    for n in asked:
        given_out = shares(queues, n, strict=strict)
        assert sum(some for _, some in given_out) == n
        assert all(some > 0 for _, some in given_out)
        assert len({id(queue) for queue, _ in given_out}) == len(given_out)


@given(WEIGHTS, st.integers(1, 1000), st.data())
def test_nothing_is_asked_of_a_drained_queue(weights: list[int], n: int, data: st.DataObject) -> None:
    queues = queues_of(*weights)
    for queue in queues:
        queue.drained = data.draw(st.booleans())
    for strict in (True, False):
        given_out = shares(queues, n, strict=strict)
        assert not any(queue.drained for queue, _ in given_out)
        assert sum(some for _, some in given_out) == (0 if all(queue.drained for queue in queues) else n)


def test_strict_order_asks_the_first_that_has_any() -> None:
    queues = queues_of(1, 1, 1)
    assert shares(queues, 7, strict=True) == [(queues[0], 7)]
    queues[0].drained = True
    assert shares(queues, 7, strict=True) == [(queues[1], 7)]
    queues[1].drained = queues[2].drained = True
    assert shares(queues, 7, strict=True) == []


@settings(max_examples=200)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_over_time_each_queue_gets_its_weight(weights: list[int], asked: list[int]) -> None:
    queues = queues_of(*weights)
    total, got = 0, dict.fromkeys(range(len(queues)), 0)
    for turn in range(60):
        n = asked[turn % len(asked)]
        total += n
        for queue, some in shares(queues, n, strict=False):
            got[queues.index(queue)] += some
        for at, weight in enumerate(weights):
            fair = total * weight / sum(weights)
            assert abs(got[at] - fair) <= len(weights), f"queue {at} of {weights} got {got[at]} of {total}, not {fair}"


@pytest.mark.parametrize("n", range(1, 9))
def test_three_to_one_is_three_to_one_whatever_is_asked_for_at_a_time(n: int) -> None:
    queues = queues_of(3, 1)
    got = [0, 0]
    for _ in range(400 // gcd(400, n)):
        for queue, some in shares(queues, n, strict=False):
            got[queues.index(queue)] += some
    assert got[0] / sum(got) == pytest.approx(0.75, abs=0.01)


def test_the_shares_are_spread_and_do_not_come_in_blocks() -> None:
    queues = queues_of(5, 1, 1)
    story = [queues.index(shares(queues, 1, strict=False)[0][0]) for _ in range(14)]
    assert story == [0, 0, 1, 0, 2, 0, 0] * 2  # as nginx gives it


@settings(max_examples=100)
@given(WEIGHTS.filter(lambda it: len(it) > 1), st.integers(0, 2**32), st.integers(1, 100))
def test_no_queue_starves_while_others_run_dry_and_fill_again(weights: list[int], seed: int, n: int) -> None:
    rng = random.Random(seed)
    queues = queues_of(*weights)
    for _ in range(200):
        for queue in queues[1:]:
            queue.drained = rng.random() < 0.5
        shares(queues, n, strict=False)
        assert all(abs(queue.credit) <= 4 * sum(weights) * len(weights) for queue in queues)
    for queue in queues:
        queue.drained = False
    waits = sum(weights) * (4 * len(weights) + 1)
    got: set[int] = set()
    while waits > 0 and len(got) < len(queues):
        got |= {queues.index(queue) for queue, _ in shares(queues, n, strict=False)}
        waits -= n
    assert len(got) == len(queues)
