"""That a seed means the same load and the same faults each time."""

from __future__ import annotations

import itertools
import random

import pytest

from prefork.torture.app import KINDS
from prefork.torture.faults import KINDS as FAULTS
from prefork.torture.faults import plan
from prefork.torture.load import _drawn


def test_a_seed_brings_the_same_faults() -> None:
    first, again, other = (list(itertools.islice(plan(seed, 2, 1.5, server=True), 500)) for seed in "aab")
    assert first == again != other
    assert {draw.name for draw in first} == set(FAULTS)
    assert 1.2 < sum(draw.pause_s for draw in first) / 500 < 1.8


def test_a_broker_of_somebody_else_meets_no_fault_that_hurts_others() -> None:
    names = {draw.name for draw in itertools.islice(plan("a", 2, 1, server=False), 2000)}
    assert names == {name for name, (_, _, _, servers) in FAULTS.items() if not servers}


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.share])
def test_a_seed_brings_the_same_tasks(kind: str) -> None:
    first, again = (_drawn(kind, random.Random("a"), "second") for _ in range(2))
    assert first[1] == again[1]
    assert first[0].name == again[0].name
