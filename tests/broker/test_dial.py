"""How a channel comes to its connection: addresses, TLS, lookups, limits and pauses."""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.broker import dial
from tests.broker.rig import QuickLoop, Rigs
from tests.broker.wires import Listener, Proxy, free_port
from tests.conftest import PATIENCE_S, Server, until

CERTIFICATE = Path(__file__).parent / "localhost.pem"


# -- TLS --------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(dial, "CONNECT_LIMIT_S", 0.3)  # Redis waits for the end of a line
    it = rig(f"rediss://:hunter2@{tcp_server.url}/0")
    it.channel.connect()
    said = it.turn_until(lambda: it.downs)[0]
    assert "hunter2" not in said
    assert "does not answer in time" in said or "redis:// in place of rediss://" in said


def test_a_server_that_resets_the_connection_before_tls_begins(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a balancer does that has nobody behind it. The certificates of the system take a while to load."""
    make = ssl.create_default_context
    with socket.create_server(("127.0.0.1", 0)) as there:

        def slow(*given: Any, **more: Any) -> ssl.SSLContext:
            it, _ = there.accept()
            it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            it.close()
            return make(*given, **more)

        monkeypatch.setattr(ssl, "create_default_context", slow)
        it = rig(f"rediss://127.0.0.1:{there.getsockname()[1]}/0", QuickLoop())
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 3)
        assert "broke the connection off" in it.downs[0]
        it.channel.close()
        assert not it.loop._selector.get_map()


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


# -- addresses --------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(dial, "CONNECT_LIMIT_S", PATIENCE_S)
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


def hanging(*_: Any, **__: Any) -> Any:
    """A name server that does not answer, seen from `getaddrinfo`."""
    time.sleep(PATIENCE_S)


def test_a_lookup_that_hangs_holds_nothing_that_is_open_here(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipes of children among it: were it to hold those, they would not see the end of a master that dies."""
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    monkeypatch.setattr(dial, "CONNECT_LIMIT_S", PATIENCE_S)
    reads, writes = os.pipe()
    it = rig("redis://some.host:6379/0")
    it.channel.connect()
    os.close(writes)
    ended: list[bytes] = []
    it.loop.on_read(reads, lambda: ended.append(os.read(reads, 1)))
    it.turn_until(lambda: ended, PATIENCE_S / 2)
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


# -- limits and pauses ------------------------------------------------------------------------------------------


def test_a_server_that_accepts_and_says_nothing(rig: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "CONNECT_LIMIT_S", 0.1)
    with Listener() as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: len(it.downs) >= 3)
        assert "does not answer in time" in it.downs[0]
        assert it.ups == 0


def test_close_while_connecting(rig: Rigs) -> None:
    with Listener() as there:
        it = rig(there.url)
        it.channel.connect()
        it.turn_until(lambda: there.accepted == 1)
        it.channel.close()
        it.turn_until(lambda: there.open == [])
        assert (it.ups, it.downs, there.accepted) == (0, [], 1)
        assert not it.loop._selector.get_map()


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


def test_only_a_connection_that_has_lasted_makes_the_pauses_short_again(
    rig: Rigs, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = QuickLoop()
    with Proxy(server.path) as proxy:
        it = rig(proxy.url, loop).connect()
        for good_after_s in (PATIENCE_S, PATIENCE_S, PATIENCE_S, 0.0, PATIENCE_S):
            monkeypatch.setattr(dial, "GOOD_AFTER_S", good_after_s)
            ups = it.ups
            proxy.cut()
            it.turn_until(lambda ups=ups: it.ups > ups)
    longest = [0.02, 0.04, 0.08, 0.02, 0.04]
    assert len(loop.pauses_s) == len(longest)
    assert all(0.5 * most <= pause <= most for pause, most in zip(loop.pauses_s, longest, strict=True))


def test_a_forked_child_that_abandons_it_leaves_what_is_under_way_alone(
    rig: Rigs, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    look_up = socket.getaddrinfo

    def slow(*given: Any, **more: Any) -> Any:
        until((tmp_path / "go on").exists, PATIENCE_S, "the child has ended")
        return look_up(*given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with Proxy(server.path) as proxy:
        it = rig(f"redis://localhost:{proxy.port}/0")
        it.channel.connect()
        pid = os.fork()
        if not pid:
            it.channel.abandon()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        (tmp_path / "go on").touch()
        it.turn_until(lambda: it.channel.ready)
