"""With 100,000 messages in a queue no command holds the server up, nor does more than what it shows needs.

A busy machine makes anything slow. So what is held to numbers is work: commands, scripts, bytes. CPU time is compared
with that of something else on the same server, as the best of several tries.
"""

from __future__ import annotations

import itertools
import pathlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from prefork.broker import admin, doctor, verbs
from prefork.broker.client import Client
from tests.cli.command import as_json, prefork
from tests.conftest import Project, Server
from tests.process.scene import key

MANY = 100_000
IN_ONE_SCRIPT = 1000  # messages, at most
untouched = itertools.count(50_000)  # places in the queue
MARGIN = 10  # between what is compared
FIXED = 4  # reads of a thousand messages: more than any command costs that looks at none
TRIES = 5
COPY = """
for _, id in ipairs(redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])) do
  local other = ARGV[3] .. string.sub(id, 2)
  redis.call('HSET', KEYS[2], other, redis.call('HGET', KEYS[2], id))
  redis.call('HSET', KEYS[3], other, '{"attempts":1,"errors":[{"class":"x.Y"}]}')
  redis.call('ZADD', KEYS[4], ARGV[4], other)
end
"""
READ = "for i = 1, #ARGV do redis.call('HGET', KEYS[1], ARGV[i]) end"


@pytest.fixture
def big(server_binary: str, tmp_path: pathlib.Path) -> Iterator[Project]:
    """A queue with 100,000 pending, as many scheduled, and as many dead letters."""
    server = Server(server_binary)
    project = Project(tmp_path, server, "tasks_big")
    project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(MANY))
    for at in range(0, MANY, 1000):
        for place, first, ms in (("scheduled", "1", 4100000000000), ("dead", "2", 1700000000000)):
            keys = [key(name) for name in ("pending", "m", "state", place)]
            server.client.eval(COPY, 4, *keys, at, at + 999, first, ms + at)
    yield project
    project.close()
    server.close()


@dataclass(frozen=True)
class Cost:
    """`calls`: commands that the server has carried out, those in scripts too; `command_s`: CPU time of `prefork`."""

    calls: int
    scripts: int
    sent_bytes: int
    server_s: float
    command_s: float


def cost(server: Server, run: Callable[[], object]) -> Cost:
    info = server.client.info

    def calls(start: str = "") -> int:
        return sum(
            stats["calls"] for name, stats in info("commandstats").items() if name.startswith("cmdstat_" + start)
        )

    def server_s() -> float:
        told = info("cpu")
        return float(told["used_cpu_user"] + told["used_cpu_sys"])

    counters = (calls, lambda: calls("eval"), lambda: info("stats")["total_net_output_bytes"], server_s, command_s)
    before = [counter() for counter in counters]
    run()
    after = [counter() for counter in reversed(counters)]
    return Cost(*(b - a for a, b in zip(before, reversed(after), strict=True)))


def command_s() -> float:
    """Of all commands so far. Unlike the time they took, it is theirs alone."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def a_thousand_s(server: Server) -> float:
    """What it costs this server to read a thousand messages in a script."""
    ids = server.client.hrandfield(key("m"), IN_ONE_SCRIPT)
    return min(cost(server, lambda: server.client.eval(READ, 1, key("m"), *ids)).server_s for _ in range(TRIES))


LOOKS = [
    (("queues",), 0), (("workers",), 0), (("pause", "default"), 0), (("resume", "default"), 0),
    (("show", "ID"), 1),
    *((("list", "default", "--state", state, "--limit", "500"), 500) for state in ("pending", "scheduled", "dead")),
    (("list", "default", "--state", "active", "--limit", "500"), 0),
    (("list", "default", "--state", "pending", "--limit", "10", "--offset", "90000"), 10),
    (("list", "default", "--state", "dead", "--limit", "10", "--offset", "90000"), 10),
    (("list", "default", "--state", "pending", "--limit", "10000"), 10_000),
    (("list", "default", "--state", "dead", "--limit", "10000"), 10_000),
    (("delete", "ID", "--yes"), 1), (("cancel", "ID"), 1),
]  # fmt: skip


def does_no_more_than_it_shows(server: Server, words: tuple[str, ...], count: int) -> None:
    """Run a command that shows so many messages, and compare what it costs."""
    server_s, least_s = [], []
    for _ in range(TRIES):
        id = server.client.lindex(key("pending"), next(untouched))
        given = [id.decode() if word == "ID" else word for word in words]
        it = cost(server, lambda given=given: prefork(*given, "--broker", server.url))  # type: ignore[misc]
        assert it.calls <= 100 + 10 * count, words
        assert it.scripts >= count / IN_ONE_SCRIPT, words
        assert it.sent_bytes <= 50_000 + 300 * count, words
        server_s.append(it.server_s / a_thousand_s(server))
        least = cost(server, lambda: prefork("queues", "--broker", server.url))
        least_s.append(it.command_s / least.command_s)
        if min(server_s) <= FIXED + MARGIN * count / IN_ONE_SCRIPT and min(least_s) <= MARGIN:
            return
    pytest.fail(f"{words}: in reads of 1,000 messages: {server_s}; in runs of `queues`: {least_s}")


def in_small_steps(server: Server, client: Client, count: int, run: Callable[[], object]) -> None:
    """Do something that goes through so many messages, and see how many of them a script is given at most."""
    sizes: list[int] = []
    call = client.call

    def listening(it: verbs.Call, **options: Any) -> Any:
        sizes.append(max(len(it.arguments), *(word for word in it.arguments if isinstance(word, int)), 0))
        return call(it, **options)

    client.call = listening  # type: ignore[method-assign]
    it = cost(server, run)
    assert max(sizes) <= 2 * IN_ONE_SCRIPT  # an id and a value
    assert it.scripts >= count / IN_ONE_SCRIPT
    assert it.calls <= 10 * count
    assert it.sent_bytes <= 300 * count
    client.call = call  # type: ignore[method-assign]


def test_no_command_holds_the_server_up_nor_does_more_than_it_has_to(big: Project) -> None:
    """One test, since the queue takes long to fill."""
    for words, count in LOOKS:
        does_no_more_than_it_shows(big.server, words, count)
    some = MANY - 100  # those that were cancelled or deleted above are missing
    client = big.tasks.app.client
    in_small_steps(big.server, client, 3 * some, lambda: list(doctor.examine(client)))
    in_small_steps(big.server, client, MANY, lambda: admin.retry_dead(client, "default"))
    in_small_steps(big.server, client, 3 * some, lambda: admin.purge(client, "default", ("pending", "scheduled")))
    (queue,) = as_json("queues", "--broker", big.server.url)
    assert (queue["pending"], queue["scheduled"], queue["dead"]) == (0, 0, 0)
    assert big.server.client.hlen(key("m")) == 0
