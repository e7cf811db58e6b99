from __future__ import annotations

import pytest

from prefork.broker.keys import Keys, queues_key
from tests.broker.bench import Bench


def test_all_keys_of_a_queue_carry_its_hash_tag_and_the_prefix() -> None:
    keys = Keys("shop", "mail")
    names = [value for name, value in vars(keys).items() if name != "queue"] + [keys.active("w1")]
    assert len(set(names)) == len(names)
    assert all(name.startswith("shop:{mail}:") for name in names)


def test_keys_of_two_queues_or_prefixes_never_meet() -> None:
    def names(keys: Keys) -> set[str]:
        return {value for name, value in vars(keys).items() if name != "queue"}

    assert not names(Keys("p", "a")) & names(Keys("p", "b"))
    assert not names(Keys("p", "a")) & names(Keys("q", "a"))
    assert queues_key("p") != queues_key("q")
    assert queues_key("p") not in names(Keys("p", "queues"))


def test_the_keys_that_prefix_others_are_not_prefixes_of_each_other() -> None:
    keys = Keys("p", "q")
    prefixes = [keys.active_prefix, keys.result_prefix, keys.done_prefix]
    whole = [value for name, value in vars(keys).items() if not name.endswith("_prefix") and name != "queue"]
    for prefix in prefixes:
        assert not [name for name in [*whole, *prefixes] if name.startswith(prefix) and name != prefix]


@pytest.mark.parametrize("queue", ["q", "größe", "a.b/c-d", "x" * 100])
def test_a_queue_of_any_permitted_name_works(real_bench: Bench, queue: str) -> None:
    bench = Bench(real_bench.client, queue)
    bench.lease("w")
    bench.put("a")
    assert bench.claim("w", 1).ids == ["a"]
    assert all(key.startswith("t:{" + queue + "}:") for key in bench.everything())
