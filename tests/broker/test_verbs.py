from __future__ import annotations

from hashlib import sha1
from importlib.resources import files
from pathlib import Path

import pytest

from prefork.broker import verbs
from prefork.broker.keys import Keys
from tests.broker.bench import PAYLOAD, Bench

KEYS = Keys("p", "q")
ENTRY = verbs.Entry("q", "a", 0, "", PAYLOAD)
CALLS = {
    "enqueue": verbs.enqueue(KEYS, [ENTRY]),
    "claim": verbs.claim(KEYS, "w", 1),
    "settle": verbs.settle(KEYS, "w", 1, 1, ["a"], ["done", "b", 0, b""]),
    "restore": verbs.restore(KEYS, "w", "keep", ["a"]),
    "beat": verbs.beat(KEYS, "w", 1000, first=True),
    "cancel": verbs.cancel(KEYS, "a", 0, b"", b""),
    "ask": verbs.ask(KEYS, "w", "report"),
    "revive": verbs.revive(KEYS, ["a", b"b"]),
    "delete": verbs.delete(KEYS, "a"),
    "purge": verbs.purge(KEYS, "dead", 10),
    "pause": verbs.pause(KEYS, on=True),
    "peek": verbs.peek(KEYS.messages, ["a", b"b"]),
    "keys": verbs.keys("p", b"0", 10),
    "scan": verbs.scan(KEYS.messages, b"0", 10, "messages"),
    "where": verbs.where(KEYS, ["w"], [b"a"]),
    "place": verbs.place(KEYS, ["w"], b"a", mend=True),
    "bury": verbs.bury(KEYS, b"a", b"x", b"{}"),
    "promote": verbs.promote(KEYS, 1000, 10**15, 100),
    "stray": verbs.stray(KEYS, [b"a"], mend=True),
    "swap": verbs.swap(KEYS.stats, "failed", b"x", None),
    "aside": verbs.aside(KEYS.messages, KEYS.aside_prefix + "m", "hash", 1000),
    "bound": verbs.bound(KEYS.takeovers, 1000),
    "inspect": verbs.inspect(KEYS, "a"),
    "census": verbs.census(KEYS),
}


def names() -> list[str]:
    return sorted(Path(path.name).stem for path in (files("prefork.broker") / "scripts").iterdir())


def test_every_script_has_a_verb_and_every_verb_a_script() -> None:
    assert sorted(CALLS) == names()
    assert [call.verb for call in CALLS.values()] == list(CALLS)


@pytest.mark.parametrize("name", names())
def test_a_script_says_what_it_takes_and_returns(name: str) -> None:
    lines = verbs.script(name).text.decode().splitlines()
    for head in ("-- KEYS  ", "-- ARGV  ", "-- Returns  "):
        assert any(line.startswith(head) for line in lines[:30]), head


@pytest.mark.parametrize("name", names())
def test_a_script_gets_as_many_keys_as_it_names(name: str) -> None:
    text = verbs.script(name).text.decode()
    used = {int(part.split("]")[0]) for part in text.split("KEYS[")[1:]}
    assert used <= set(range(1, len(CALLS[name].keys) + 1))
    assert max(used, default=0) == len(CALLS[name].keys), "a key is passed that is not used"


def test_a_script_is_known_by_its_hash() -> None:
    script = verbs.script("claim")
    assert script.sha == sha1(script.text).hexdigest()
    assert verbs.script("claim") is script


def test_the_words_of_a_call() -> None:
    call = verbs.Call("claim", ("k1", "k2"), ("w", 3))
    script = verbs.script("claim")
    assert call.command() == ("EVALSHA", script.sha, 2, "k1", "k2", "w", 3)
    assert call.command(in_full=True) == ("EVAL", script.text, 2, "k1", "k2", "w", 3)


@pytest.mark.parametrize("name", names())
def test_every_call_is_understood(real_bench: Bench, name: str) -> None:
    bench = Bench(real_bench.client)
    bench.keys = KEYS
    bench.lease("w")
    bench.run(CALLS[name])
    assert all("{q}" in key for key in bench.everything())


@pytest.mark.parametrize(
    ("info", "name", "version", "old"),
    [
        ({"redis_version": "5.0.7"}, "redis 5.0.7", (5, 0), True),
        ({"redis_version": "6.0.16"}, "redis 6.0.16", (6, 0), True),
        ({"redis_version": "6.2.0"}, "redis 6.2.0", (6, 2), False),
        ({"redis_version": "7.0.15"}, "redis 7.0.15", (7, 0), False),
        ({"redis_version": "10.1.0"}, "redis 10.1.0", (10, 1), False),
        ({"redis_version": 6.2}, "redis 6.2", (6, 2), False),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.1"}, "valkey 9.0.1", (7, 2), False),
        ({}, "redis 0", (0,), True),
    ],
)
def test_the_version_of_a_server(info: dict[str, object], name: str, version: tuple[int, ...], old: bool) -> None:
    assert verbs.version_of(info) == (name, version)
    assert (version < verbs.OLDEST_SERVER) is old
