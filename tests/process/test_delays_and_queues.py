"""When and in which order: delays, priorities, strict and weighted queues."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import Clock, key, place

TASKS = """
@app.task
def stamp(n=0):
    now = time.time()
    note("stamp", n)
    return now

@app.task(result_ttl=0)
def mark(n):
    note("mark", n)
"""


@pytest.mark.parametrize("how", ["seconds", "timedelta", "moment"])
def test_a_delayed_task_starts_at_its_time_on_an_idle_worker(project: Project, how: str) -> None:
    project.add(TASKS)
    worker = project.worker("lease = 60")  # it looks every 20 s by itself
    project.tasks.stamp.enqueue().wait(timeout=60)
    late = []
    for n in range(5):
        delay_s = 0.1 + n * 0.05
        begun = time.time()
        run_after = {"seconds": delay_s, "timedelta": timedelta(seconds=delay_s),
                     "moment": datetime.now(UTC) + timedelta(seconds=delay_s)}[how]  # fmt: skip
        result = project.tasks.stamp.using(run_after=run_after).enqueue()
        late.append(result.wait(timeout=60) - begun - delay_s)
    assert all(-0.005 < s < SLACK_S for s in late)
    assert worker.stop() == 0


def test_delays_out_of_order_start_in_the_order_of_their_times(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("concurrency = 1\nlease = 60")
    until(lambda: [c for c in project.server.client.client_list() if c["cmd"] == "bzpopmin"])
    begun = datetime.now(UTC)
    delays = [6.3, 5.7, 6.0, 5.5, 6.6, 5.85]
    results = [project.tasks.stamp.using(run_after=begun + timedelta(seconds=s)).enqueue(s) for s in delays]
    late = [result.wait(timeout=60) - begun.timestamp() - s for result, s in zip(results, delays, strict=True)]
    assert [float(line) for line in project.lines("stamp")] == sorted(delays)
    assert all(-0.01 < s < SLACK_S for s in late)
    assert worker.stop() == 0


def test_a_delay_that_is_over_already_runs_at_once(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("lease = 60")
    clock = Clock()
    project.tasks.stamp.using(run_after=datetime.now(UTC) - timedelta(days=3)).enqueue().wait(timeout=60)
    project.tasks.stamp.using(run_after=0.0).enqueue().wait(timeout=60)
    assert clock.s < 2 * SLACK_S
    assert worker.stop() == 0


def test_delayed_tasks_start_when_due_on_a_busy_worker_too(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("concurrency = 2")
    long = project.tasks.hold.enqueue(1)
    until(lambda: project.lines("started"))
    begun = time.time()
    assert project.tasks.stamp.using(run_after=0.3).enqueue().wait(timeout=60) - begun < 0.3 + SLACK_S
    assert place(project, long) == "active"
    project.let_go()
    assert worker.stop() == 0


def test_what_was_delayed_while_no_worker_ran_starts_with_the_next_one(project: Project) -> None:
    project.add(TASKS)
    results = [project.tasks.stamp.using(run_after=0.05 * n).enqueue(n) for n in range(6)]
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 0.15)
    worker = project.worker()
    for result in results:
        result.wait(timeout=60)
    assert worker.stop() == 0


def test_many_that_are_due_at_once_all_start(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    mark = project.tasks.mark.using(run_after=datetime.now(UTC) + timedelta(seconds=0.7))
    project.tasks.app.enqueue_many(mark.s(n) for n in range(2000))
    until(lambda: len(project.lines("mark")) == 2000)
    assert len(set(project.lines("mark"))) == 2000
    assert worker.stop() == 0


def test_higher_priorities_go_first(project: Project) -> None:
    project.add(TASKS)
    order = [0, -100, 100, 5, -5, 0, 100, 50, -100, 0]
    for priority in order:
        project.tasks.mark.using(priority=priority).enqueue(priority)
    project.tasks.mark.using(priority=7, run_after=0.001).enqueue(7)
    worker = project.worker("concurrency = 1")
    until(lambda: len(project.lines("mark")) == len(order) + 1)
    assert [int(line) for line in project.lines("mark")] == sorted([*order, 7], reverse=True)
    assert worker.stop() == 0


def test_among_equals_the_first_in_is_the_first_out(project: Project) -> None:
    project.add(TASKS)
    for n in range(300):
        project.tasks.mark.enqueue(n)
    worker = project.worker("concurrency = 1")
    until(lambda: len(project.lines("mark")) == 300)
    assert [int(line) for line in project.lines("mark")] == list(range(300))
    assert worker.stop() == 0


def test_first_in_first_out_holds_when_tasks_turn_out_to_be_slow(project: Project) -> None:
    project.add("""
        @app.task(result_ttl=0)
        def some(n, seconds):
            note("some", n)
            time.sleep(seconds)
    """)
    worker = project.worker("concurrency = 1")
    some = project.tasks.some
    project.tasks.app.enqueue_many(some.s(-1, 0) for _ in range(400))
    until(lambda: len(project.lines("some")) == 400)
    project.tasks.app.enqueue_many(some.s(n, 0.06 if n % 5 == 0 else 0) for n in range(60))
    until(lambda: len(project.lines("some")) == 460)
    assert [int(line) for line in project.lines("some")[400:]] == list(range(60))
    assert worker.stop() == 0


def test_the_first_of_strict_queues_goes_first(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("queues = mail, default\nconcurrency = 1")
    blocker = project.tasks.hold.using(queue_name="mail").enqueue(0)
    until(lambda: project.lines("started"))
    until(lambda: not project.server.client.exists(key("idle")), what="nothing is handed to it any more")
    for n in range(20):
        project.tasks.mark.using(queue_name=("default", "mail")[n % 2]).enqueue(("default", "mail")[n % 2])
    project.let_go()
    blocker.wait(timeout=60)
    until(lambda: len(project.lines("mark")) == 20)
    assert project.lines("mark") == ["mail"] * 10 + ["default"] * 10
    assert worker.stop() == 0


def test_weighted_queues_share_by_their_weights_and_none_starves(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("queues = a:3, b:1\nconcurrency = 1")
    blocker = project.tasks.hold.using(queue_name="b").enqueue(0)
    until(lambda: project.lines("started"))
    for name in "ab":
        mark = project.tasks.mark.using(queue_name=name)
        project.tasks.app.enqueue_many(mark.s(name) for _ in range(400))
    project.let_go()
    blocker.wait(timeout=60)
    until(lambda: len(project.lines("mark")) == 800)
    share = project.lines("mark")[:400].count("a") / 400
    assert 0.6 < share < 0.9
    assert worker.stop() == 0


@pytest.mark.parametrize("queues", ["a, b", "a:5, b:1"])
def test_a_worker_blocked_on_two_queues_wakes_for_either(project: Project, queues: str) -> None:
    project.add(TASKS)
    worker = project.worker(f"queues = {queues}\nlease = 60")
    slowest = 0.0
    for n in range(150):
        clock = Clock()
        project.tasks.stamp.using(queue_name="ab"[n * 7 % 3 % 2]).enqueue().wait(timeout=60)
        slowest = max(slowest, clock.s)
    assert slowest < SLACK_S
    assert worker.stop() == 0


def test_an_idle_worker_asks_the_broker_hardly_anything(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("lease = 60\nqueues = a, b")
    project.tasks.stamp.using(queue_name="a").enqueue().wait(timeout=60)
    client = project.server.client

    def in_two_seconds() -> int:
        before = client.info("stats")["total_commands_processed"]
        time.sleep(2)
        return int(client.info("stats")["total_commands_processed"]) - before

    until(lambda: in_two_seconds() <= 10, what="it is still busy with what came before")
    assert worker.stop() == 0
