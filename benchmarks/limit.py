"""The bare limit: what this machine can do in prefork's shape without any of its features.

    python benchmarks/limit.py --url redis://127.0.0.1:6379/9 [--tasks 200000] [--children 2] [--depth 16]

A master claims batches by a script, hands them to forked children over plain pipes, each message with a token that is
the right to start it, and settles by a script what they have answered. Nothing is retried, leased, timed, counted or
kept; no error is handled. What prefork reaches is told as a share of this, taken within the same minute.

The database is FLUSHED. With `--stay` it works off what is there (see `fill`), and stays until it is killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NoReturn

import orjson
import redis

PENDING, MESSAGES, ACTIVE = "{limit}:pending", "{limit}:m", "{limit}:active"
CLAIM = """
local ids = redis.call('LPOP', KEYS[1], ARGV[1])
if not ids then return {} end
local time = redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
local held = {}
for n, id in ipairs(ids) do held[2 * n - 1] = ms; held[2 * n] = id end
redis.call('ZADD', KEYS[3], unpack(held))
return redis.call('HMGET', KEYS[2], unpack(ids))
"""
SETTLE = """
redis.call('ZREM', KEYS[2], unpack(ARGV))
return redis.call('HDEL', KEYS[1], unpack(ARGV))
"""
ID_BYTES = 22  # each message begins with its id
BATCH = 1000
TOKEN = struct.Struct("<Q")  # the number of a message
HEAD = struct.Struct("<QI")  # the same, and the length of the message
READ = 1 << 16


def fill(client: redis.Redis, rows: Iterable[tuple[Any, ...]]) -> None:
    """Enqueue the no-op once with each of these arguments."""
    count, rows = 0, iter(rows)
    while batch := list(islice(rows, BATCH)):
        messages = {}
        for args in batch:
            id, count = b"%022d" % count, count + 1
            message = {"id": id.decode(), "task": "noop", "args": args, "kwargs": {"k": "v"}, "attempt": 0, "max": 25}
            messages[id] = id + orjson.dumps(message)
        pipe = client.pipeline(transaction=False)
        pipe.hset(MESSAGES, mapping=messages)  # type: ignore[arg-type]
        pipe.rpush(PENDING, *messages)
        pipe.execute()


class Child:
    """The master's side of one child: three pipes, and what has not been answered."""

    def __init__(self, noop: Callable[..., None]) -> None:
        tasks, self.tasks = os.pipe()
        tokens, self.tokens = os.pipe()
        self.answers, answers = os.pipe()
        self.unanswered: dict[int, bytes] = {}
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (self.tasks, self.tokens, self.answers):
                os.close(fd)
            work(tasks, tokens, answers, {"noop": noop})
        self.kept = tokens  # a master that takes back would read it
        os.close(tasks)
        os.close(answers)
        os.set_blocking(self.answers, False)

    def give(self, messages: list[bytes], number: int) -> None:
        """Hand these on, numbered from `number` + 1: one write for the messages, one for their tokens."""
        frames: list[bytes] = []
        tokens: list[bytes] = []
        for number, message in enumerate(messages, number + 1):  # noqa: B020
            self.unanswered[number] = message[:ID_BYTES]
            frames += (HEAD.pack(number, len(message)), message)
            tokens.append(TOKEN.pack(number))
        os.write(self.tasks, b"".join(frames))
        os.write(self.tokens, b"".join(tokens))


def work(tasks: int, tokens: int, answers: int, functions: dict[str, Callable[..., None]]) -> NoReturn:
    """The child: a token, its message, the call, the answer."""
    buffer, at = b"", 0
    while token := os.read(tokens, TOKEN.size):
        wanted, number, message = TOKEN.unpack(token)[0], -1, b""
        while number != wanted:
            body = at + HEAD.size
            if len(buffer) >= body:
                number, size = HEAD.unpack_from(buffer, at)
                if len(buffer) >= body + size:
                    message, at = buffer[body : body + size], body + size
                    continue
                number = -1
            buffer, at = buffer[at:] + os.read(tasks, READ), 0
        task = orjson.loads(message[ID_BYTES:])
        functions[task["task"]](*task["args"], **task["kwargs"])
        os.write(answers, token)
    os._exit(0)


class Master:
    """Claims, hands out, settles, until so many are settled, or for ever."""

    def __init__(self, url: str, children: int, depth: int, noop: Callable[..., None]) -> None:
        self.client = client = redis.Redis.from_url(url)  # kept: it closes its connections when it is dropped
        self.claim, self.settle = client.script_load(CLAIM), client.script_load(SETTLE)
        self.connection: Any = client.connection_pool.get_connection()
        self.loop, self.depth = select.epoll(), depth
        self.loop.register(self.connection._sock, select.EPOLLIN)
        self.children = {child.answers: child for child in (Child(noop) for _ in range(children))}
        for fd in self.children:
            self.loop.register(fd, select.EPOLLIN)
        self.settled = 0

    def run(self, tasks: float) -> None:
        """Until so many are settled. Once the queue is empty, nothing more is claimed."""
        connection, children, depth = self.connection, self.children, self.depth
        want = len(children) * depth
        ready: list[bytes] = []
        answered: list[bytes] = []
        due: list[int] = []  # replies to come: 0 for a claim, n for a settlement of n
        number, dry = 0, False
        while self.settled < tasks:
            commands: list[tuple[Any, ...]] = []
            if len(ready) < want and not dry and 0 not in due:
                commands.append(("EVALSHA", self.claim, 3, PENDING, MESSAGES, ACTIVE, max(64, 2 * want)))
                due.append(0)
            if answered and not any(due):
                commands.append(("EVALSHA", self.settle, 2, MESSAGES, ACTIVE, *answered))
                due.append(len(answered))
                answered = []
            if commands:
                connection.send_packed_command(connection.pack_commands(commands))
            for child in children.values():
                free = depth - len(child.unanswered)
                if ready and free >= depth // 2:
                    child.give(ready[:free], number)
                    number += free
                    del ready[:free]
            for fd, _ in self.loop.poll():
                if child := children.get(fd):  # type: ignore[assignment]
                    for (one,) in TOKEN.iter_unpack(os.read(fd, READ)):
                        answered.append(child.unanswered.pop(one))
                    continue
                while due:
                    reply: Any = connection.read_response()
                    if (count := due.pop(0)) == 0:
                        dry = not reply
                        ready += reply
                    else:
                        self.settled += count
                    if not connection.can_read(0):
                        break

    def close(self) -> None:
        for child in self.children.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="limit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True, help="the database is FLUSHED, without --stay")
    parser.add_argument("--tasks", type=int, default=200_000)
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--depth", type=int, default=16, help="messages that a child may have unanswered")
    parser.add_argument("--stay", action="store_true", help="work off what is there, and stay; tasks are work.noop")
    options = parser.parse_args()
    if options.stay:
        noop = importlib.import_module("work").noop
        Master(options.url, options.children, options.depth, noop).run(float("inf"))
    client = redis.Redis.from_url(options.url)
    client.flushdb()
    fill(client, ((1, "hello") for _ in range(options.tasks)))
    master = Master(options.url, options.children, options.depth, lambda *args, **kwargs: None)
    began, before = time.perf_counter(), os.times()
    master.run(options.tasks)
    took, after = time.perf_counter() - began, os.times()
    master.close()
    reaped, micro = os.times(), 1e6 / options.tasks
    assert not client.exists(PENDING, MESSAGES, ACTIVE), "not everything was settled"
    result = {
        "tasks": options.tasks,
        "children": options.children,
        "depth": options.depth,
        "tasks_per_s": round(options.tasks / took),
        "master_cpu_us": round((after.user + after.system - before.user - before.system) * micro, 2),
        "children_cpu_us": round((reaped.children_user + reaped.children_system) * micro, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
