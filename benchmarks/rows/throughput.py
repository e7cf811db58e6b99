"""A backlog of tasks that do nothing is worked off: the rate from the first to the last, and what each costs."""

from __future__ import annotations

import os
import time

from benchmarks import gauge
from benchmarks.scene import Scene, Worker


class Drain:
    """A worker that works off what waits, watched from its first task on, so that its start is in nothing."""

    def __init__(self, scene: Scene, concurrency: int, **env: str) -> None:
        self.scene, self.worker = scene, scene.worker(concurrency, **env)
        self.already = scene.count()
        scene.finished(self.worker, self.already + 1, 0.001)
        self.first = Reading(scene, self.worker)

    def last(self, count: int) -> dict[str, float]:
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


def throughput(scene: Scene, concurrency: int) -> dict[str, float]:
    count = scene.scale.pick(200_000, 100_000, 2_000) // scene.side.slow
    scene.call("fill", count)
    return Drain(scene, concurrency).last(count)
