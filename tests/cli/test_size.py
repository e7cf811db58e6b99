"""With 100,000 messages in a queue no command holds the server up, nor does more than what it shows needs.

A busy machine makes anything slow. So what is held to numbers is work: commands, scripts, bytes. CPU time is compared
with that of something else on the same server, as the best of several tries.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.cli.command import as_json, prefork
from tests.conftest import Project, Server
from tests.process.scene import key

MANY = 100_000
IN_ONE_SCRIPT = 1000  # messages, at most
untouched = itertools.count(50_000)  # places in the queue
MARGIN = 10  # between what is compared
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
READ_ALL = "return #redis.call('HVALS', KEYS[1])"


@pytest.fixture(scope="module")
def big(server_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A queue with 100,000 pending, as many scheduled, and as many dead letters."""
    server = Server(server_binary)
    project = Project(tmp_path_factory.mktemp("big"), server, "tasks_big")
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
    before, before_s = server.client.info("all"), command_s()
    run()
    took_s, after = command_s() - before_s, server.client.info("all")

    def calls(info: dict[str, dict[str, int]], start: str = "") -> int:
        return sum(stats["calls"] for name, stats in info.items() if name.startswith(f"cmdstat_{start}"))

    def server_s(info: dict[str, float]) -> float:
        return info["used_cpu_user"] + info["used_cpu_sys"]

    return Cost(
        calls(after) - calls(before),
        calls(after, "eval") - calls(before, "eval"),
        after["total_net_output_bytes"] - before["total_net_output_bytes"],
        server_s(after) - server_s(before),
        took_s,
    )


def command_s() -> float:
    """Of all commands so far. Unlike the time they took, it is theirs alone."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def a_thousand_s(server: Server) -> float:
    """What it costs this server to read 1,000 messages in a script."""
    ids = server.client.hrandfield(key("m"), 1000)
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


@pytest.mark.parametrize(("words", "count"), LOOKS, ids=lambda it: " ".join(it) if isinstance(it, tuple) else "")
def test_a_command_does_no_more_than_what_it_shows_needs(big: Project, words: tuple[str, ...], count: int) -> None:
    server = big.server
    server_s, least_s = [], []
    for _ in range(TRIES):
        id = server.client.lindex(key("pending"), next(untouched))
        given = [id.decode() if word == "ID" else word for word in words]
        it = cost(server, lambda given=given: prefork(*given, "--broker", server.url))  # type: ignore[misc]
        assert it.calls <= 100 + 10 * count
        assert it.scripts >= count / IN_ONE_SCRIPT
        assert it.sent_bytes <= 50_000 + 300 * count
        server_s.append(it.server_s / a_thousand_s(server))
        least = cost(server, lambda: prefork("queues", "--broker", server.url))
        least_s.append(it.command_s / least.command_s)
        if min(server_s) <= MARGIN * (1 + count / 1000) and min(least_s) <= MARGIN:
            return
    pytest.fail(f"in reads of 1,000 messages: {server_s}; in runs of `queues`: {least_s}")


@pytest.mark.parametrize(
    ("words", "count", "left"),
    [
        (("doctor",), 3 * MANY, {}),
        (("retry", "--dead", "default", "--yes"), MANY, {"dead": 0}),
        (("purge", "default", "--yes"), 3 * MANY, {"pending": 0, "scheduled": 0}),
    ],
    ids=["doctor", "retry", "purge"],
)
def test_what_goes_through_all_does_so_in_steps(
    big: Project, words: tuple[str, ...], count: int, left: dict[str, int]
) -> None:
    client = big.server.client
    client.config_set("slowlog-log-slower-than", 0)
    client.slowlog_reset()
    for _ in range(TRIES):
        client.eval(READ_ALL, 1, key("m"))
    longest_us = min(entry["duration"] for entry in client.slowlog_get() if entry["command"].startswith(b"EVAL"))
    client.config_set("slowlog-log-slower-than", longest_us // 4)
    client.slowlog_reset()
    it = cost(big.server, lambda: prefork(*words, "--broker", big.server.url))
    assert it.scripts >= 0.9 * count / IN_ONE_SCRIPT  # the test before has taken some out
    assert it.calls <= 10 * count
    assert it.sent_bytes <= 300 * count
    assert client.slowlog_len() <= 0.1 * it.scripts, "other processes take the core away, but not at every tenth script"
    (queue,) = as_json("queues", "--broker", big.server.url)
    assert queue | left == queue
    if not queue["pending"]:
        assert client.hlen(key("m")) == 0
