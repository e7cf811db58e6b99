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
FIXED = 4  # reads of a thousand messages: more than any command costs that looks at none
TRIES = 5
SLOW_SHARE = 0.03  # of all scripts: other processes take the core away
COPY = """
for _, id in ipairs(redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])) do
  local other = ARGV[3] .. string.sub(id, 2)
  redis.call('HSET', KEYS[2], other, redis.call('HGET', KEYS[2], id))
  redis.call('HSET', KEYS[3], other, '{"attempts":1,"errors":[{"class":"x.Y"}]}')
  redis.call('ZADD', KEYS[4], ARGV[4], other)
end
"""
READ = "for i = 1, #ARGV do redis.call('HGET', KEYS[1], ARGV[i]) end"


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
        if min(server_s) <= FIXED + MARGIN * count / IN_ONE_SCRIPT and min(least_s) <= MARGIN:
            return
    pytest.fail(f"in reads of 1,000 messages: {server_s}; in runs of `queues`: {least_s}")


def go_through(server: Server, words: tuple[str, ...], count: int) -> str:
    """Run a command that looks at so many messages, and see that it does so in small steps. -> what it printed"""
    client, out = server.client, []
    ids = client.hrandfield(key("m"), IN_ONE_SCRIPT)
    client.config_set("slowlog-log-slower-than", 0)
    client.slowlog_reset()
    for _ in range(TRIES):
        client.eval(READ, 1, key("m"), *ids)
    read_us = min(entry["duration"] for entry in client.slowlog_get() if entry["command"].startswith(b"EVAL"))
    client.config_set("slowlog-log-slower-than", MARGIN * read_us)
    client.slowlog_reset()
    it = cost(server, lambda: out.append(prefork(*words, "--broker", server.url)))
    assert it.scripts >= count / IN_ONE_SCRIPT
    assert it.calls <= 10 * count
    assert it.sent_bytes <= 300 * count
    assert client.slowlog_len() <= SLOW_SHARE * it.scripts
    return out[0]


def test_doctor_looks_at_all_in_steps(big: Project) -> None:
    assert go_through(big.server, ("doctor",), 2 * MANY + MANY // 2)  # other tests have taken some out


def test_all_can_be_retried_and_purged_in_steps(big: Project) -> None:
    assert go_through(big.server, ("retry", "--dead", "default", "--yes"), MANY) == f"{MANY:,} revived\n"
    assert go_through(big.server, ("purge", "default", "--yes"), 2 * MANY + MANY // 2).endswith("deleted\n")
    (queue,) = as_json("queues", "--broker", big.server.url)
    assert (queue["pending"], queue["scheduled"], queue["dead"]) == (0, 0, 0)
    assert big.server.client.hlen(key("m")) == 0
