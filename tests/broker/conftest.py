"""What the tests of the broker share."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest

from prefork.worker.loop import Loop
from tests.broker.bench import Bench
from tests.broker.rig import Rig, Rigs
from tests.broker.wires import free_port
from tests.conftest import Server


@pytest.fixture(params=["fake", "real"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """An empty queue, once on a simulated and once on a real server."""
    if request.param == "fake":
        return Bench(fakeredis.FakeRedis(server=fakeredis.FakeServer()))
    server: Server = request.getfixturevalue("server")
    return Bench(server.client)


@pytest.fixture
def real_bench(server: Server) -> Bench:
    """An empty queue on a real server."""
    return Bench(server.client)


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
