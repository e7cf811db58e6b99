"""The channel on the master's own loop, against real servers and against listeners that misbehave."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hiredis
import psutil
import pytest

from prefork.broker import channel as channel_module
from prefork.broker import verbs
from prefork.broker.channel import Channel, Lost
from prefork.broker.keys import Keys
from prefork.worker.loop import Loop, Timer
from tests.broker.wires import Listener, Proxy, Redislike, Says, free_port
from tests.conftest import PATIENCE_S, SLACK_S, Server, until

CERTIFICATE = Path(__file__).parent / "localhost.pem"
KEYS = Keys("t", "q")


class QuickLoop(Loop):
    """A loop that notes the delays it is asked for, and waits a hundredth of those that are pauses before a retry."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses_s: list[float] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        if getattr(callback, "__name__", "") == "connect":
            self.pauses_s.append(delay_s)
            delay_s /= 100
        return super().call_later(delay_s, callback)


class Rig:
    """A channel on a loop of its own, turned by the test until something is so."""

    def __init__(self, url: str, loop: Loop | None = None) -> None:
        self.loop = loop or Loop()
        self.ups = 0
        self.downs: list[str] = []
        self.channel = Channel(self.loop, url, "rig", self._up, self.downs.append)

    def _up(self) -> None:
        self.ups += 1

    def turn_until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
        """Turn the loop until the condition is true, and return it."""
        end = time.monotonic() + seconds
        found: list[Any] = []
        timers: list[Timer] = []

        def look() -> None:
            if value := condition():
                found.append(value)
                self.loop.stop()
            elif time.monotonic() > end:
                self.loop.stop()

        def tick() -> None:  # what has to come true may not be an event of the loop
            timers.append(self.loop.call_later(0.005, tick))

        tick()
        self.loop.after = look
        self.loop.run()
        timers[-1].cancel()
        assert found, f"not within {seconds:g} s; downs: {self.downs}"
        return found[0]

    def connect(self) -> Rig:
        self.channel.connect()
        self.turn_until(lambda: self.channel.ready)
        return self

    def send(self, *words: Any, limit_s: float = 20.0) -> list[Any]:
        """Send a plain command. -> a list to which its reply will be appended"""
        replies: list[Any] = []
        self.channel.send_words(words, replies.append, limit_s)
        self.channel.flush()
        return replies

    def ask(self, *words: Any) -> Any:
        replies = self.send(*words)
        self.turn_until(lambda: replies)
        assert len(replies) == 1
        return replies[0]

    def call(self, call: verbs.Call) -> Any:
        replies: list[Any] = []
        self.channel.send(call, replies.append)
        self.channel.flush()
        self.turn_until(lambda: replies)
        return replies[0]

    def close(self) -> None:
        self.channel.close()
        self.loop._selector.close()


Rigs = Callable[..., Rig]


@pytest.fixture
def rig() -> Iterator[Rigs]:
    """Makes rigs, and closes them."""
    made: list[Rig] = []

    def make(url: str, loop: Loop | None = None) -> Rig:
        made.append(Rig(url, loop))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def tcp_server(server_binary: str) -> Iterator[Server]:
    """A server on a TCP port too, that asks for a password and has one more user."""
    port = free_port()
    server = Server(server_binary, "--port", str(port), "--bind", "127.0.0.1")
    server.client.execute_command("ACL", "SETUSER", "bob", "on", ">s:cr@t/%", "~*", "&*", "+@all")
    server.client.config_set("requirepass", "hunter2")
    server.client.execute_command("AUTH", "hunter2")
    server.url = f"127.0.0.1:{port}"
    yield server
    server.close()


# -- connect ----------------------------------------------------------------------------------------------------


def test_it_connects_names_itself_and_loads_the_scripts(rig: Rigs, server: Server) -> None:
    server.client.script_flush()
    it = rig(server.url).connect()
    assert (it.ups, it.downs) == (1, [])
    assert b"name=rig " in it.ask("CLIENT", "LIST")
    shas = [verbs.script(verb).sha for verb in channel_module.LOADED_VERBS]
    assert it.ask("SCRIPT", "EXISTS", *shas) == [1] * len(shas)


@pytest.mark.parametrize(
    ("userinfo", "user"), [(":hunter2", b"default"), ("default:hunter2", b"default"), ("bob:s%3Acr%40t%2F%25", b"bob")]
)  # fmt: skip
@pytest.mark.parametrize("database", [0, 5])
def test_user_password_and_database_come_from_the_url(
    rig: Rigs, tcp_server: Server, userinfo: str, user: bytes, database: int
) -> None:
    it = rig(f"redis://{userinfo}@{tcp_server.url}/{database}").connect()
    assert it.ask("ACL", "WHOAMI") == user
    assert b" db=%d " % database in it.ask("CLIENT", "INFO")


def test_password_in_the_query(rig: Rigs, tcp_server: Server) -> None:
    assert rig(f"redis://{tcp_server.url}?db=3&password=hunter2").connect().ask("PING") == b"PONG"


def test_a_unix_socket_with_user_password_and_database(rig: Rigs, tcp_server: Server) -> None:
    it = rig(f"unix://bob:s%3Acr%40t%2F%25@{tcp_server.path}?db=2").connect()
    assert it.ask("ACL", "WHOAMI") == b"bob"
    assert b" db=2 " in it.ask("CLIENT", "INFO")


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


def test_tls(rig: Rigs, server: Server) -> None:
    with Proxy(server.path, tls=tls_context()) as proxy:
        it = rig(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={CERTIFICATE}").connect()
        payload = random.randbytes(1 << 20)
        assert it.ask("SET", "k", payload) == b"OK"
        assert it.ask("GET", "k") == payload
        proxy.cut()
        it.turn_until(lambda: it.ups == 2)
        assert it.ask("PING") == b"PONG"


def test_tls_without_checking_the_certificate(rig: Rigs, server: Server) -> None:
    with Proxy(server.path, tls=tls_context()) as proxy:
        assert rig(f"rediss://localhost:{proxy.port}?ssl_cert_reqs=none").connect().ask("PING") == b"PONG"
        assert rig(f"rediss://127.0.0.1:{proxy.port}?ssl_ca_certs={CERTIFICATE}&ssl_check_hostname=False").connect()


def test_a_certificate_that_is_not_trusted(rig: Rigs, server: Server) -> None:
    with Proxy(server.path, tls=tls_context()) as proxy:
        it = rig(f"rediss://localhost:{proxy.port}")
        it.channel.connect()
        assert "has a certificate that is not trusted" in it.turn_until(lambda: it.downs)[0]
        assert it.ups == 0


def test_tls_to_a_server_without(rig: Rigs, tcp_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_LIMIT_S", 0.3)  # Redis waits for the end of a line
    it = rig(f"rediss://:hunter2@{tcp_server.url}/0")
    it.channel.connect()
    said = it.turn_until(lambda: it.downs)[0]
    assert "hunter2" not in said
    assert "does not answer in time" in said or "redis:// in place of rediss://" in said


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The server's own TLS is tested where it has any (the bundled one has none)."""
    if "tls_of" in metafunc.fixturenames:
        given = metafunc.config.getoption("--server")
        own = given and b"tls-port" not in subprocess.run(
            [given, "--port", "no number", "--tls-port", "0"], capture_output=True, timeout=10, check=False
        ).stdout.partition(b"--port")[0]  # fmt: skip
        metafunc.parametrize("tls_of", ["a proxy", "the server"] if own else ["a proxy"])


def test_big_payloads_over_tls(rig: Rigs, server: Server, server_binary: str, tls_of: str) -> None:
    port = free_port()
    if tls_of == "the server":
        files = [word for name in ("cert", "key", "ca-cert") for word in (f"--tls-{name}-file", str(CERTIFICATE))]
        own = Server(server_binary, "--tls-port", str(port), *files, "--tls-auth-clients", "no")
    else:
        own = Proxy(server.path, tls=tls_context())  # type: ignore[assignment]
        port = own.port  # type: ignore[attr-defined]
    try:
        it = rig(f"rediss://localhost:{port}?ssl_ca_certs={CERTIFICATE}").connect()
        payload = random.randbytes(8 << 20)
        sent = it.send("SET", "k", payload)
        got = it.send("GET", "k")
        it.turn_until(lambda: got)
        assert sent == [b"OK"]
        assert got == [payload]
    finally:
        own.close()


def test_a_host_with_several_addresses_is_tried_at_each(
    rig: Rigs, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`localhost` is ::1 and 127.0.0.1, and many servers listen on the latter only."""
    look_up = socket.getaddrinfo

    def two(host: str, port: int, *rest: Any, **more: Any) -> Any:
        found = look_up("127.0.0.1", port, *rest, **more)
        return [(*found[0][:4], ("127.0.0.99", port)), *found]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    with Proxy(server.path) as proxy:
        it = rig(f"redis://localhost:{proxy.port}/0")
        it.channel.connect()
        it.turn_until(lambda: it.channel.ready or len(it.downs) > 5)
        assert it.channel.ready, it.downs


def test_the_loop_goes_on_while_a_name_is_looked_up(rig: Rigs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name server that does not answer holds the caller for many seconds; children are to be reaped meanwhile."""
    port = free_port()

    def slow(host: str, port: int, *rest: Any, **more: Any) -> Any:
        end_s = time.monotonic() + PATIENCE_S / 2
        while not (tmp_path / "over").exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    it = rig(f"redis://some.host:{port}/0")
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        it.loop.call_later(0.01, tick)

    it.loop.call_later(0.01, tick)
    it.loop.call_later(0.02, it.channel.connect)
    it.turn_until(lambda: len(ticks) > 30)
    assert it.downs == []
    (tmp_path / "over").touch()
    it.turn_until(lambda: it.downs)


def test_a_user_who_may_not_name_a_connection_can_work(rig: Rigs) -> None:
    """Redis 6.2 does not say which part of CLIENT is not permitted."""

    def reply(words: list[bytes]) -> bytes:
        if words[0] == b"CLIENT":
            return b"-NOPERM this user has no permissions to run the 'client' command or its subcommand\r\n"
        return there.usual(words)

    with Redislike(reply) as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: it.ups or it.downs)
        assert it.downs == []


# -- send and receive -------------------------------------------------------------------------------------------


def test_replies_come_in_order(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    got: list[tuple[int, Any]] = []
    for n in range(5_000):
        it.channel.send_words(("ECHO", n), lambda reply, n=n: got.append((n, reply)))  # type: ignore[misc]
        if n % 700 == 0:
            it.channel.flush()
    it.channel.flush()
    it.turn_until(lambda: len(got) == 5_000)
    assert got == [(n, str(n).encode()) for n in range(5_000)]


def test_nothing_is_written_before_flush(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    got: list[Any] = []
    it.channel.send_words(("SET", "k", "v"), got.append)
    assert not server.client.exists("k")
    it.channel.flush()
    it.turn_until(lambda: got)
    assert server.client.get("k") == b"v"


def test_an_error_is_handed_to_its_callback_only(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    first, second = it.send("NONSENSE"), it.send("PING")
    it.turn_until(lambda: second)
    assert isinstance(first[0], hiredis.ReplyError)
    assert second == [b"PONG"]
    refused = it.call(verbs.claim(KEYS, "nobody", 1))
    assert str(refused).startswith("FENCED")
    assert it.channel.ready


def test_scripts_that_a_server_has_forgotten_are_sent_in_full(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    it.call(verbs.beat(KEYS, "w", 5_000, first=True))
    server.client.script_flush()
    entry = verbs.Entry("q", "a", 0, "", b'{"task":"t"}\n[[],{}]')
    got: list[Any] = []
    it.channel.send(verbs.enqueue(KEYS, [entry]), got.append)
    it.channel.send(verbs.claim(KEYS, "w", 5), got.append)
    it.channel.send_words(("PING",), got.append)
    it.channel.flush()
    it.turn_until(lambda: len(got) == 3)
    assert not any(isinstance(reply, Exception) for reply in got)
    assert server.client.script_exists(verbs.script("enqueue").sha, verbs.script("claim").sha) == [True, True]
    assert server.client.zrange(KEYS.active("w"), 0, -1) == [b"a"]
    assert it.downs == []


def test_big_payloads_both_ways_past_a_slow_reader(rig: Rigs, server: Server) -> None:
    with Proxy(server.path, chunk=1 << 17, pause_s=0.001) as proxy:
        it = rig(proxy.url).connect()
        ticks: list[int] = []

        def tick() -> None:
            ticks.append(1)
            it.loop.call_later(0.005, tick)

        tick()
        payload = random.randbytes(8 << 20)
        replies = [it.send("SET", "k", payload), it.send("GET", "k"), it.send("STRLEN", "k"), it.send("PING")]
        it.turn_until(lambda: replies[-1])
        assert [reply[0] for reply in replies] == [b"OK", payload, 8 << 20, b"PONG"]
        # Writing and reading are never waited for; a turn only takes the time to copy and parse.
        assert len(ticks) > 5
        assert it.downs == []


def test_a_callback_may_send(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    seen: list[int] = []

    def again(reply: Any) -> None:
        seen.append(reply)
        if reply < 200:
            it.channel.send_words(("INCR", "n"), again)
            it.channel.flush()

    it.channel.send_words(("INCR", "n"), again)
    it.channel.flush()
    it.turn_until(lambda: seen and seen[-1] == 200)
    assert seen == list(range(1, 201))


def test_a_callback_may_close(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    after: list[Any] = []
    it.channel.send_words(("PING",), lambda reply: it.channel.close())
    it.channel.send_words(("PING",), after.append)
    it.channel.flush()
    it.turn_until(lambda: not it.channel.ready)
    assert (after, it.downs) == ([], [])


def test_a_callback_of_a_lost_command_may_send_or_close(rig: Rigs, server: Server) -> None:
    with Proxy(server.path) as proxy:
        it = rig(proxy.url).connect()
        got: list[Any] = []
        it.channel.send_words(("BLPOP", "nothing", 0), lambda reply: it.channel.send_words(("PING",), got.append))
        it.channel.flush()
        proxy.cut()
        it.turn_until(lambda: got)
        assert isinstance(got[0], Lost)
        it.turn_until(lambda: it.ups == 2)
        it.channel.send_words(("BLPOP", "nothing", 0), lambda reply: it.channel.close())
        it.channel.flush()
        proxy.cut()
        it.turn_until(lambda: not it.channel.ready)
        accepted = proxy.accepted
        assert it.loop._wait_s() is None or it.loop._wait_s() > 1, "no timer for another try"  # type: ignore[operator]
        assert proxy.accepted == accepted


def test_what_is_sent_while_not_connected_is_lost_at_once(rig: Rigs) -> None:
    it = rig(f"redis://127.0.0.1:{free_port()}/0")
    assert isinstance(it.send("PING")[0], Lost)


def test_nothing_goes_out_before_the_greeting(rig: Rigs) -> None:
    """It would be carried out without the password, or in another database."""
    with Redislike() as there:
        it = rig(f"redis://:pw@127.0.0.1:{there.port}/5")
        it.channel.connect()
        assert not it.channel.ready
        replies = it.send("SET", "k", "v")  # the connection is under way
        it.turn_until(lambda: it.channel.ready)
        it.ask("PING")
        assert isinstance(replies[0], Lost) or [words[0] for words in there.heard].index(b"SET") > 2
        assert [words[0] for words in there.heard[:3]] == [b"AUTH", b"SELECT", b"CLIENT"]


# -- break and come back ----------------------------------------------------------------------------------------


def test_a_server_that_is_killed_and_comes_back(rig: Rigs, own_server: Server) -> None:
    it = rig(own_server.url).connect()
    waiting = [it.send("BLPOP", "nothing", 0), it.send("PING")]
    own_server.kill()
    it.turn_until(lambda: it.downs)
    assert [type(reply[0]) for reply in waiting] == [Lost, Lost]
    assert not it.channel.ready
    own_server.start()
    begun = time.monotonic()
    it.turn_until(lambda: it.ups == 2)
    assert time.monotonic() - begun < 1 + SLACK_S, "pauses take a second at most"
    assert it.ask("PING") == b"PONG"
    assert [type(reply[0]) for reply in waiting] == [Lost, Lost]
    assert all(len(reply) == 1 for reply in waiting), "told once"


def test_a_server_that_is_killed_while_a_big_command_is_being_written(rig: Rigs, own_server: Server) -> None:
    it = rig(own_server.url).connect()
    own_server.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
    sent = [it.send("SET", "k", bytes(16 << 20)), it.send("PING")]
    own_server.kill()
    it.turn_until(lambda: it.downs)
    assert [type(reply[0]) for reply in sent] == [Lost, Lost]
    own_server.start()
    it.turn_until(lambda: it.ups == 2)
    assert it.ask("PING") == b"PONG"


def test_a_server_that_hangs(rig: Rigs, own_server: Server) -> None:
    it = rig(own_server.url).connect()
    own_server.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
    begun = time.monotonic()
    replies = it.send("PING", limit_s=0.3)
    it.turn_until(lambda: replies)
    assert isinstance(replies[0], Lost)
    assert "does not answer in time" in it.downs[0]
    assert 0.3 <= time.monotonic() - begun < SLACK_S, "the limit is that of the command, not of an older one"
    own_server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    it.turn_until(lambda: it.ups == 2)
    assert it.ask("PING") == b"PONG"


def test_a_server_that_accepts_and_says_nothing(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_LIMIT_S", 0.1)
    with Listener() as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 3)
        assert "does not answer in time" in it.downs[0]
        assert it.ups == 0


def test_a_connection_that_is_cut_in_the_middle_of_a_reply(rig: Rigs, server: Server) -> None:
    server.client.set("big", bytes(1 << 20))
    with Proxy(server.path) as proxy:
        it = rig(proxy.url).connect()
        proxy.lose(b"GET", keep=10_000)
        before, replies, after = it.send("PING"), it.send("GET", "big"), it.send("PING")
        it.turn_until(lambda: it.ups == 2)
        assert isinstance(replies[0], Lost)
        assert isinstance(after[0], Lost)
        assert len(before) == 1
        assert len(it.ask("GET", "big")) == 1 << 20


def test_replies_that_come_with_the_end_of_the_connection_are_handed_out(rig: Rigs) -> None:
    def reply(words: list[bytes]) -> bytes | None:
        if words[0] == b"QUIT":
            return None
        return b"$40000\r\n" + bytes(40_000) + b"\r\n" if words[0] == b"GET" else there.usual(words)

    with Redislike(reply) as there:
        it = rig(there.url).connect()
        got: list[Any] = []
        it.channel.send_words(("GET", "k"), got.append)
        it.channel.send_words(("QUIT",), got.append)
        it.channel.flush()
        it.loop.forget(it.channel._socket.fileno())  # type: ignore[union-attr]  # until both have come
        fd = it.channel._socket.fileno()  # type: ignore[union-attr]
        it.turn_until(lambda: there.open == [])
        it.loop.on_read(fd, it.channel._readable)
        it.turn_until(lambda: len(got) == 2)
        assert got[0] == bytes(40_000)
        assert isinstance(got[1], Lost)


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02", b"+OK\r\n" * 99, b"$5\r\nabc", b"*1\r\n$-7\r\n"],
    ids=["http", "tls", "too many replies", "half a reply", "nonsense"],
)
def test_something_that_is_not_a_redis(rig: Rigs, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONNECT_LIMIT_S", 0.2)
    with Says(said) as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 3)
        assert all(line.startswith(f"the broker {there.url} ") for line in it.downs)
        assert not any("\n" in line for line in it.downs)
        if b"HTTP" in said:
            assert "does not speak Redis's protocol" in it.downs[0]


def test_garbage_in_the_middle_of_work(rig: Rigs) -> None:
    def reply(words: list[bytes]) -> bytes | None:
        return b"\x00\xff garbage\r\n" if words[0] == b"GET" else there.usual(words)

    with Redislike(reply) as there:
        it = rig(there.url).connect()
        replies = it.send("GET", "k")
        it.turn_until(lambda: it.ups == 2)
        assert isinstance(replies[0], Lost)
        assert it.ask("PING") == b"PONG"


def test_a_refused_connection_is_tried_again_with_pauses_of_a_second_at_most(rig: Rigs) -> None:
    loop = QuickLoop()
    port = free_port()
    it = rig(f"redis://127.0.0.1:{port}/0", loop)
    it.channel.connect()
    it.turn_until(lambda: len(it.downs) >= 12)
    assert set(it.downs) == {f"the broker redis://127.0.0.1:{port}/0 refuses the connection; is it running there?"}
    pauses = loop.pauses_s
    assert len(pauses) == len(it.downs)
    longest = [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]
    assert all(0.5 * most <= pause <= most for pause, most in zip(pauses, longest, strict=False))
    assert max(pauses) <= 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:wrong@{}/0", "refuses the password"),
        ("redis://bob:wrong@{}/0", "refuses the password"),
        ("redis://{}/0?password=wrong", "refuses the password"),
        ("redis://{}/0", "asks for a password"),
        ("redis://:hunter2@{}/9999", "has no such database"),
    ],
)
def test_a_server_that_refuses_is_named_without_the_password(
    rig: Rigs, tcp_server: Server, url: str, said: str
) -> None:
    loop = QuickLoop()
    it = rig(url.format(tcp_server.url), loop)
    it.channel.connect()
    it.turn_until(lambda: len(it.downs) >= 3)
    assert all(said in line for line in it.downs)
    assert all(f"{tcp_server.url}/" in line for line in it.downs)
    assert not any("wrong@" in line or "password=" in line or "hunter2" in line for line in it.downs)
    assert len(loop.pauses_s) == len(it.downs), "one next try for each that has failed"


@pytest.mark.parametrize(
    "refusal",
    [b"-LOADING Redis is loading the dataset in memory\r\n", b"-ERR max number of clients reached\r\n", None],
    ids=["loading", "too many clients", "closes"],
)
def test_a_server_that_breaks_off_the_greeting_is_greeted_again_on_one_connection(
    rig: Rigs, refusal: bytes | None
) -> None:
    """As after its restart, while it loads its data."""
    ready = False

    def reply(words: list[bytes]) -> bytes | None:
        return there.usual(words) if ready else refusal

    with Redislike(reply) as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 4)
        tries, ready = there.accepted, True
        it.turn_until(lambda: it.channel.ready)
        assert it.ask("ECHO", "it") == b"OK"
        assert [it.ask("PING") for _ in range(5)] == [b"PONG"] * 5
        assert it.ups == 1
        assert len(it.downs) <= there.accepted <= len(it.downs) + 1, "one try, one report"
        assert tries <= there.accepted <= tries + 2
        it.turn_until(lambda: len(there.open) == 1)
        assert not it.channel._expected


def test_a_broken_connection_is_reported_once(rig: Rigs, server: Server) -> None:
    with Proxy(server.path) as proxy:
        it = rig(proxy.url).connect()
        for n in range(5):
            proxy.cut()
            it.turn_until(lambda n=n: it.ups == n + 2)
        assert len(it.downs) == 5
        assert it.downs[0] == (
            f"the broker {proxy.url} closed the connection; is it a Redis, and what does its log say?"
        )


def test_no_descriptor_is_lost_in_many_reconnects(rig: Rigs, server: Server) -> None:
    with Proxy(server.path) as proxy:
        it = rig(proxy.url, QuickLoop()).connect()
        quiet = partial(len, proxy.open)
        it.turn_until(lambda: quiet() == 1)
        before = None
        for n in range(50):
            proxy.cut()
            it.turn_until(lambda n=n: it.ups == n + 2 and quiet() == 1)
            if n == 2:
                before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        assert before is not None
        it.turn_until(lambda: not os.path.isdir("/proc/self/fd") or len(os.listdir("/proc/self/fd")) <= before + 2)
        assert len(it.loop._selector.get_map()) == 1


def test_no_descriptor_is_lost_by_refusals(rig: Rigs, tcp_server: Server) -> None:
    it = rig(f"redis://:wrong@{tcp_server.url}/0", QuickLoop())
    it.channel.connect()
    it.turn_until(lambda: len(it.downs) >= 3)
    counted = partial(lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)
    before = counted()
    it.turn_until(lambda: len(it.downs) >= 40)
    assert counted() <= before + 2


def test_close_ends_it_for_good(rig: Rigs, server: Server) -> None:
    with Proxy(server.path) as proxy:
        it = rig(proxy.url).connect()
        lost = it.send("BLPOP", "nothing", 0)
        it.channel.close()
        it.turn_until(lambda: proxy.open == [])
        assert (it.channel.ready, it.downs, lost) == (False, [], [])
        assert isinstance(it.send("PING")[0], Lost)
        assert proxy.accepted == 1


def test_close_while_connecting(rig: Rigs) -> None:
    with Listener() as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: there.accepted == 1)
        it.channel.close()
        it.turn_until(lambda: there.open == [])
        assert (it.ups, it.downs, there.accepted) == (0, [], 1)
        assert not it.loop._selector.get_map()


def test_a_forked_child_that_abandons_it_leaves_the_connection_alone(rig: Rigs, server: Server) -> None:
    it = rig(server.url).connect()
    waiting = it.send("BLPOP", "something", 0)
    pid = os.fork()
    if not pid:
        it.channel.abandon()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    server.client.lpush("something", "v")
    it.turn_until(lambda: waiting)
    assert waiting == [[b"something", b"v"]]
    assert it.ask("PING") == b"PONG"
    assert it.downs == []


def hanging(*_: Any, **__: Any) -> Any:
    """A name server that does not answer, seen from `getaddrinfo`."""
    time.sleep(PATIENCE_S)


def test_a_lookup_that_hangs_holds_nothing_that_is_open_here(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipes of children among it: were it to hold those, they would not see the end of a master that dies."""
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    reads, writes = os.pipe()
    it = rig("redis://some.host:6379/0")
    it.channel.connect()
    os.close(writes)
    ended: list[bytes] = []
    it.loop.on_read(reads, lambda: ended.append(os.read(reads, 1)))
    it.turn_until(lambda: ended, 5)
    it.loop.forget(reads)
    os.close(reads)
    assert ended[0] == b""


def test_a_lookup_that_hangs_ends_with_the_channel(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    before = {child.pid for child in psutil.Process().children()}
    it = rig("redis://some.host:6379/0")
    it.channel.connect()
    started = {child.pid for child in psutil.Process().children()} - before
    it.channel.close()

    def gone() -> bool:
        return all(
            child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children() if child.pid in started
        )

    until(gone, 5, "the process that looked the name up is gone")
