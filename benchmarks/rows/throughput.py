"""A backlog of tasks that do nothing is worked off: the rate from the first to the last, and what each costs."""

from __future__ import annotations

import os
import time
from functools import partial

from benchmarks import gauge
from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene, Worker
from benchmarks.sides import LIMIT, PREFORK


class Drain:
    """A worker that works off what waits, watched from its first task on, so that its start is in nothing.

    `already`: no-ops that had run before, without those that are meant.
    """

    def __init__(self, scene: Scene, worker: Worker, already: int) -> None:
        self.scene, self.worker, self.already = scene, worker, already
        scene.finished(worker, already + 1, 0.001)
        self.first = Reading(scene, worker)

    def last(self, count: int) -> Values:
        """Wait until so many have run. -> rate, and microseconds of CPU and commands for each task"""
        self.scene.finished(self.worker, self.already + count)
        first, last = self.first, Reading(self.scene, self.worker)
        tasks = max(1, last.count - first.count)
        server_s, commands, all_commands = last.load.since(first.load)
        took_s, worker_s = last.at_s - first.at_s, last.worker_s - first.worker_s
        others_s = last.busy_s - first.busy_s - worker_s - server_s - (last.own_s - first.own_s)
        return {
            "rate": tasks / took_s,
            "master_us": (last.master_s - first.master_s) / tasks * 1e6,
            "worker_us": worker_s / tasks * 1e6,
            "server_us": server_s / tasks * 1e6,
            "cpu_us": (worker_s + server_s) / tasks * 1e6,
            "commands": commands / tasks,
            "all_commands": all_commands / tasks,
            "others": max(0.0, others_s) / took_s / (os.cpu_count() or 1) * 100,
        }


class Reading:
    """What has been used until now."""

    def __init__(self, scene: Scene, worker: Worker) -> None:
        # The order matters: what is used while this reads belongs to the tasks that are counted with it.
        self.at_s, self.count = time.perf_counter(), scene.count()
        family = worker.family()
        self.master_s, self.worker_s = gauge.cpu_s([worker.pid]), gauge.cpu_s(family)
        self.load = gauge.Load(scene.redis)
        self.busy_s, self.own_s = gauge.busy_s(), time.process_time()


def throughput(scene: Scene, concurrency: int) -> Values:
    count = scene.scale.pick(200_000, 100_000, 2_000) // scene.side.slow
    scene.call("fill", count)
    return Drain(scene, scene.worker(concurrency), 0).last(count)


def row(concurrency: int) -> Row:
    figures = (
        Figure("rate", f"no-op tasks/s, {concurrency} children, of the bare limit", ">= 0.5", "", LIMIT),
        Figure("rate", f"the same, {concurrency} children", "", "/s"),
        Figure("rate", "the same, of Celery's", ">= 60", "x", "celery"),
        Figure("rate", "the same, of the fastest peer's", ">= 5", "x", "most"),
        Figure("worker_us", "CPU of the worker a task", "", "µs"),
        Figure("master_us", "CPU of its master a task", "", "µs"),
        Figure("cpu_us", "CPU of worker and server a task, of the bare limit", "", "x", LIMIT),
        Figure("worker_us", "CPU of the worker, of Celery's", "< 0.02", "x", "celery"),
        Figure("worker_us", "CPU of the worker, of the thriftiest peer's", "< 0.2", "x", "least"),
        Figure("server_us", "CPU of the server a task", "", "µs"),
        Figure("commands", "commands a task", "< 0.2"),
        Figure("all_commands", "commands a task, with those inside of scripts"),
        Figure("others", "what others took of the machine meanwhile", "", "%"),
    )
    compared = "rate", "worker_us", "server_us", "all_commands"
    name, sides = f"throughput-{concurrency}", (LIMIT, PREFORK, PEERS)
    return Row(name, partial(throughput, concurrency=concurrency), figures, sides, (5, 2, 1), compared)


ROWS = row(2), row(10)
