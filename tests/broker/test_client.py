"""The blocking client: what it says when the broker can't be used, how long it takes, and that it accepts once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from prefork import Prefork
from prefork.broker import address, lookup, verbs
from prefork.broker.caller import GIVE_UP_S
from prefork.broker.client import Client
from prefork.errors import BrokerError, EnqueueUncertain, NotJSON
from tests.broker.bench import DAY_MS, PAYLOAD, Bench
from tests.broker.wires import Listener, Proxy, Redislike, Says, free_port
from tests.conftest import PATIENCE_S, SLACK_S, Server, until

LIMIT_S = 0.6
ENQUEUE, CANCEL = (verbs.script(name).sha.encode() for name in ("enqueue", "cancel"))


def entry(id: str = "a") -> verbs.Entry:
    return verbs.Entry("q", id, 0, "", PAYLOAD)


def said_by(url: str, limit_s: float = LIMIT_S, *, uncertain: bool = False) -> str:
    """What an enqueue says that can't succeed; within its limit, in one line, without a password."""
    begun = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        Client(url, "t", limit_s).enqueue("q", [entry()])
    assert time.monotonic() - begun < limit_s + SLACK_S
    said = str(caught.value)
    assert type(caught.value) is (EnqueueUncertain if uncertain else BrokerError), said
    assert "\n" not in said
    assert "secret" not in said
    assert caught.value.__suppress_context__ or not caught.value.__context__, "its traceback shows what the server said"
    return said


@pytest.fixture(scope="module")
def locked(server_binary: str) -> Iterator[Server]:
    """A server on a TCP port, with a password, and users who may do less."""
    port = free_port()
    server = Server(server_binary, "--port", str(port), "--bind", "127.0.0.1")
    for words in (
        "bob on >s:ecret@/% ~* &* +@all",
        "reader on >secret ~* &* +@read +info +client +select",
        "nameless on >secret ~* &* +@all -client",
        "uninformed on >secret ~* &* +@all -info",
        "stranger on >secret ~other:* &* +@all",
    ):
        server.client.execute_command("ACL", "SETUSER", *words.split())
    server.client.config_set("requirepass", "secret")
    server.client.execute_command("AUTH", "secret")
    server.url = f"127.0.0.1:{port}"
    yield server
    server.close()


# -- a broker that can't be used --------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    assert said_by(url) == f"the broker {url} refuses the connection; is it running there?"


def test_no_such_socket(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s"
    assert said_by(url) == f"the broker {url} has no socket there; is it running, and is this its path?"


def test_a_path_that_looks_like_an_error(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/READONLY-ROOM-BUSY/s"
    assert said_by(url) == f"the broker {url} has no socket there; is it running, and is this its path?"


def test_somebody_listens_but_never_answers() -> None:
    with Listener() as there:
        assert said_by(there.url, 20 * LIMIT_S) == (
            f"the broker {there.url} does not answer in time; is it a Redis, and is the network open?"
        )
        assert there.accepted >= 2, "a second try fits into the limit"


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (socket.EAI_NONAME, "Name or service not known", "is on a host whose name is not known; check the broker URL"),
        (socket.EAI_AGAIN, "Temporary failure in name resolution",
         "is on a host whose name cannot be looked up now; check the broker URL and the DNS"),
    ],
)  # fmt: skip
def test_an_unknown_host(code: int, text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(code, text)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert said_by("redis://:secret@no.such.host:6379/0") == f"the broker redis://no.such.host:6379/0 {said}"


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> Any:
        time.sleep(LIMIT_S + SLACK_S + 0.5)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert "some.host" in said_by("redis://some.host:6379/0")


@pytest.mark.parametrize(
    ("userinfo", "said"),
    [
        (":wrong@", "refuses the password; check user and password in the broker URL"),
        ("bob:wrong@", "refuses the password; check user and password in the broker URL"),
        ("nobody:secret@", "refuses the password; check user and password in the broker URL"),
        ("", "asks for a password; put it into the broker URL: redis://:password@host:6379/0"),
    ],
)
def test_a_password_that_is_wrong_or_missing(locked: Server, userinfo: str, said: str) -> None:
    shown = (userinfo.partition(":")[0] + "@").lstrip("@") + locked.url
    begun = time.monotonic()
    assert said_by(f"redis://{userinfo}{locked.url}/0", PATIENCE_S) == f"the broker redis://{shown}/0 {said}"
    assert time.monotonic() - begun < PATIENCE_S, "nothing to wait for"


def test_a_password_that_nobody_asked_for(server: Server) -> None:
    said = said_by(f"unix://:secret@{server.path}", PATIENCE_S)
    assert said in (
        f"the broker unix://{server.path} has no password set; take it out of the broker URL",
        f"the broker unix://{server.path} refuses the password; check user and password in the broker URL",
    )


@pytest.mark.parametrize("user", ["reader", "stranger"])
def test_a_user_who_may_not_do_what_is_needed(locked: Server, user: str) -> None:
    said = said_by(f"redis://{user}:secret@{locked.url}/0", PATIENCE_S)
    assert said.startswith(f"the broker redis://{user}@{locked.url}/0 does not permit this user what prefork needs (")
    assert said.endswith("); extend its ACL")


@pytest.mark.parametrize("user", ["nameless", "uninformed"])
def test_a_user_who_may_not_do_what_is_not_needed(locked: Server, user: str) -> None:
    client = Client(f"redis://{user}:secret@{locked.url}/0", "t", PATIENCE_S)
    assert client.enqueue("q", [entry(user)])


def test_a_web_server() -> None:
    with Says(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", then_close=True) as there:
        assert said_by(there.url, PATIENCE_S) == (
            f"the broker {there.url} does not speak Redis's protocol; check host and port in the broker URL"
        )


def test_a_server_that_repeats_the_password_in_its_error() -> None:
    """As proxies do that do not know AUTH: "unknown command 'AUTH', with args beginning with: …"."""

    def reply(words: list[bytes]) -> bytes:
        return b"-ERR unknown command 'AUTH', with args beginning with: '" + words[-1] + b"'\r\n"

    with Redislike(reply) as there:
        assert f"127.0.0.1:{there.port}" in said_by(f"redis://:secret@127.0.0.1:{there.port}/0", PATIENCE_S)


def test_a_read_only_replica(server_binary: str) -> None:
    replica = Server(server_binary, "--replicaof", "127.0.0.1", "1")
    try:
        assert said_by(replica.url) == (
            f"the broker {replica.url} is a read-only replica; name the primary in the broker URL"
        )
    finally:
        replica.close()


def test_a_server_that_is_too_old() -> None:
    with Redislike(version="5.0.7") as there:
        assert said_by(there.url, PATIENCE_S) == (
            f"the broker {there.url} is redis 5.0.7; prefork needs Redis 6.2 or newer, or Valkey"
        )
        assert [b"SADD"] not in [words[:1] for words in there.heard]


def test_a_database_that_is_not_there(locked: Server) -> None:
    said = said_by(f"redis://:secret@{locked.url}/9999", PATIENCE_S)
    assert said.startswith(f"the broker redis://{locked.url}/9999 has no such database (")
    assert said.endswith("); check the number at the end of the broker URL")


@pytest.mark.parametrize("announced", [False, True], ids=["first call", "later call"])
def test_a_server_that_is_out_of_memory(own_server: Server, announced: bool) -> None:
    client = Client(own_server.url, "t", 5.0)
    if announced:
        client.enqueue("q", [entry("before")])
    own_server.client.config_set("maxmemory-policy", "noeviction")
    own_server.client.config_set("maxmemory", 1)
    with pytest.raises(BrokerError) as caught:
        client.enqueue("q", [entry()])
    assert type(caught.value) is BrokerError
    assert str(caught.value) == (
        f"the broker {own_server.url} is out of memory and refuses writes; "
        "raise its maxmemory, or empty what is not needed"
    )
    own_server.client.config_set("maxmemory", 0)
    assert Bench(own_server.client).client.hlen("t:{q}:m") == announced


def test_a_server_that_hangs_and_goes_on(own_server: Server) -> None:
    client = Client(own_server.url, "t", 5.0)
    client.enqueue("q", [entry("before")])
    own_server.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
    begun = time.monotonic()
    with pytest.raises(EnqueueUncertain, match=r"^the broker unix://\S+ does not answer in time; .* \(the task may"):
        client.enqueue("q", [entry("between")])
    assert time.monotonic() - begun < 5.0 + SLACK_S
    own_server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    client.enqueue("q", [entry("after")])
    assert Bench(own_server.client).client.lrange("t:{q}:pending", -1, -1) == [b"after"]


FORMS = "write redis://host:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock or embedded:./var/prefork"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", f"the broker URL  has no scheme; {FORMS}"),
        ("localhost", f"the broker URL localhost has no scheme; {FORMS}"),
        ("localhost:6379", f"the broker URL localhost:6379 has the scheme 'localhost'; {FORMS}"),
        ("http://u:secret@host/", f"the broker URL http://u@host/ has the scheme 'http'; {FORMS}"),
        ("amqp://guest:secret@host//", None),
        ("redis://host:port/0", None),
        (
            "redis://host:99999/0",
            f"the broker URL redis://host:99999/0 cannot be read (Port out of range 0-65535); {FORMS}",
        ),
        ("redis://host/x", "the broker URL redis://host/x names the database 'x'; databases are numbers"),
        ("redis://host/0/1", "the broker URL redis://host/0/1 names the database '0/1'; databases are numbers"),
        ("redis://host/-1", "the broker URL redis://host/-1 names the database '-1'; databases are numbers"),
        ("redis://host?db=x", None),
        ("redis://:secret@[::1/0", "the broker URL redis://[::1/0 cannot be read (Invalid IPv6 URL); " + FORMS),
        ("redis:/host", None),
        ("unix:/no/slashes", None),
        ("rediss://127.0.0.1:1/0?ssl_cert_reqs=sometimes", None),
        (
            "redis://127.0.0.1:1/0?concurency=3",
            "the broker URL redis://127.0.0.1:1/0 has an option that cannot be used: concurency",
        ),
        (
            "rediss://127.0.0.1:1/0?ssl_ciphers=all",
            "the broker URL rediss://127.0.0.1:1/0 has an option that cannot be used: ssl_ciphers",
        ),
        ("redis://127.0.0.1:1/0?ssl_ca_certs=/ca.pem", None),
        ("unix://?db=1", None),
    ],
)
def test_a_url_that_is_none(url: str, said: str | None) -> None:
    begun = time.monotonic()
    heard = said_by(url, PATIENCE_S)
    assert time.monotonic() - begun < PATIENCE_S, "there is nothing to try again"
    assert heard.startswith("the broker")
    assert said is None or heard == said


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@127.0.0.1:1/0",
        "redis://bob:secret@127.0.0.1:1/0",
        "redis://bob:%73ecret%40%2F@127.0.0.1:1/0",
        "redis://:secret@secret@127.0.0.1:1/0",
        "redis://:secret/secret@127.0.0.1:1/0",
        "redis://:secret?secret@127.0.0.1:1/0",
        "redis://:secret#secret@127.0.0.1:1/0",
        "redis://:secret:secret@127.0.0.1:1/0",
        "redis://:secret@127.0.0.1:1/0?password=me@secret",
        "redis://:[secret@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=secret",
        "redis://127.0.0.1:1?password=secret",
        "redis://127.0.0.1:1/0?password=me@secret",
        "redis://127.0.0.1:1/0?db=1&username=bob&password=secret",
        "redis://127.0.0.1:1/0?password=secret&db=secret",
        "rediss://127.0.0.1:1/0?ssl_password=secret",
        "rediss://:secret@127.0.0.1:1/0?ssl_ca_certs=/nowhere",
        "unix://bob:secret@/nowhere/s",
        "unix://:secret@/nowhere/s?db=3",
        "unix:///nowhere/s?password=secret",
        "unix:///nowhere/s?db=x&password=secret",
        "unix://?password=secret",
        "unix:/nowhere/s?password=secret",
        "redis:secret@127.0.0.1:1",
        "secret@127.0.0.1:1/0",
        "bob:secret@127.0.0.1:1/0",
        ":secret@127.0.0.1:1/0",
        "//:secret@127.0.0.1:1/0",
        "http://:secret/secret@127.0.0.1:1/0",
    ],
)
def test_the_password_is_never_said(url: str) -> None:
    said_by(url, 0.3)
    assert "secret" not in address.shown(url)
    assert "secret" not in Client(url, "t").shown


@pytest.mark.parametrize("limit_s", [0.1, 0.2, 0.3])
def test_the_shortest_limits_work(server: Server, limit_s: float) -> None:
    app = Prefork("t", broker=server.url, limit_s=limit_s)

    def accepted() -> bool:
        try:
            return bool(app.client.enqueue("q", [entry()]))
        except BrokerError:
            return False  # a machine that is busy with something else takes longer, now and then

    until(accepted)
    app.client.close()


@pytest.mark.parametrize(
    "query", ["decode_responses=true", "protocol=3", "socket_timeout=2", "health_check_interval=5", "client_name=me"]
)
def test_options_of_redis_py_in_the_url_do_no_harm(server: Server, query: str) -> None:
    client = Client(f"{server.url}?{query}", "t", 5.0)
    client.enqueue("q", [entry()])
    assert client.queues() == ["q"]
    assert client.inspect("q", "a")[0] == "pending"
    assert client.inspect("q", "a")[1].endswith(PAYLOAD)
    assert client.cancel("q", "a", 0, {"errors": []}) == "cancelled"
    assert client.ping_ms() >= 0
    client.close()


def slowest_of_eight_threads(url: str) -> float:
    """How long the slowest of eight calls takes that begin at once and can't succeed."""
    client = Client(url, "t", LIMIT_S)
    took_s: list[float] = []

    def ask() -> None:
        begun = time.monotonic()
        with pytest.raises(BrokerError):
            client.enqueue("q", [entry()])
        took_s.append(time.monotonic() - begun)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(took_s) == 8
    return max(took_s)


def test_threads_that_ask_at_once_do_not_wait_for_each_others_limits() -> None:
    with Listener() as there:
        assert slowest_of_eight_threads(there.url) < LIMIT_S + SLACK_S


def test_threads_do_not_wait_for_each_others_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> Any:
        time.sleep(LIMIT_S + SLACK_S)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert slowest_of_eight_threads("redis://some.host:6379/0") < LIMIT_S + SLACK_S


# -- accepted once ----------------------------------------------------------------------------------------------


def test_a_server_that_is_restarted_within_the_limit(own_server: Server) -> None:
    client = Client(own_server.url, "t", 10.0)
    client.enqueue("q", [entry("before")])
    own_server.kill()
    accepted: list[int] = []
    thread = threading.Thread(target=lambda: accepted.append(client.enqueue("q", [entry("during")])), daemon=True)
    thread.start()
    own_server.start()
    thread.join(PATIENCE_S)
    assert accepted
    assert own_server.client.lrange("t:{q}:pending", 0, -1) == [b"before", b"during"]


def test_a_first_call_to_a_server_that_is_about_to_start(own_server: Server) -> None:
    own_server.kill()
    client = Client(own_server.url, "t", 10.0)
    accepted: list[int] = []
    thread = threading.Thread(target=lambda: accepted.append(client.enqueue("q", [entry()])), daemon=True)
    thread.start()
    own_server.start()
    thread.join(PATIENCE_S)
    assert accepted
    assert own_server.client.lrange("t:{q}:pending", 0, -1) == [b"a"]
    assert own_server.client.smembers("t:queues") == {b"q"}


@pytest.mark.parametrize("first", [False, True], ids=["later call", "first call"])
@pytest.mark.parametrize("keep", [0, 4], ids=["no reply", "half a reply"])
@pytest.mark.parametrize("ids", ["a", "ab"])
def test_a_reply_that_is_lost_after_acceptance(server: Server, first: bool, keep: int, ids: str) -> None:
    with Proxy(server.path) as proxy:
        client = Client(proxy.url, "t", 5.0)
        if not first:
            client.enqueue("q", [entry("before")])
        proxy.lose(ENQUEUE, keep=keep)
        assert client.enqueue("q", [entry(id) for id in ids])
        assert proxy.lost == 1
        accepted = [b"before"] * (not first) + [id.encode() for id in ids]
        assert server.client.lrange("t:{q}:pending", 0, -1) == accepted
        client.close()


@pytest.mark.parametrize("before", ["q", "other"], ids=["later call", "first call"])
def test_a_reply_that_is_lost_and_a_task_that_is_done_before_it_is_asked_for_again(server: Server, before: str) -> None:
    bench = Bench(server.client)
    bench.lease("w")
    done: list[str] = []

    def work() -> None:
        done.extend(bench.claim("w", 9).ids)
        bench.settle("w", ("done", "a", DAY_MS, b"{}"))

    with Proxy(server.path) as proxy:
        client = Client(proxy.url, "t", 5.0)
        client.enqueue(before, [verbs.Entry(before, "x", 0, "", PAYLOAD)])
        proxy.lose(ENQUEUE, then=work)
        client.enqueue("q", [entry()])
        assert done[-1:] == ["a"]
        assert bench.claim("w", 1).ids == [], "it would run a second time"


def test_a_cancel_whose_reply_is_lost_has_cancelled(server: Server) -> None:
    with Proxy(server.path) as proxy:
        client = Client(proxy.url, "t", 5.0)
        client.enqueue("q", [entry("a")])
        proxy.lose(CANCEL)
        assert client.cancel("q", "a", DAY_MS, {"errors": []}) == "cancelled"
        assert proxy.lost == 1
        assert client.cancel("q", "a", DAY_MS, {"errors": []}) == "finished"
        client.close()


@pytest.mark.parametrize("said", [b"+OK\r\n", b":1\r\n", b"*1\r\n:5\r\n", b"$-1\r\n", b"*2\r\n:5\r\n$1\r\nx\r\n", b"?"])
def test_a_reply_that_is_damaged(said: bytes) -> None:
    def reply(words: list[bytes]) -> bytes:
        if words[0] == b"EVALSHA":
            asked.append(words)
        return said if len(asked) == 2 and words[0] == b"EVALSHA" else there.usual(words)

    asked: list[list[bytes]] = []
    with Redislike(reply) as there:
        client = Client(there.url, "t", 5.0)
        assert [client.enqueue("q", [entry(id)]) for id in "abc"] == [1, 1, 1]
        assert [words[-4] for words in asked] == [b"a", b"b", b"b", b"c"]
        assert [words[-7] for words in asked] == [b"", b"", b"t:{q}:r:", b""], "the repeat says that it may be one"
        client.close()


def test_a_connection_that_its_server_has_closed_meanwhile(server: Server) -> None:
    client = Client(server.url, "t", 5.0)
    client.enqueue("q", [entry("a")])
    server.client.client_kill_filter(_type="normal", skipme=True)
    client.enqueue("q", [entry("b")])
    assert server.client.lrange("t:{q}:pending", 0, -1) == [b"a", b"b"]
    assert len(client.wire()._idle) == 1, "the old one is closed"
    client.close()


def test_connections_that_were_cut_in_silence_are_not_tried_one_after_the_other() -> None:
    """As what stands in between forgets them when they are idle: neither an end nor a reset is ever seen."""
    threads, cut = set[threading.Thread](), set[threading.Thread]()

    def reply(words: list[bytes]) -> bytes:
        threads.add(threading.current_thread())  # one for each connection
        return b"" if threading.current_thread() in cut else it.usual(words)

    with Redislike(reply) as it:
        client = Client(it.url, "t", 12.0)
        client.enqueue("q", [entry("a")])
        wire = client.wire()
        for connection in [wire.connect() for _ in range(4)]:
            connection.send(("PING",))
            connection.reply()
            wire._idle.append(connection)
        cut |= threads
        client.enqueue("q", [entry("b")])
        assert client.ping_ms() < 1000 * SLACK_S
        client.close()


def test_a_name_is_looked_up_also_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that ends, or that has as many as it may have."""

    class Refused:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(lookup, "threading", SimpleNamespace(Thread=Refused))
    with Redislike() as it:
        client = Client(f"redis://localhost:{it.port}/0", "t", 5.0)
        client.enqueue("q", [entry("a")])
        client.close()


def test_a_handler_of_a_signal_may_enqueue_while_a_connection_is_made(server: Server) -> None:
    client = Client(server.url, "t", 5.0)
    ended: list[int] = []

    def handle() -> None:
        with client._lock:  # as where it is interrupted
            ended.append(client.enqueue("q", [entry("a")]))

    thread = threading.Thread(target=handle, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert ended
    client.close()


def test_a_short_way_that_times_out_leaves_the_rest_of_the_limit(own_server: Server) -> None:
    client = Client(own_server.url, "t", 2.0)
    client.enqueue("q", [entry("a")])
    own_server.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
    begun = time.monotonic()
    with pytest.raises(EnqueueUncertain, match="does not answer in time"):
        client.enqueue("q", [entry("b")])
    took_s = time.monotonic() - begun
    own_server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
    assert 1.0 < took_s < 2.0 + SLACK_S
    client.limit_s = 20.0
    until(lambda: client.enqueue("q", [entry("b")]))
    assert own_server.client.lrange("t:{q}:pending", 0, -1) == [b"a", b"b"]


def test_what_may_have_got_through_is_uncertain_although_another_call_has_failed_meanwhile(server: Server) -> None:
    with Proxy(server.path) as proxy:
        client = Client(proxy.url, "t", 5.0)
        client.enqueue("q", [entry("a")])

        def others() -> None:
            client._failure = BrokerError("of another thread")
            proxy.refuse()

        proxy.lose(ENQUEUE, then=others)
        token = GIVE_UP_S.set(time.monotonic())
        with pytest.raises(EnqueueUncertain, match="may have been accepted"):
            client.enqueue("q", [entry("b")])
        GIVE_UP_S.reset(token)
        until(lambda: server.client.lrange("t:{q}:pending", 0, -1) == [b"a", b"b"])


def test_replies_that_are_lost_until_the_limit(server: Server) -> None:
    with Proxy(server.path) as proxy:
        proxy.lose(ENQUEUE, 1000)
        said = said_by(proxy.url, 5.0, uncertain=True)
        assert said == (
            f"the broker {proxy.url} closed the connection; is it a Redis, and what does its log say? "
            f"(the task may have been accepted)"
        )
        assert server.client.lrange("t:{q}:pending", 0, -1) == [b"a"]


def test_a_reply_that_is_lost_and_then_nobody_listens(server: Server) -> None:
    """It was accepted, and the last thing that was heard is that nobody is there."""
    proxy = Proxy(server.path)
    client = Client(proxy.url, "t", 5.0)
    client.enqueue("q", [entry("before")])
    client.limit_s = LIMIT_S
    proxy.lose(ENQUEUE, then=proxy.refuse)
    try:
        with pytest.raises(EnqueueUncertain, match="may have been accepted"):
            client.enqueue("q", [entry()])
    finally:
        proxy.close()
    assert server.client.lrange("t:{q}:pending", 0, -1) == [b"before", b"a"]


def test_a_reply_that_is_lost_and_then_a_refusal() -> None:
    """As when a primary dies, and its replica answers in its place."""

    def reply(words: list[bytes]) -> bytes | None:
        if words[0] != b"EVALSHA":
            return there.usual(words)
        asked.append(words)
        return None if len(asked) == 1 else b"-READONLY You can't write against a read only replica.\r\n"

    asked: list[Any] = []
    with Redislike(reply) as there:
        said_by(there.url, 5.0, uncertain=True)


@pytest.mark.parametrize(
    "said", [b"-LOADING Redis is loading the dataset in memory\r\n", b"-ERR max number of clients reached\r\n"]
)
def test_a_refusal_until_the_limit_is_certain(said: bytes) -> None:
    def reply(words: list[bytes]) -> bytes:
        return said if words[0] == b"EVALSHA" else there.usual(words)

    def refused() -> type[Exception]:
        with pytest.raises(BrokerError) as caught:
            Client(there.url, "t", 5.0).enqueue("q", [entry()])
        return caught.type

    with Redislike(reply) as there:  # on a busy machine the last try may be too late to be told
        until(lambda: refused() is BrokerError)


def test_a_last_try_that_was_cut_off_says_what_was_heard_before() -> None:
    def reply(words: list[bytes]) -> bytes:
        if words[0] != b"EVALSHA":
            return there.usual(words)
        return b"-LOADING Redis is loading the dataset in memory\r\n" if time.monotonic() < silent_s else b""

    with Redislike(reply) as there:
        client = Client(there.url, "t", 2.0)
        client.wire()
        silent_s = time.monotonic() + 1.2
        with pytest.raises(BrokerError, match="is still loading"):
            client.enqueue("q", [entry()])


def test_a_server_that_is_loading_is_waited_for() -> None:
    def reply(words: list[bytes]) -> bytes:
        heard.append(words[0])
        loading = heard.count(words[0]) < 3
        return b"-LOADING Redis is loading the dataset in memory\r\n" if loading else there.usual(words)

    heard: list[bytes] = []
    with Redislike(reply) as there:
        assert Client(there.url, "t", 5.0).enqueue("q", [entry()]) == 1


def test_scripts_that_a_server_has_forgotten(server: Server) -> None:
    client = Client(server.url, "t", 5.0)
    client.enqueue("q", [entry("a")])
    server.client.script_flush()
    client.enqueue("q", [entry("b")])
    assert server.client.lrange("t:{q}:pending", 0, -1) == [b"a", b"b"]
    client.close()


# -- threads, forks, asyncio ------------------------------------------------------------------------------------


@pytest.fixture
def app(server: Server) -> Iterator[Prefork]:
    app = Prefork("t", broker=server.url, prefix="t")
    app.task(lambda n, text="": n, name="echo")
    yield app
    app.client.close()


def queued(server: Server, queue: str = "default") -> list[bytes]:
    found: list[bytes] = server.client.lrange(f"t:{{{queue}}}:pending", 0, -1)
    return found


def test_many_threads(app: Prefork, server: Server) -> None:
    results: list[Any] = []
    barrier = threading.Barrier(20)

    def produce() -> None:
        barrier.wait(PATIENCE_S)
        for n in range(25):
            results.append(app.tasks["echo"].enqueue(n))

    threads = [threading.Thread(target=produce, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(results) == 500
    assert sorted(result.id.encode() for result in results) == sorted(queued(server))


def in_child(work: Callable[[], Any]) -> None:
    """Do it in a forked child, which must not hang or fail."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    end = time.monotonic() + 10
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    assert ended[1] == 0, "the child failed"


def test_a_forked_child_has_a_connection_of_its_own(app: Prefork, server: Server) -> None:
    app.tasks["echo"].enqueue(1)
    ours = app.client.read("CLIENT", "ID")

    def work() -> None:
        assert app.client.read("CLIENT", "ID") != ours
        for n in range(20):
            app.tasks["echo"].enqueue(n)
        app.client.close()

    in_child(work)
    assert app.client.read("CLIENT", "ID") == ours
    in_child(work)
    app.tasks["echo"].enqueue(2)
    assert app.client.read("CLIENT", "ID") == ours, "the child's close did not cut it"
    assert len(queued(server)) == 42


@pytest.mark.parametrize("what", ["enqueue", "close"])
def test_a_fork_while_another_thread_holds_the_lock(app: Prefork, server: Server, what: str) -> None:
    app.tasks["echo"].enqueue(0)
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with app.client._lock:
            held.set()
            leave.wait(PATIENCE_S)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(PATIENCE_S)
    try:
        in_child((lambda: app.tasks["echo"].enqueue(1)) if what == "enqueue" else app.client.close)
    finally:
        leave.set()
        thread.join(PATIENCE_S)
    assert len(queued(server)) == 1 + (what == "enqueue")


def test_a_fork_while_other_threads_enqueue(app: Prefork, server: Server) -> None:
    leave = threading.Event()
    counts: list[int] = []

    def produce() -> None:
        n = 0
        while not leave.is_set():
            app.tasks["echo"].enqueue(n)
            n += 1
        counts.append(n)

    threads = [threading.Thread(target=produce, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            in_child(lambda: [app.tasks["echo"].enqueue(n) for n in range(5)])
    finally:
        leave.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert len(counts) == 4
    assert len(queued(server)) == 50 + sum(counts)


def test_aenqueue_does_not_hold_the_loop_up(server: Server) -> None:
    async def go(app: Prefork) -> float:
        gaps, last = [0.0], time.monotonic()
        asking = asyncio.create_task(app.tasks["echo"].aenqueue(1))
        while not asking.done():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
        with pytest.raises(BrokerError):
            await asking
        return max(gaps)

    with Listener() as there:
        app = Prefork("t", broker=there.url, limit_s=2 * SLACK_S)
        app.task(lambda n: n, name="echo")
        assert asyncio.run(go(app)) < SLACK_S


def test_what_aenqueue_sends_is_what_it_was_given_when_it_was_called(app: Prefork, server: Server) -> None:
    @app.task(name="named")
    def named(function: Any) -> None: ...

    async def go() -> None:
        given = {"n": 1}
        asking = asyncio.ensure_future(named.aenqueue(function=given))
        await asyncio.sleep(0)
        given["n"] = 2
        await asking

    asyncio.run(go())
    (raw,) = server.client.hvals("t:{default}:m") or server.client.hvals("prefork:{default}:m")
    assert b'"function":{"n":1}' in raw


def test_200_at_once_from_asyncio(app: Prefork, server: Server) -> None:
    async def go() -> list[Any]:
        return await asyncio.gather(*(app.tasks["echo"].aenqueue(n) for n in range(200)))

    results = asyncio.run(go())
    assert len({result.id for result in results}) == 200
    for n, result in enumerate(results):
        assert app.client.inspect("default", result.id)[1].endswith(b"[[%d],{}]" % n)


def test_many_at_once_from_asyncio_hear_within_the_limit_that_nobody_is_there() -> None:
    async def go(app: Prefork) -> list[Any]:
        return await asyncio.gather(*(app.tasks["echo"].aenqueue(n) for n in range(24)), return_exceptions=True)

    with Listener() as there:
        app = Prefork("t", broker=there.url, limit_s=LIMIT_S)
        app.task(lambda n: n, name="echo")
        begun = time.monotonic()
        said = asyncio.run(go(app))
        assert all(isinstance(error, BrokerError) for error in said)
        assert time.monotonic() - begun < LIMIT_S + SLACK_S


# -- many -------------------------------------------------------------------------------------------------------


def test_many_keep_their_order(app: Prefork, server: Server) -> None:
    results = app.enqueue_many(app.tasks["echo"].s(n) for n in range(1_234))
    assert [result.id.encode() for result in results] == queued(server)
    assert all(result.enqueued_at for result in results)
    for n in (0, 499, 500, 501, 1_233):
        assert app.client.inspect("default", results[n].id)[1].endswith(b"[[%d],{}]" % n)


def test_many_of_mixed_queues_and_priorities(app: Prefork, server: Server) -> None:
    echo = app.tasks["echo"]
    kinds = [echo, echo.using(queue_name="mail"), echo.using(priority=7), echo.using(queue_name="mail", run_after=60)]
    results = app.enqueue_many(kinds[n % 4].s(n) for n in range(1_000))
    assert [result.queue_name for result in results[:4]] == ["default", "mail", "default", "mail"]
    assert [result.id.encode() for result in results[0::4]] == queued(server)
    assert [result.id.encode() for result in results[1::4]] == queued(server, "mail")
    ranked = server.client.zrange("t:{default}:ranked", 0, -1)
    assert sorted(result.id.encode() for result in results[2::4]) == sorted(ranked)
    assert server.client.zcard("t:{mail}:scheduled") == 250
    assert app.client.queues() == ["default", "mail"]
    for n in (0, 1, 2, 3, 998, 999):
        place, message, *_ = app.client.inspect(results[n].queue_name, results[n].id)
        assert place == ("scheduled" if n % 4 == 3 else "pending")
        assert message.endswith(b"[[%d],{}]" % n)


def test_many_from_a_generator_are_sent_as_they_come(app: Prefork, server: Server) -> None:
    behind = 0

    def orders() -> Iterator[Any]:
        nonlocal behind
        for n in range(20_000):
            if n % 500 == 499:
                behind = max(behind, n - server.client.llen("t:{default}:pending"))
            yield app.tasks["echo"].s(n)

    results = app.enqueue_many(orders())
    assert len(results) == 20_000
    assert [result.id.encode() for result in results] == queued(server)
    assert behind < 1_000, "no more than a batch is held in memory"


def test_many_big_ones_are_sent_in_small_batches(app: Prefork, server: Server) -> None:
    behind = 0

    def orders() -> Iterator[Any]:
        nonlocal behind
        for n in range(40):
            behind = max(behind, n - server.client.llen("t:{default}:pending"))
            yield app.tasks["echo"].s(n, "x" * 300_000)

    assert len(app.enqueue_many(orders())) == 40
    assert behind <= 4


@pytest.mark.parametrize("nothing", [[], iter(())], ids=["list", "iterator"])
def test_many_of_none(app: Prefork, server: Server, nothing: Any) -> None:
    assert list(app.enqueue_many(nothing)) == []
    assert not server.client.keys("*")


def test_many_with_one_in_the_middle_that_is_not_json(app: Prefork, server: Server) -> None:
    with pytest.raises(NotJSON, match="object"):
        app.enqueue_many(app.tasks["echo"].s(n if n != 1_200 else object()) for n in range(2_000))
    assert len(queued(server)) == 1_000, "whole batches stay, nothing comes after"
    app.enqueue_many([app.tasks["echo"].s(1)])
    assert len(queued(server)) == 1_001


def test_many_while_replies_are_lost(server: Server) -> None:
    with Proxy(server.path) as proxy:
        app = Prefork("t", broker=proxy.url, prefix="t")
        echo = app.task(lambda n: n, name="echo")
        proxy.lose(ENQUEUE, 3)
        results = app.enqueue_many(echo.s(n) for n in range(2_000))
        assert proxy.lost == 3
        assert [result.id.encode() for result in results] == queued(server)
        app.client.close()


def test_many_from_asyncio_have_a_limit_for_each_batch(server: Server) -> None:
    def slow() -> Iterator[Any]:
        for n in range(600):
            if n == 400:
                time.sleep(3.2)  # what the tasks are made of may take longer than the limit
                proxy.lose(ENQUEUE)
            yield echo.s(n)

    with Proxy(server.path) as proxy:
        app = Prefork("t", broker=proxy.url, prefix="t", limit_s=3.0)
        echo = app.task(lambda n: n, name="echo")
        results = asyncio.run(app.aenqueue_many(slow()))
        assert proxy.lost == 1
        assert [result.id.encode() for result in results] == queued(server)
        app.client.close()


def test_many_from_asyncio(app: Prefork, server: Server) -> None:
    async def go() -> list[Any]:
        return await app.aenqueue_many(app.tasks["echo"].s(n) for n in range(700))

    assert [result.id.encode() for result in asyncio.run(go())] == queued(server)


# -- the other verbs --------------------------------------------------------------------------------------------


def test_cancel_inspect_and_census(app: Prefork, server: Server) -> None:
    first, second = app.tasks["echo"].enqueue(1), app.tasks["echo"].enqueue(2)
    client = app.client
    place, message, state, record, worker, score = client.inspect("default", first.id)
    assert (place, state, record, worker, score) == ("pending", None, None, "", 0)
    assert message.endswith(b'{"task":"echo"}\n[[1],{}]')
    assert client.cancel("default", first.id, 1000, {"errors": []}) == "cancelled"
    assert client.cancel("default", first.id, 1000, {"errors": []}) == "finished"
    assert client.inspect("default", first.id)[:3] == ["finished", None, None]
    (error,) = orjson.loads(client.inspect("default", first.id)[3])["errors"]
    assert error == {"class": "prefork.Cancelled", "message": "cancelled before it started", "traceback": ""}
    assert client.census("default")[2:7] == [0, 0, 0, 0, 1]
    assert client.inspect("default", second.id)[0] == "pending"
    assert client.inspect("default", "nowhere")[0] == ""


def test_listening_for_the_end_of_a_task(app: Prefork, server: Server) -> None:
    bench = Bench(server.client, "default")
    bench.lease("w")
    result = app.tasks["echo"].enqueue(1)
    bench.claim("w", 1)
    with app.client.listen("default", result.id) as heard:
        assert heard(0.01) is None
        bench.settle("w", ("done", result.id, DAY_MS, b"{}"))
        assert until(lambda: heard(1.0))[2] == b"SUCCESSFUL"


def test_info_and_ping(app: Prefork) -> None:
    assert app.client.info()["redis_version"]
    assert 0 < app.client.ping_ms() < 5_000


def test_close_and_go_on(app: Prefork, server: Server) -> None:
    app.tasks["echo"].enqueue(1)
    ours = str(app.client.read("CLIENT", "ID"))
    app.client.close()
    until(lambda: ours not in [client["id"] for client in server.client.client_list()])
    server.client.flushall()
    app.tasks["echo"].enqueue(2)
    assert len(queued(server)) == 1
    assert app.client.queues() == ["default"]
