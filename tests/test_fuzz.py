"""Every decoder against garbage: whatever an outsider, a damaged broker or a task that writes into our pipes may send,
there is an answer of ours or an error of ours, and nothing else.

By hand, far longer: `PREFORK_FUZZ=2000000 pytest tests/test_fuzz.py`. The inputs come from a seed, so that a failure
comes again; `PREFORK_FUZZ_SEED` takes another one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from prefork.app import Prefork
from prefork.broker import address, facts, survey
from prefork.config import load
from prefork.errors import BadMessage, BadSignature, BrokerError, ConfigError, ResultUnavailable
from prefork.message import State, decode
from prefork.result import TaskResult
from prefork.signing import Signer
from prefork.worker import frames, process
from prefork.worker.frames import ANSWER
from prefork.worker.handoff import MasterEnd
from prefork.worker.settlement import _verdict

TOTAL = int(os.environ.get("PREFORK_FUZZ", "100000"))
SEED = os.environ.get("PREFORK_FUZZ_SEED", "prefork")
ID = "01a20ba2946a7b09923474bb9927d8b7"
SIGNER = Signer(["0123456789abcdef" * 4])
APP = Prefork("fuzz", broker="redis://nowhere:1/0")
PLAIN = (
    b'1 1764000000000 0 {"task":"shop.send"}\n[[7],{"copy":true}]',
    b'1 1764000000000 -7 {"task":"shop.send","max_retries":3,"timeout_s":1.5}\n[[],{}]',
    b"0 cancelled",
)
SIGNED = tuple(
    b"1 1764000000000 0 " + SIGNER.sign(ID, "default", 0, payload.split(b" ", 3)[3]) for payload in PLAIN[:2]
)
ERROR = {"class": "builtins.ValueError", "message": "no", "traceback": "Traceback …", "at_ms": 1764000000000}
STATES = (
    orjson.dumps({"attempts": 2, "retried": 1, "started_ms": 1764000000000, "errors": [ERROR], "workers": ["w"]}),
    orjson.dumps({"progress": [1, 2.5, "half"], "crashes": 1, "due_ms": 1764000000000}),
)
VERDICTS = (orjson.dumps({"error": ERROR, "delay_s": 1.5, "retry": True}), orjson.dumps(ERROR))
RECORDS = (
    orjson.dumps({"status": "SUCCESSFUL", "task": "t", "value": [1], "enqueued_ms": 1764000000000, "attempts": 1}),
    orjson.dumps({"status": "FAILED", "task": "t", "errors": [ERROR], "finished_ms": 1764000000000}),
)
ANSWERS = (
    ANSWER.pack(1, frames.DONE, 2, 0.5, 0.1, 1000) + b"[]",
    ANSWER.pack(2, frames.FAILED, 4, 0.5, 0.1, 1000) + b"null" + ANSWER.pack(3, frames.READY, 0, 0, 0, 0),
)
CONFS = (
    b"[prefork]\napp = shop:app\nbroker = redis://localhost/0\nconcurrency = 4\nlease = 10s\nqueues = a:2, b\n",
    b"[prefork]\napp = shop:app\n; a comment\nmax_memory_per_child = 200MB\nshutdown_timeout = 1m\nuser =\n",
)
URLS = (
    b"redis://:sesame@localhost:6379/0", b"rediss://user:sesame@h:1/2?ssl_cert_reqs=none", b"unix:///run/s?db=1",
    b"embedded:", b"redis://[::1]:6379/0?socket_timeout=1",
)  # fmt: skip
NASTY = (
    b"", b"\x00", b"\xff", b"\n", b"\r\n", b" ", b"{", b"}", b"[" * 5000, b'"', b"null", b"true", b"-1", b"1e999",
    b"NaN", b"99999999999999999999999", b"\\ud800", b"\xed\xa0\x80", b"%(ENV_HOME)s", b"%", b"=", b":", b"@", b"/",
    b"#", b'{"task":1}', b"[[],[]]", b"\xe2\x80\xae", b"\x1b[2J", b"0", b"1", b'{"__class__":[]}',
)  # fmt: skip


def mutated(draw: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """One of the seeds, changed a little or a lot."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(data) + 1)
        what = draw.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del data[at : at + draw.randrange(1, 9)]
        elif what == 2:
            data[at:at] = draw.choice(NASTY)
        elif what == 3:
            data[at : at + draw.randrange(1, 9)] = draw.choice(NASTY)
        elif what == 4:
            data[at:at] = draw.choice(seeds)[: draw.randrange(1, 40)]
        else:
            del data[at:]
    return bytes(data)


# -- the decoders; what they may raise stands in the table below ------------------------------------------------------


def a_message(raw: bytes) -> None:
    message = decode(ID.encode(), "default", raw)
    assert isinstance(message.header.task, str)
    message.header.encode()


def an_id(raw: bytes) -> None:
    decode(raw, "default", PLAIN[0])


def a_state(raw: bytes) -> None:
    state = State.decode(raw)
    assert State.decode(state.encode()) == state
    facts.errors(state.errors)


def a_signed_message(raw: bytes) -> None:
    verified = SIGNER.verified(ID.encode(), "default", raw)
    signed = {payload.split(b" ", 3)[3] for payload in PLAIN[:2]}
    assert verified.split(b" ", 3)[3] in signed, "altered, and taken for ours"


def what_an_operator_sees(raw: bytes) -> None:
    orjson.dumps(survey.of_message(ID, "default", raw, State.decode(raw)))


def a_verdict(raw: bytes) -> None:
    verdict = _verdict(raw)
    assert verdict["delay_s"] >= 0
    assert all(isinstance(verdict["error"][name], str) for name in ("class", "message", "traceback"))
    assert isinstance(process.boot_error(raw), str)


def a_record(raw: bytes) -> None:
    orjson.dumps(facts.record(raw))
    result: TaskResult[object] = TaskResult(APP, ID, "default", "t", 0)
    result._take_record(raw)
    told = (result.enqueued_at, result.started_at, result.finished_at, result.errors, result.attempts, result.progress)
    assert repr((result, told))


def the_name_of_a_worker(raw: bytes) -> None:
    survey.whose(raw.decode("utf-8", "backslashreplace"))


def an_answer(raw: bytes) -> None:
    _END._garbage = ""
    _END._answers.clear()
    os.write(_END._child_answer_w, raw[:60_000] or b"\x00")
    for answer in _END.receive() or []:
        assert answer.kind <= frames.BOOT_FAILED
        assert len(answer.payload) <= frames.LARGEST_ANSWER


def a_url(raw: bytes) -> None:
    url = raw.decode("utf-8", "replace")
    if url.startswith("embedded:"):  # that would start a server
        return
    try:
        address.resolve(url)
    except BrokerError as error:
        whole = url.startswith(("redis://", "rediss://")) and url.count("sesame") == 1
        if whole and ":sesame@" in url.partition("?")[0] and "sesame" in str(error):
            raise AssertionError(f"the password is shown: {error}") from None
        raise


_END = MasterEnd()
DECODERS: list[tuple[Callable[[bytes], None], tuple[bytes, ...], float, type[Exception] | tuple[()]]] = [
    (a_message, PLAIN, 0.25, BadMessage),
    (an_id, (ID.encode(),), 0.05, BadMessage),
    (a_state, STATES, 0.15, ()),
    (a_signed_message, SIGNED, 0.1, BadSignature),
    (what_an_operator_sees, (*PLAIN, *STATES), 0.1, ()),
    (a_verdict, VERDICTS, 0.1, ()),
    (a_record, RECORDS, 0.1, ResultUnavailable),
    (the_name_of_a_worker, (b"host:b064c3c5:26498:3869112:38691667",), 0.03, ()),
    (an_answer, ANSWERS, 0.1, ValueError),
    (a_url, URLS, 0.02, BrokerError),
]


@pytest.mark.parametrize(("decoder", "seeds", "share", "ours"), DECODERS, ids=[it[0].__name__ for it in DECODERS])
def test_garbage_is_an_error_of_ours(
    decoder: Callable[[bytes], None], seeds: tuple[bytes, ...], share: float, ours: type[Exception] | tuple[()]
) -> None:
    draw = random.Random(f"{SEED}/{decoder.__name__}")
    told = [_told(decoder, raw, ours) for raw in (mutated(draw, seeds) for _ in range(round(TOTAL * share)))]
    assert bool(ours) == any(told)


def test_a_garbled_conf_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, draw = tmp_path / "fuzz.conf", random.Random(f"{SEED}/conf")

    def a_conf(raw: bytes) -> None:
        path.write_bytes(raw)
        load(path)

    told = [_told(a_conf, raw, ConfigError) for raw in (mutated(draw, CONFS) for _ in range(TOTAL // 100))]
    assert any(told)
    assert not [it for it in told if "\n" in it]


def _told(decoder: Callable[[bytes], None], raw: bytes, ours: type[Exception] | tuple[()]) -> str:
    """What the decoder says of it; "" if it takes it."""
    try:
        decoder(raw)
    except ours as error:
        return str(error) or repr(error)
    except Exception as error:
        raise AssertionError(f"seed {SEED!r}: {raw!r:.500}") from error
    return ""
