"""Whatever stands in the broker: each command says something, in plain characters, and none breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
import redis

from prefork.cli import operator
from tests.cli.command import prefork
from tests.conftest import Server
from tests.process.scene import key

ID, WORKER = "0123", "host:m:12:3:4"
ODD = "\udcff"  # what a byte that is not UTF-8 becomes on the command line
RED = "\x1b[31m"
INFINITE = float("inf")


def message(body: bytes = b"[[1],{}]", header: bytes = b'{"task":"a.b"}', stamp: bytes = b"1 1764000000000 0") -> bytes:
    return stamp + b" " + header + b"\n" + body


def put(client: redis.Redis, raw: bytes, place: str = "dead", id: str | bytes = ID, score: float = 1.764e12) -> None:
    """A message in one place, of a queue that is known."""
    client.sadd("prefork:queues", "default")
    client.hset(key("m"), id, raw)
    if place == "pending":
        client.rpush(key("pending"), id)
    elif place == "active":
        client.zadd(key("leases"), {WORKER: 9e12})
        client.zadd(key(f"active:{WORKER}"), {id: score})
    else:
        client.zadd(key(place), {id: score})


def state(client: redis.Redis, raw: bytes, place: str = "dead") -> None:
    put(client, message(), place)
    client.hset(key("state"), ID, raw)


def result(client: redis.Redis, raw: bytes) -> None:
    client.sadd("prefork:queues", "default")
    client.set(key(f"r:{ID}"), raw)


def report(client: redis.Redis, raw: bytes) -> None:
    put(client, message(), "active")
    client.set(f"prefork:worker:{WORKER}", raw)


def leases(client: redis.Redis, *names: str | bytes) -> None:
    put(client, message(), "active")
    for number, name in enumerate(names):
        client.zadd(key("leases"), {name: (9e12, INFINITE, -INFINITE)[number % 3]})


ODD_ERRORS = {"errors": [{"class": 7, "message": None, "traceback": [1], "attempt": {"a": 1}, "stack": {"x": RED}}]}
DEEP = b"[" * 600 + b"]" * 600  # deeper than what can be written as JSON, but not than what can be read
ODD_REPORT = {"host": RED, "pid": "x", "children": [{"task": 7}], "queues": 3, "uptime_s": "a", "phase": []}
ODD_WORKERS = (RED, b"\xff", "a:b", "x:y:z:1:2", "h:m:²:1:2", "h:m:" + "9" * 99 + ":1:2")
SETUPS: dict[str, Callable[[redis.Redis], Any]] = {
    "no message": lambda c: put(c, b"\xff garbage"),
    "escapes in the task": lambda c: put(c, message(header=b'{"task":"\\u001b[31m"}')),
    "arguments that are no pair": lambda c: put(c, message(b"7")),
    "arguments of wrong types": lambda c: put(c, message(b"[7,8]")),
    "arguments the wrong way round": lambda c: put(c, message(b'[{"a":1},[1]]'), "pending"),
    "arguments too deep to decode": lambda c: put(c, message(b"[" * 100_000), "active"),
    "arguments too deep to encode": lambda c: put(c, message(b"[[" + DEEP + b"],{}]")),
    "arguments with escapes": lambda c: put(c, message(orjson.dumps([[RED], {RED: RED}]))),
    "a message of the end of time": lambda c: put(c, message(stamp=b"1 99999999999999999999999 0")),
    "an id that is no text": lambda c: put(c, message(), id=b"\xff\xfe"),
    "an id with escapes": lambda c: put(c, message(), "pending", id=RED),
    "an id without a message": lambda c: c.lpush(key("pending"), "bare"),
    "odd errors": lambda c: state(c, orjson.dumps(ODD_ERRORS)),
    "escapes in errors": lambda c: state(c, orjson.dumps({"errors": [{"class": RED, "message": RED, "stack": RED}]})),
    "deep errors": lambda c: state(c, b'{"errors":[{"class":' + DEEP + b"}]}"),
    "odd progress": lambda c: state(c, b'{"progress":[' + DEEP + b',{},"' + b'"]}', "active"),
    "odd numbers": lambda c: state(c, b'{"attempts":1e400,"started_ms":"x","retried":-1}', "scheduled"),
    "died at no time": lambda c: put(c, message(), score=INFINITE),
    "due at no time": lambda c: put(c, message(), "scheduled", score=-INFINITE),
    "claimed at no time": lambda c: put(c, message(), "active", score=INFINITE),
    "workers of odd names": lambda c: leases(c, *ODD_WORKERS),
    "a report that is none": lambda c: report(c, b"garbage"),
    "a report of nothing": lambda c: report(c, b"{}"),
    "a report of a list": lambda c: report(c, b"[]"),
    "a report of wrong types": lambda c: report(c, orjson.dumps(ODD_REPORT)),
    "a result that is none": lambda c: result(c, b"garbage"),
    "a result of a list": lambda c: result(c, b"[]"),
    "a result of no status": lambda c: result(c, b'{"status":7}'),
    "a result of an odd status": lambda c: result(c, b'{"status":"\\u001b[31m"}'),
    "a result with odd times": lambda c: result(c, b'{"status":"FAILED","finished_ms":"x","started_ms":1e300}'),
    "a result with odd errors": lambda c: result(c, b'{"status":"FAILED","errors":7}'),
    "a result that is too deep": lambda c: result(c, b'{"status":"SUCCESSFUL","value":' + DEEP + b"}"),
    "counters that are none": lambda c: (put(c, message()), c.hset(key("stats"), b"\xff", "x")),
    "keys of another type": lambda c: (put(c, message()), c.delete(key("dead")), c.set(key("dead"), "x")),
    "queues with escapes": lambda c: (put(c, message()), c.sadd("prefork:queues", f"a{RED}b")),
}  # fmt: skip
LISTS = [("list", "default", "--state", state) for state in ("pending", "scheduled", "active", "dead")]
COMMANDS = [
    ("queues",), ("workers",), ("doctor",), *LISTS, ("list", f"a{RED}"), ("show", ID), ("cancel", ID, "--wait", "0.1"),
    ("retry", ID), ("retry", "--dead", "default", "--yes"), ("delete", ID, "--yes"), ("purge", "default", "--yes"),
]  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_no_command_breaks_on_what_it_reads(name: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    setup = SETUPS[name]
    setup(server.client)
    for words in COMMANDS:
        for json in ((), ("--json",)):
            code = operator.main([*words, *json, "--broker", server.url])  # a traceback would come out here
            said = capsys.readouterr()
            assert code in (0, 1, 69), words
            assert all(c.isprintable() or c == "\n" for c in said.out + said.err), words
            assert len(said.err.splitlines()) <= 1, said.err
            if json and code == 0:
                orjson.loads(said.out)
            if words[0] in ("retry", "delete", "purge"):
                server.client.flushall()
                setup(server.client)


@pytest.mark.parametrize("words", [("show", ODD), ("enqueue", ODD), ("list", ODD), ("cancel", "a", ODD)])
def test_words_that_are_no_text_are_refused(words: tuple[str, ...], server: Server) -> None:
    out = prefork(*words, "--broker", server.url, code=64)
    assert out == "prefork: '\\udcff' is not UTF-8\n"


def test_a_terminal_that_lacks_characters_gets_them_escaped(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(server.client, message(orjson.dumps([["é…"], {}])))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert "\\xe9\\u2026" in prefork("show", ID, "--broker", server.url)
