"""What `alternatives` compares: for each choice, what ours costs and what the other one does."""

from __future__ import annotations

import gc
import os
import select
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis
import orjson

from benchmarks.gauge import cpu_s
from benchmarks.scene import until
from prefork.broker import verbs
from prefork.broker.keys import Keys
from prefork.message import decode, new_ids
from prefork.worker.frames import ANSWER, FRAME, TOKEN, Order, Terms
from prefork.worker.handoff import ChildEnd

Cost = Callable[[], float]
Costs = tuple[Cost, Cost]
KEYS = Keys("bench", "default")
PAYLOAD = b'{"task":"noop"}\n[[1,"hello"],{}]'
WORKER = "host:boot:1:1:0"
FUNCTION = "#!lua name=bench\nredis.register_function('enqueue', function(KEYS, ARGV)\n%s\nend)"
STORE = "redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) redis.call('RPUSH', KEYS[2], ARGV[1])"
TAKE = """local ids = redis.call('LPOP', KEYS[2], ARGV[1]) local held = {}
for n, id in ipairs(ids) do held[2 * n - 1] = n; held[2 * n] = id end
redis.call('ZADD', KEYS[3], unpack(held)) return redis.call('HMGET', KEYS[1], unpack(ids))"""
END = "redis.call('ZREM', KEYS[3], unpack(ARGV)) return redis.call('HDEL', KEYS[1], unpack(ARGV))"
LIST_STORE = "redis.call('RPUSH', KEYS[2], ARGV[2])"
LIST_TAKE = """local found = redis.call('LPOP', KEYS[2], ARGV[1]) local held = {}
for n, it in ipairs(found) do held[2 * n - 1] = string.sub(it, 1, 32); held[2 * n] = it end
redis.call('HSET', KEYS[3], unpack(held)) return found"""
LIST_END = "return redis.call('HDEL', KEYS[3], unpack(ARGV))"
GIVE = "redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) redis.call('ZADD', KEYS[3], 1, ARGV[1]) "
PUSHED = GIVE + "return redis.call('PUBLISH', 'inbox', ARGV[1] .. ARGV[2])"
MARKED = STORE + " redis.call('ZADD', KEYS[4], 0, '0')"
PLACES = ("{b}m", "{b}pending", "{b}active", "{b}wake")


class Server:
    """A private server on a unix socket, and one connection to it."""

    def __init__(self, binary: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="prefork-bench-"))
        self.path = self.folder / "s"
        command = [binary, "--port", "0", "--unixsocket", str(self.path), "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self._answers, "the server answers", 30)
        self.wire, self._children = Wire(self.path), list[int]()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as it:
            return it.connect_ex(str(self.path)) == 0  # its path is there before it listens

    def fork(self, live: Callable[[], None]) -> int:
        """Have something done by a child, until this ends. -> its pid"""
        if (pid := os.fork()) == 0:
            try:
                live()
            finally:
                os._exit(1)
        self._children.append(pid)
        return pid

    def close(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cost(self, act: Callable[[], object]) -> float:
        """Seconds of CPU, the server's and ours, of an act that leaves the server empty again."""
        before = cpu_s([self.process.pid]) + time.process_time()
        act()
        took_s = cpu_s([self.process.pid]) + time.process_time() - before
        self.wire.ask(("FLUSHALL",))
        return took_s


class Wire:
    """A blocking connection: many commands in one write, then their replies."""

    def __init__(self, path: Path, protocol: int = 2) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.reader = hiredis.Reader()
        self.ask(("HELLO", protocol))

    def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        self.socket.sendall(b"".join(map(hiredis.pack_command, commands)))
        return [self.reply() for _ in commands]

    def reply(self) -> Any:
        while (reply := self.reader.gets()) is False:
            if not (data := self.socket.recv(1 << 16)):
                raise EOFError
            self.reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def script(self, text: str, places: tuple[str, ...] = PLACES) -> Callable[..., tuple[Any, ...]]:
        """Load a script. -> a function that makes a command of its arguments"""
        (sha,) = self.ask(("SCRIPT", "LOAD", text))
        return lambda *args: ("EVALSHA", sha, len(places), *places, *args)


def calls_of_scripts(server: Server) -> Costs:
    """The script `enqueue` as it is, called by its hash or as a function."""
    text = verbs.script("enqueue").text.decode()
    server.wire.ask(("FUNCTION", "LOAD", "REPLACE", FUNCTION % text), ("SCRIPT", "LOAD", text))

    def cost(*head: str) -> float:
        calls = [verbs.enqueue(KEYS, [verbs.Entry("default", id, 0, "", PAYLOAD)]) for id in new_ids(2000)]
        words = [(*head, *call.command()[2:]) for call in calls]
        return server.cost(lambda: server.wire.ask(*words))

    return lambda: cost("EVALSHA", verbs.script("enqueue").sha), lambda: cost("FCALL", "enqueue")


def protocols(server: Server) -> Costs:
    """Claims of 64, as the master sends and reads them."""
    wires = [Wire(server.path, protocol) for protocol in (2, 3)]
    for verb in ("enqueue", "claim", "beat"):
        server.wire.ask(("SCRIPT", "LOAD", verbs.script(verb).text))

    def cost(wire: Wire) -> float:
        entries = [verbs.Entry("default", id, 0, "", PAYLOAD) for id in new_ids(3200)]
        wire.ask(verbs.beat(KEYS, WORKER, 60_000, first=True).command(), verbs.enqueue(KEYS, entries).command())
        words = verbs.claim(KEYS, WORKER, 64).command()
        return server.cost(lambda: [wire.ask(words) for _ in range(50)])

    return lambda: cost(wires[0]), lambda: cost(wires[1])


def places(server: Server) -> Costs:
    """Enqueued one by one, claimed and settled by 64."""
    hashed = [server.wire.script(text) for text in (STORE, TAKE, END)]
    listed = [server.wire.script(text) for text in (LIST_STORE, LIST_TAKE, LIST_END)]

    def cost(store: Any, take: Any, end: Any) -> float:
        ids = list(new_ids(2048))

        def act() -> None:
            server.wire.ask(*(store(id, id.encode() + PAYLOAD) for id in ids))
            for at in range(0, len(ids), 64):
                server.wire.ask(take(64))
                server.wire.ask(end(*ids[at : at + 64]))

        return server.cost(act)

    return lambda: cost(*hashed), lambda: cost(*listed)


def sizes(server: Server) -> Costs:
    """Bytes in the server of what waits, in place of seconds."""
    hashed, listed = server.wire.script(STORE), server.wire.script(LIST_STORE)

    def used() -> float:
        (info,) = server.wire.ask(("INFO", "memory"))
        return float(info.partition(b"used_memory:")[2].split()[0])

    def bytes_of(store: Any) -> float:
        words, before = [store(id, id.encode() + PAYLOAD) for id in new_ids(20_000)], used()
        server.wire.ask(*words)
        grown = used() - before
        server.wire.ask(("FLUSHALL",))
        return grown

    return lambda: bytes_of(hashed), lambda: bytes_of(listed)


def handing_over(server: Server, text: str, sleep: Callable[[Wire], Any], *first: str) -> Cost:
    """The time by the clock from the call of a script until the consumer, a process of its own, has the message."""
    call = server.wire.script(text)
    told, tell = os.pipe()

    def live() -> None:
        wire = Wire(server.path, 3)
        if first:
            wire.ask(first)
        os.write(tell, bytes(8))
        while True:
            sleep(wire)
            os.write(tell, struct.pack("<Q", time.monotonic_ns()))

    server.fork(live)
    os.read(told, 8)

    def cost() -> float:
        took = []
        for id in new_ids(60):
            time.sleep(0.002)  # so that all sleep
            begun = time.monotonic_ns()
            server.wire.ask(call(id, PAYLOAD))
            took.append(int.from_bytes(os.read(told, 8), "little") - begun)
        server.wire.ask(("FLUSHALL",))
        return statistics.median(took)

    return cost


def marker(server: Server) -> Cost:
    take = server.wire.script(TAKE)
    return handing_over(server, MARKED, lambda wire: (wire.ask(("BZPOPMIN", PLACES[3], 0)), wire.ask(take(1))))


def moved(server: Server) -> Cost:
    def sleep(wire: Wire) -> None:
        (id,) = wire.ask(("BLMOVE", PLACES[1], PLACES[2] + "list", "LEFT", "RIGHT", 0))
        wire.ask(("HGET", PLACES[0], id))

    return handing_over(server, STORE, sleep)


def pushed(server: Server) -> Cost:
    return handing_over(server, PUSHED, Wire.reply, "SUBSCRIBE", "inbox")


def pair(*, sockets: bool) -> tuple[int, int]:
    if not sockets:
        return os.pipe()
    reads, writes = socket.socketpair()
    return reads.detach(), writes.detach()


def there_and_back(server: Server, *, orders: bool = False, answers: bool = False) -> Cost:
    """Batches of 16 frames to a child, which answers each; `orders`, `answers`: whether these go by a socket."""
    task_r, task_w = pair(sockets=orders)
    answer_r, answer_w = pair(sockets=answers)

    def live() -> None:
        while data := os.read(task_r, 1 << 16):
            for _ in range(len(data) // 128):
                os.write(answer_w, bytes(ANSWER.size))

    child, batch = server.fork(live), bytes(128 * 16)

    def cost() -> float:
        before = cpu_s([child]) + time.process_time()
        for _ in range(400):
            os.write(task_w, batch)
            left = 16 * ANSWER.size
            while left:
                left -= len(os.read(answer_r, 1 << 16))
        return cpu_s([child]) + time.process_time() - before

    return cost


def pure(act: Callable[[], object], times: int) -> Cost:
    def cost() -> float:
        before = time.process_time()
        for _ in range(times):
            act()
        return time.process_time() - before

    return cost


def writes() -> Costs:
    """16 heads and bodies into a pipe, and out again."""
    reads, writes = os.pipe()
    frames = [bytes(size) for _ in range(16) for size in (FRAME.size, 20)]

    def joined() -> None:
        os.write(writes, b"".join(frames))
        os.read(reads, 1 << 16)

    def gathered() -> None:
        os.writev(writes, frames)
        os.read(reads, 1 << 16)

    return pure(joined, 3000), pure(gathered, 3000)


def waits() -> Costs:
    """One of twelve descriptors is ready."""
    selector, epoll, callbacks = selectors.DefaultSelector(), select.epoll(), {}
    for number in range(12):
        reads, writes = os.pipe()
        selector.register(reads, selectors.EVENT_READ, {selectors.EVENT_READ: int})
        epoll.register(reads, select.EPOLLIN)
        callbacks[reads] = int
        if number == 5:
            os.write(writes, b"x")

    def selected() -> None:
        for key, events in selector.select(1.0):
            for event, callback in tuple(key.data.items()):
                if events & event:
                    callback()

    def polled() -> None:
        for fd, _ in epoll.poll(1.0):
            callbacks[fd]()

    return pure(selected, 10_000), pure(polled, 10_000)


def of_master() -> None:
    """The objects of a few hundred messages on their way."""
    raw, orders = b"1 1764000000000 0 " + PAYLOAD, []
    for n, id in enumerate(new_ids(640)):
        message = decode(id.encode(), "default", raw)
        orders.append(Order(message, Terms(message.header, 0, 0, 25, 0.0, 0.0, False, 0), 1, 0, 1e-5, n))
    b"".join(part for n, order in enumerate(orders) for part in order.frame(n))


def of_child() -> Callable[[], object]:
    """The same, received one by one and decoded."""
    task_r, task_w = os.pipe()
    token_r, token_w = os.pipe()
    message = decode(next(new_ids(1)).encode(), "default", b"1 1764000000000 0 " + PAYLOAD)
    frame = b"".join(Order(message, Terms(message.header, 0, 0, 25, 0.0, 0.0, False, 0), 1, 0, 0, 0).frame(7))
    end = ChildEnd(task_r, token_r, -1)

    def act() -> None:
        os.write(task_w, frame * 64)
        os.write(token_w, TOKEN.pack(7) * 64)
        for _ in range(64):
            if given := end.next():
                orjson.loads(given.body)

    return act


def collected(act: Callable[[], object], times: int, collector: str) -> Cost:
    """With an app's 300,000 objects in memory. `collector`: on, frozen or off."""
    heap = [{"n": n, "values": [n]} for n in range(150_000)]

    def cost() -> float:
        gc.collect()
        gc.unfreeze() if collector == "on" else gc.freeze()
        gc.disable() if collector == "off" else gc.enable()
        try:
            return pure(act, times)() if heap else 0.0
        finally:
            gc.unfreeze()
            gc.enable()

    return cost
