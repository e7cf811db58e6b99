"""The producer of any side, in an environment of its own: `producer.py ADAPTER FUNCTION ARGUMENTS`, all as JSON."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import psutil

ARGS = (1, "hello")  # of the small task
peer: Any = None


def send(name: str, rows: Iterable[Any]) -> float:
    """Enqueue by the fastest way that the side has. -> the seconds that took"""
    begun = time.perf_counter()
    if many := getattr(peer, "enqueue_many", None):
        many(name, (tuple(args) for args in rows))
    else:
        for args in rows:
            peer.enqueue(name, *args)
    return time.perf_counter() - begun


def fill(count: int) -> float:
    """Enqueue so many no-ops. -> the seconds that took"""
    return send("noop", (ARGS for _ in range(count)))


def fill_kept(count: int) -> float:
    """The same, of those that keep their results."""
    return send("kept", (ARGS for _ in range(count)))


def one_by_one(count: int) -> float:
    """As `fill`, each awaited before the next."""
    peer.enqueue("noop", *ARGS)
    if timed := getattr(peer, "enqueue_timed", None):  # what produces is another process
        return float(timed("noop", ARGS, count))
    begun = time.perf_counter()
    for _ in range(count):
        peer.enqueue("noop", *ARGS)
    return time.perf_counter() - begun


def in_bulk(count: int) -> float | None:
    """As `fill`, for those that have a way to enqueue many at once."""
    if not hasattr(peer, "enqueue_many"):
        return None
    fill(1)
    return fill(count)


def paced(count: int, gap_s: float) -> None:
    """Enqueue a task every so often that says how long it took from here to its first line."""
    peer.enqueue("noop", *ARGS)
    for _ in range(count):
        time.sleep(gap_s)
        peer.enqueue("stamp", time.monotonic_ns())
    time.sleep(gap_s)  # the end of this process would delay the last one


def makespan(long_s: float, longs: int, short_s: float, shorts: int) -> int:
    """Enqueue long tasks, then short ones. -> when that began"""
    begun = time.monotonic_ns()
    send("nap", [(long_s,)] * longs + [(short_s,)] * shorts)
    return begun


def growth(count: int) -> dict[str, int]:
    """Bytes by which an `enqueue_many` of so many grows this process at most, and what their ids take of it."""
    fill(1000)
    before = psutil.Process().memory_info().rss
    results = peer.enqueue_many("noop", (ARGS for _ in range(count)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ids = sys.getsizeof(results) + sum(sys.getsizeof(result.id) for result in results)
    return {"grown": max(0, peak - before), "ids": ids}


def size() -> int:
    """Bytes of one process that has imported the app (PSS)."""
    return int(psutil.Process().memory_full_info().pss)


def later(count: int, delay_s: float) -> None:
    """Schedule so many no-ops."""
    task = peer.tasks["noop"].using(run_after=delay_s)
    peer.app.enqueue_many(task.s(*ARGS) for _ in range(count))


def urgent(count: int, gap_s: float) -> None:
    """As `paced`, ahead of all that waits."""
    task = peer.tasks["stamp"].using(priority=50)
    for _ in range(count):
        time.sleep(gap_s)
        task.enqueue(time.monotonic_ns())
    time.sleep(gap_s)


def bulky(count: int, size_bytes: int) -> float:
    """Enqueue tasks with one large argument, in bulk. -> the seconds that took"""
    return send("noop", (("x" * size_bytes,) for _ in range(count)))


def payloads(count: int, size_bytes: int) -> float:
    """Enqueue tasks with one large argument, one by one. -> the seconds that took"""
    text = "x" * size_bytes
    peer.enqueue("noop", "")
    begun = time.perf_counter()
    for _ in range(count):
        peer.enqueue("noop", text)
    return time.perf_counter() - begun


def crowd(connections: int, per_s: float, seconds: float) -> int:
    """Enqueue from so many connections at once, so many tasks a second in all (0: as fast as it goes). -> how many"""
    from prefork import Prefork

    pause_s, sent = connections / per_s if per_s else 0.0, [0] * connections

    def produce(number: int) -> None:
        task = Prefork(f"crowd{number}", os.environ["BENCH_URL"]).task(name="noop", result_ttl=0)(lambda *args: None)
        task.enqueue(*ARGS)
        barrier.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            task.enqueue(*ARGS)
            sent[number] += 1
            time.sleep(pause_s)

    barrier = threading.Barrier(connections)
    threads = [threading.Thread(target=produce, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(sent)


if __name__ == "__main__":
    peer = importlib.import_module(sys.argv[1])
    print(json.dumps(globals()[sys.argv[2]](*json.loads(sys.argv[3]))), flush=True)
    os._exit(0)  # all is sent, and some peers crash when the interpreter ends
