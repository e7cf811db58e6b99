"""Messages that no prefork has written, put into Redis while a worker runs: each is a dead letter with a clear reason,
kept as it came, and the worker goes on with the next one. What is only strange runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import orjson
import pytest

from prefork.broker import survey
from tests.conftest import Project, Server, Worker, until
from tests.process.scene import key

NOW = b"1764000000000"
SERIAL = count(1)


def message(header: bytes = b'{"task":"ADD"}', body: bytes = b"[[1],{}]", start: bytes = b"1 " + NOW + b" 0") -> bytes:
    return start + b" " + header + b"\n" + body


FORMAT, HEADER, BODY = "is not in prefork's format: ", "has a damaged header: ", "has a damaged body: "
BAD: dict[str, tuple[bytes, str, str]] = {
    # not a message at all
    "empty": (b"", FORMAT, "b''"),
    "text": (b"hello", FORMAT, "b'hello'"),
    "json": (b'{"task": "add", "args": [1]}', FORMAT, ""),
    "celery's": (b'{"body": "W10=", "headers": {"task": "add"}, "properties": {}}', FORMAT, ""),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94.", FORMAT, ""),
    "zeros": (b"\0" * 1000, FORMAT, ""),
    "what a terminal obeys": (b"\x1b[31m\x07", FORMAT, "x1b"),
    "a megabyte": (b"x" * (1 << 20), FORMAT, ""),
    "nothing but spaces": (b" " * 100, FORMAT, ""),
    "spaces and a newline": (b"    \n", "has format version ", "upgrade this worker"),
    # the version
    "version 2": (message(start=b"2 " + NOW + b" 0"), "has format version 2, this prefork reads version 1", "upgrade"),
    "version 0": (message(start=b"0 " + NOW + b" 0"), "has format version 0, this prefork reads version 1", "upgrade"),
    "version one": (message(start=b"one " + NOW + b" 0"), "has format version one", "upgrade this worker"),
    "version of bytes": (message(start=b"\xff " + NOW + b" 0"), "has format version ", "upgrade this worker"),
    "huge version": (message(start=b"9" * 5000 + b" " + NOW + b" 0"), "has format version 999", "upgrade"),
    # missing fields
    "no header": (b"1 " + NOW + b" 0", FORMAT, ""),
    "no body": (b"1 " + NOW + b' 0 {"task":"ADD"}', FORMAT, ""),
    "no time": (b'1 0 {"task":"ADD"}\n[[1],{}]', FORMAT, ""),
    "no priority": (b"1 " + NOW + b' {"task":"ADD"}\n[[1],{}]', FORMAT, ""),
    "no task": (message(b"{}"), HEADER, "no task name in it"),
    "task null": (message(b'{"task":null}'), HEADER, "no task name in it"),
    "task a number": (message(b'{"task":7}'), HEADER, "no task name in it"),
    "header empty": (message(b""), HEADER, ""),
    "header a list": (message(b'["ADD"]'), HEADER, "no task name in it"),
    "header not json": (message(b"{task: add}"), HEADER, ""),
    "header not UTF-8": (message(b'{"task":"\xff"}'), HEADER, ""),
    "body empty": (message(body=b""), BODY, ""),
    "body null": (message(body=b"null"), BODY, ""),
    "body without kwargs": (message(body=b"[[1]]"), BODY, ""),
    "body without args": (message(body=b"[{}]"), BODY, ""),
    "body of two lists": (message(body=b"[[1],[]]"), BODY, "the body is not [args, kwargs]"),
    "body of two dicts": (message(body=b"[{},{}]"), BODY, "the body is not [args, kwargs]"),
    "body cut off": (message(body=b'[[1],{"b":'), BODY, ""),
    "body not json": (message(body=b"(1,)"), BODY, ""),
    "body not UTF-8": (message(body=b'[["\xff"],{}]'), BODY, ""),
    "body with nan": (message(body=b"[[NaN],{}]"), BODY, ""),
    # nested
    "header 10,000 deep": (message(b'{"task":"ADD","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), HEADER, "depth"),
    "body 10,000 deep": (message(body=b"[[" + b"[" * 10_000 + b"]" * 10_000 + b"],{}]"), BODY, "depth"),
    "body of 10,000 dicts": (message(body=b"[[" + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"],{}]"), BODY, "depth"),
    "body 10,000 deep, open": (message(body=b"[" * 10_000), BODY, "depth"),
    # huge integers
    "huge time": (message(start=b"1 " + b"9" * 20 + b" 0"), HEADER, "enqueued at 99999999999999999999"),
    "time of 5,000 digits": (message(start=b"1 " + b"9" * 5000 + b" 0"), HEADER, ""),
    "negative time": (message(start=b"1 -5 0"), HEADER, "enqueued at -5"),
    "the year 10,000": (message(start=b"1 253402300800000 0"), HEADER, "enqueued at 253402300800000"),
    "due in the year 10,000": (message(b'{"task":"ADD","due_ms":253402300800000}'), HEADER, "due_ms is 2534"),
    "huge priority": (message(start=b"1 " + NOW + b" 99999999999999999999"), HEADER, "priority 99999999999999999999"),
    "priority a word": (message(start=b"1 " + NOW + b" high"), HEADER, "high"),
    "huge timeout": (message(b'{"task":"ADD","timeout_s":%s}' % (b"9" * 30)), HEADER, "timeout_s is 1e+30"),
    "timeout of 400 digits": (message(b'{"task":"ADD","timeout_s":%s}' % (b"9" * 400)), HEADER, "infinity"),
    "a timeout of 31,000 years": (message(b'{"task":"ADD","timeout_s":1e12}'), HEADER, "timeout_s is 10000000000"),
    "huge retries": (message(b'{"task":"ADD","max_retries":%s}' % (b"9" * 19)), HEADER, "max_retries is 999"),
    "negative retries": (message(b'{"task":"ADD","max_retries":-1}'), HEADER, "max_retries is -1"),
    "timeout a word": (message(b'{"task":"ADD","timeout_s":"soon"}'), HEADER, "timeout_s is 'soon'"),
    "timeout a bool": (message(b'{"task":"ADD","timeout_s":true}'), HEADER, "timeout_s is True"),
    "huge argument": (message(body=b"[[%s],{}]" % (b"9" * 30)), BODY, f"the integer {'9' * 30} has more than 64 bits"),
    "argument of 65 bits": (message(body=b"[[18446744073709551616],{}]"), BODY, "18446744073709551616"),
    "argument of -65 bits": (message(body=b"[[-9223372036854775809],{}]"), BODY, "-9223372036854775809"),
    "argument of 5,000 digits": (message(body=b"[[%s],{}]" % (b"9" * 5000)), BODY, ""),
    "argument of 1e999": (message(body=b"[[1e999],{}]"), BODY, "infinity"),
    # surrogates
    "surrogate as a task": (message(b'{"task":"\\ud800"}'), HEADER, "surrogate"),
    "surrogate as an argument": (message(body=b'[["\\ud800"],{}]'), BODY, "surrogate"),
    "surrogate as a keyword": (message(body=b'[[1],{"\\udfff":1}]'), BODY, "surrogate"),
    "surrogate as bytes": (message(body=b'[["\xed\xa0\x80"],{}]'), BODY, ""),
}  # fmt: skip

NOT_FITTING = {
    "too many arguments": (b"[[1,2,3],{}]", "builtins.TypeError", "takes from 1 to 2 positional arguments"),
    "unknown keyword": (b'[[1],{"c":3}]', "builtins.TypeError", "unexpected keyword argument 'c'"),
    "empty keyword": (b'[[1],{"":3}]', "builtins.TypeError", "unexpected keyword argument ''"),
    "argument missing": (b"[[],{}]", "builtins.TypeError", "missing 1 required positional argument: 'a'"),
}

STRANGE = {
    "extra fields in the header": (message(b'{"task":"ADD","colour":"red","trace":{"id":[1]}}'), 3),
    "a field of a later version": (message(b'{"task":"ADD","max_retries":3,"group":"x"}'), 3),
    "fields in another order": (message(b'{"max_retries":3,"task":"ADD"}'), 3),
    "spaces in the JSON": (message(b'{ "task" : "ADD" }', b" [ [ 1 ] , { } ] "), 3),
    "a field twice": (message(b'{"task":"nowhere","task":"ADD"}'), 3),
    "the largest integers": (message(body=b'[[18446744073709551615],{"b":-9223372036854775808}]'), (1 << 63) - 1),
    "digits in a text": (message(body=b'[["%s"],{"b":"!"}]' % (b"9" * 30)), "9" * 30 + "!"),
    "a float of many digits": (message(body=b"[[0.1234567890123456789012345],{}]"), 2.123456789012345678),
    "surrogates that belong together": (message(body=b'[["\\ud83d\\ude00"],{"b":"!"}]'), "\U0001f600!"),
    "a newline at the end": (message(body=b"[[1],{}]\n"), 3),
    "the year 1970": (message(start=b"1 1 0"), 3),
    "the year 9999": (message(start=b"1 253402300799999 0"), 3),
    "the year 9999, asked by the task": (
        message(b'{"task":"WHEN"}', start=b"1 253402300799999 0", body=b"[[],{}]"),
        9999,
    ),
    "a plus before the priority": (message(start=b"1 " + NOW + b" +5"), 3),
    "900 deep": (message(b'{"task":"DEPTH"}', b"[[" + b"[" * 900 + b"]" * 900 + b"],{}]"), 899),
}


class Scene:
    """A project with one worker, which lives through all that this module does to it."""

    def __init__(self, project: Project) -> None:
        self.project = project
        project.add("""
            @app.task
            def depth(value):
                n = 0
                while value:
                    value, n = value[0], n + 1
                return n

            @app.task(takes_context=True)
            def when(context): return context.enqueued_at.year

            @app.task(max_retries=1, retry_delay=0)
            def fail(*args): raise ValueError("no")
        """)
        self.worker: Worker = project.worker("log_format = json")
        self.client = project.server.client

    def put(self, raw: bytes, where: str = "pending") -> str:
        """As somebody does who writes to Redis by himself. -> the id"""
        id = f"{next(SERIAL):032x}"
        raw = self.named(raw)
        self.client.hset(key("m"), id, raw)
        if where == "pending":
            self.client.rpush(key("pending"), id)
        else:
            self.client.zadd(key(where), {id: -5})
        self.client.zadd(key("wake"), {"0": 0})
        return id

    def named(self, raw: bytes) -> bytes:
        """With the real names of the tasks."""
        for name in ("add", "depth", "fail", "when"):
            raw = raw.replace(name.upper().encode(), getattr(self.project.tasks, name).name.encode())
        return raw

    def buried(self, id: str) -> dict[str, Any]:
        """The reason of a dead letter."""
        until(lambda: self.client.zscore(key("dead"), id) is not None, what=f"{id} is a dead letter")
        error: dict[str, Any] = orjson.loads(self.client.hget(key("state"), id))["errors"][-1]
        return error

    def goes_on(self) -> None:
        """The worker has not died and not begun anew: it runs the next task."""
        assert self.project.tasks.add.enqueue(40).wait(timeout=60) == 42
        assert self.worker.process.poll() is None
        assert len(self.worker.children()) == 2

    def log_of(self, id: str) -> list[str]:
        return [line["message"] for line in map(orjson.loads, self.worker.log.splitlines()) if id in line["message"]]


@pytest.fixture(scope="module")
def scene(server_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    server = Server(server_binary)
    project = Project(tmp_path_factory.mktemp("messages"), server, "tasks_of_messages")
    scene = Scene(project)
    first = scene.worker.children()
    yield scene
    assert scene.worker.children() == first, "no child died of a message"
    assert not [line for line in scene.worker.log.splitlines() if "traceback" in orjson.loads(line)]
    assert scene.worker.stop() == 0
    project.close()
    server.close()


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_cannot_be_read_is_a_dead_letter(scene: Scene, name: str) -> None:
    raw, what, part = BAD[name]
    id = scene.put(raw)
    scene.goes_on()
    error = scene.buried(id)
    assert error["class"] == "prefork.BadMessage"
    assert error["message"].startswith(f"message {id} ")
    assert what in error["message"]
    assert part in error["message"]
    assert error["message"].isprintable()
    assert len(error["message"]) < 500
    assert scene.client.hget(key("m"), id) == scene.named(raw)
    (line,) = scene.log_of(id)
    assert what in line
    assert "dead letter" in line
    assert survey.task(scene.project.tasks.app.client, id)["place"] == "dead"


@pytest.mark.parametrize("where", ["ranked", "scheduled"])
def test_wherever_it_was_put(scene: Scene, where: str) -> None:
    id = scene.put(b"garbage", where)
    assert FORMAT in scene.buried(id)["message"]
    scene.goes_on()


@pytest.mark.parametrize("name", NOT_FITTING)
def test_arguments_that_the_task_does_not_take_fail_as_the_task_does(scene: Scene, name: str) -> None:
    body, kind, part = NOT_FITTING[name]
    id = scene.put(message(b'{"task":"ADD","max_retries":0}', body))
    error = scene.buried(id)
    assert error["class"] == kind
    assert part in error["message"]
    scene.goes_on()


@pytest.mark.parametrize("name", STRANGE)
def test_a_message_that_is_only_strange_runs(scene: Scene, name: str) -> None:
    raw, returned = STRANGE[name]
    id = scene.put(raw)
    until(lambda: scene.client.exists(key(f"r:{id}")), what="it has run")
    record = orjson.loads(scene.client.get(key(f"r:{id}")))
    assert (record["status"], record["value"]) == ("SUCCESSFUL", returned)
    app = scene.project.tasks.app
    assert app.result(id).enqueued_at is not None
    assert survey.task(app.client, id)["place"] == "finished"
    scene.goes_on()


def test_extra_fields_are_kept_from_attempt_to_attempt(scene: Scene) -> None:
    raw = message(b'{"task":"FAIL","colour":"red"}')
    id = scene.put(raw)
    error = scene.buried(id)
    assert (error["class"], error["attempt"]) == ("builtins.ValueError", 2)
    assert scene.client.hget(key("m"), id) == scene.named(raw)


def test_an_id_without_a_message_is_passed_over(scene: Scene) -> None:
    scene.client.rpush(key("pending"), "f" * 32)
    scene.goes_on()
    assert scene.client.zscore(key("dead"), "f" * 32) is None


def test_a_task_that_nobody_knows_is_kept_for_those_who_may(scene: Scene) -> None:
    id = scene.put(message(b'{"task":"shop.nowhere"}'))
    until(lambda: scene.client.zscore(key("scheduled"), id) is not None, what="it is tried again later")
    (line,) = scene.log_of(id)
    assert "no task 'shop.nowhere' is registered here; registered are: " in line
    scene.goes_on()


def test_500_of_them_in_one_claim_keep_nobody_waiting(scene: Scene) -> None:
    raws = [raw for raw, _, _ in BAD.values() if len(raw) < 100_000]
    ids = [scene.put(raws[n % len(raws)]) for n in range(500)]
    scene.goes_on()
    until(lambda: all(scene.client.zmscore(key("dead"), ids)), what="all are dead letters")
