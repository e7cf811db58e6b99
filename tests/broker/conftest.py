"""What the tests of the broker share."""

from __future__ import annotations

import fakeredis
import pytest

from tests.broker.bench import Bench
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
