"""Blocking connections: connect, greet, ask; with listeners that misbehave."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import hiredis
import pytest

from prefork.broker import address, lookup, passing
from prefork.broker.client import Client
from prefork.broker.wire import TROUBLE, Unreached, Wire
from tests.broker.wires import Listener, Proxy, Redislike, Says, free_port
from tests.conftest import PATIENCE_S, Server, until

CERTIFICATE = Path(__file__).parent / "localhost.pem"
LIMIT_S = 0.3


def wire_to(url: str, limit_s: float = PATIENCE_S) -> Wire:
    return Wire(address.resolve(url), "test", limit_s)


def why_not(url: str, limit_s: float = PATIENCE_S) -> Any:
    """Why it can't be reached."""
    with pytest.raises(Unreached) as caught:
        wire_to(url, limit_s).one("PING")
    return caught.value.why


def encrypted(server: Server) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return Proxy(server.path, tls=context)


def test_replies_come_in_order_with_errors_in_their_places(server: Server) -> None:
    wire = wire_to(server.url)
    said = wire.ask(("SET", "k", b"\x00"), ("LLEN", "k"), ("GET", "k"))
    assert (said[0], said[2]) == (b"OK", b"\x00")
    assert isinstance(said[1], hiredis.ReplyError)
    with pytest.raises(hiredis.ReplyError, match="WRONGTYPE"):
        wire.one("LLEN", "k")
    assert wire.one("CLIENT", "GETNAME") == b"test"
    wire.close_idle()


def test_a_connection_is_kept_and_replaced_when_the_server_has_closed_it(server: Server) -> None:
    wire = wire_to(server.url)
    first = wire.one("CLIENT", "ID")
    assert wire.one("CLIENT", "ID") == first
    server.client.client_kill_filter(_id=str(first))
    assert wire.one("CLIENT", "ID") > first
    wire.close_idle()


def test_tls(server: Server) -> None:
    with encrypted(server) as proxy:
        wire = wire_to(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={CERTIFICATE}")
        payload = random.randbytes(1 << 20)
        assert wire.ask(("SET", "k", payload), ("GET", "k")) == [b"OK", payload]
        wire.close_idle()
        assert wire_to(f"rediss://localhost:{proxy.port}?ssl_cert_reqs=none").one("PING") == b"PONG"


def test_a_certificate_that_is_not_trusted_does_not_pass_by_itself(server: Server) -> None:
    with encrypted(server) as proxy:
        why = why_not(f"rediss://localhost:{proxy.port}")
        assert isinstance(why, ssl.SSLCertVerificationError)
        assert not passing.may_pass(why, known=True)


def test_a_name_with_several_addresses_of_which_one_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(server.path) as proxy:
        found = [
            lookup.Found(socket.AF_INET, socket.SOCK_STREAM, 0, ("127.0.0.1", port))
            for port in (free_port(), proxy.port)
        ]
        monkeypatch.setattr(lookup, "addresses", lambda host, port: found)
        assert wire_to("redis://some.host").one("PING") == b"PONG"
        found.pop()
        assert isinstance(why_not("redis://some.host"), ConnectionRefusedError)


def test_a_user_who_may_not_name_a_connection_can_work() -> None:
    def reply(words: list[bytes]) -> bytes:
        return b"-NOPERM no\r\n" if words[0] == b"CLIENT" else b"+PONG\r\n"

    with Redislike(reply) as there:
        assert wire_to(there.url).one("PING") == b"PONG"


@pytest.mark.parametrize("said", ["DENIED Redis is running in protected mode", "ERR max number of clients reached"])
def test_a_server_that_turns_a_connection_away_is_heard(said: str) -> None:
    with Says(f"-{said}\r\n".encode(), then_close=True) as there:
        why = why_not(there.url)
        assert isinstance(why, hiredis.ReplyError)
        assert str(why) == said


@pytest.mark.parametrize("said", [b"+OK POP3 ready\r\n", b"HTTP/1.1 400 Bad Request\r\n", b":1\r\n"])
def test_who_speaks_something_else_is_not_taken_for_a_server(said: bytes) -> None:
    with Says(said) as there:
        why = why_not(there.url)
        assert isinstance(why, hiredis.ProtocolError)
        assert not passing.may_pass(why, known=False)
        assert passing.may_pass(why, known=True)


def test_who_says_nothing_is_given_up(server: Server) -> None:
    with Listener() as there:
        assert isinstance(why_not(there.url, LIMIT_S), TimeoutError)
        assert isinstance(why_not(f"rediss://127.0.0.1:{there.port}", LIMIT_S), TimeoutError)


def test_what_has_to_be_over_by_a_time_is_whatever_the_limit_of_each_wait(server: Server) -> None:
    wire, begun_s = wire_to(server.url), time.monotonic()
    wire.one("PING")
    with Listener() as there, pytest.raises(Unreached):
        wire_to(there.url).one("PING", end_s=time.monotonic() + LIMIT_S)
    with pytest.raises(TimeoutError):
        wire.ask(("PING",), ("BLPOP", "nothing", 0), ("BLPOP", "nothing", 0), end_s=time.monotonic() + LIMIT_S)
    assert time.monotonic() - begun_s < PATIENCE_S / 2

    def answers() -> bool:
        try:
            return bool(wire.one("PING", end_s=begun_s) == b"PONG")
        except TROUBLE:
            return False  # a busy machine

    until(answers, what="who is near has time to answer")
    assert wire._idle[0]._socket.gettimeout() == PATIENCE_S, "the next request has all of it again"
    wire.close_idle()


def test_a_reply_that_is_late_or_cut_is_not_taken_for_a_refusal(server: Server) -> None:
    wire = wire_to(server.url)
    wire.one("PING")
    with pytest.raises(TimeoutError):
        wire.one("BLPOP", "nothing", 0, end_s=time.monotonic() + LIMIT_S)
    with Proxy(server.path) as proxy:
        proxy.lose(b"PING", keep=2)
        with pytest.raises(ConnectionResetError, match="closed"):
            wire_to(proxy.url).one("PING")


def test_each_of_many_threads_has_a_connection_of_its_own(server: Server) -> None:
    wire = wire_to(server.url)
    ids: set[int] = set()
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait(PATIENCE_S)
        ids.add(wire.ask(("BLPOP", "awaited", 0), ("CLIENT", "ID"))[1])

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: server.client.info("clients")["blocked_clients"] == 8)
    server.client.rpush("awaited", *range(8))
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(ids) == 8
    wire.close_idle()
    until(lambda: not ids & {int(it["id"]) for it in server.client.client_list()})


IN_SCRIPT = "ERR Error running script (call to f_0a): @user_script:4:"


@pytest.mark.parametrize(
    ("said", "passes", "now"),
    [
        ("READONLY You can't write", True, True), ("BUSY Redis is busy", True, True), ("LOADING", True, False),
        ("ERR max number of clients reached", True, False), ("WRONGPASS", False, False), ("OOM", False, False),
        # as Redis 6.2 says it of a command in a script
        (f"{IN_SCRIPT} @user_script: 4: -READONLY You can't write", True, True),
        (f"{IN_SCRIPT} @user_script: 4: -OOM command not allowed", False, False),
        (f"{IN_SCRIPT} attempt to index a nil value", False, False),
    ],
)  # fmt: skip
def test_which_refusals_pass(said: str, passes: bool, now: bool) -> None:
    error = hiredis.ReplyError(said)
    assert passing.may_pass(error, known=False) is passes
    assert passing.refused_for_now(error) is now


def test_a_rehearsal_leaves_nothing(server: Server) -> None:
    client = Client(server.url, "t")
    client.rehearse(["a", "b"])
    client.close()
    assert server.client.keys() == []


def test_connections_can_be_closed_while_another_thread_takes_the_last_one() -> None:
    class Taken(list[Any]):
        def __bool__(self) -> bool:  # there was one when it was looked for
            return True

    wire = Wire(address.resolve("redis://127.0.0.1:1/0"), "test", 1.0)
    wire._idle = Taken()
    wire.close_idle()
