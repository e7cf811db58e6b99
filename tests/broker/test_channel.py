"""The channel on the master's own loop, against real servers and against listeners that misbehave."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from typing import Any

import hiredis
import pytest

from prefork.broker import channel as channel_module
from prefork.broker import dial, verbs
from prefork.broker.channel import Lost
from prefork.broker.keys import Keys
from tests.broker.rig import QuickLoop, Rigs
from tests.broker.wires import Proxy, Redislike, Says, free_port
from tests.conftest import SLACK_S, Server

KEYS = Keys("t", "q")


# -- connect and greet ------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(dial, "CONNECT_LIMIT_S", 0.2)
    with Says(said) as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 3)
        assert all(line.startswith(f"the broker {there.url} ") for line in it.downs)
        assert not any("\n" in line for line in it.downs)
        if b"HTTP" in said:
            it.turn_until(lambda: any("does not speak Redis's protocol" in line for line in it.downs))


def test_garbage_in_the_middle_of_work(rig: Rigs) -> None:
    def reply(words: list[bytes]) -> bytes | None:
        return b"\x00\xff garbage\r\n" if words[0] == b"GET" else there.usual(words)

    with Redislike(reply) as there:
        it = rig(there.url).connect()
        replies = it.send("GET", "k")
        it.turn_until(lambda: it.ups == 2)
        assert isinstance(replies[0], Lost)
        assert it.ask("PING") == b"PONG"


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
        quiet = partial(len, proxy.open)  # the list itself, which is changed in place
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
