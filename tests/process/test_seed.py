"""The seed that this grew from: what it did, point by point, is kept."""

from __future__ import annotations

import random
import signal
import time

from prefork.retry import default_retry_delay
from tests.conftest import SLACK_S, Project, until
from tests.process.scene import Clock, active, key, pending, place, state, wait_dead


def test_seed_a_shutdown_never_waits_on_an_empty_queue(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 60")
    project.tasks.add.enqueue(1).wait(timeout=60)
    until(lambda: [c for c in project.server.client.client_list() if c["cmd"] == "bzpopmin"], what="it is blocked")
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < SLACK_S


def test_seed_b_no_more_tasks_run_at_once_than_there_are_children(project: Project) -> None:
    project.add("""
        @app.task
        def count():
            note("n", "+")
            while len((here / "n").read_text().split()) < 3:
                time.sleep(0.01)
            time.sleep(0.1)
            note("n", "-")
    """)
    worker = project.worker("concurrency = 3")
    results = [project.tasks.count.enqueue() for _ in range(15)]
    for result in results:
        result.wait(timeout=60)
    running, most = 0, 0
    for sign in project.lines("n"):
        running += 1 if sign == "+" else -1
        most = max(most, running)
    assert most == 3
    assert worker.stop() == 0


def test_seed_c_whatever_a_task_raises_becomes_an_error_and_the_worker_goes_on(project: Project) -> None:
    project.add("""
        @app.task(max_retries=0)
        def panic():
            raise SystemExit("all is lost")
    """)
    worker = project.worker()
    result = project.tasks.panic.enqueue()
    wait_dead(project, result)
    assert result.errors[-1].exception_class_path == "builtins.SystemExit"
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_seed_d_each_task_is_settled_as_done_retry_or_dead(project: Project) -> None:
    project.add("""
        @app.task(max_retries=2, retry_delay=0.2)
        def fail(times):
            note("fail")
            if len((here / "fail").read_text().splitlines()) <= times:
                raise ValueError
            return "done"
    """)
    worker = project.worker()
    result = project.tasks.fail.enqueue(9)
    for retried in (1, 2):
        until(lambda retried=retried: state(project, result).get("retried", 0) >= retried)  # type: ignore[misc]
    wait_dead(project, result)
    assert result.attempts == 3
    (project.folder / "fail").unlink()
    assert project.tasks.fail.enqueue(2).wait(timeout=60) == "done"
    assert worker.stop() == 0


def test_seed_e_a_stop_waits_for_what_runs_then_ends_it_and_restores_the_unfinished(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 5")
    short, long = project.tasks.hold.enqueue(0), project.tasks.nap.enqueue(1, 60)
    until(lambda: len(project.lines("started")) == 2)
    behind = project.tasks.nap.enqueue(2, 0)
    clock = Clock()
    worker.send(signal.SIGTERM)
    worker.wait_for("stopping")
    project.let_go()
    assert worker.wait() == 0
    assert 4.8 < clock.s < 5 + SLACK_S
    assert short.wait(timeout=60) == 0
    assert pending(project) == [long.id, behind.id]


def test_seed_f_restores_before_it_starts(project: Project) -> None:
    ghost = project.worker("concurrency = 1")
    first = project.tasks.hold.enqueue(0)
    until(lambda: project.lines("started"))
    ghost.process.kill()
    ghost.wait()
    others = [project.tasks.nap.enqueue(n, 0) for n in range(1, 5)]
    assert active(project) == 1
    assert place(project, first) == "active"
    worker = project.worker("concurrency = 1")
    project.let_go()
    for result in [first, *others]:
        result.wait(timeout=60)
    assert [line.split()[0] for line in project.lines("started")] == ["0", "0", "1", "2", "3", "4"]
    assert worker.stop() == 0


def test_seed_g_a_retry_is_delayed_by_sidekiqs_formula(project: Project) -> None:
    project.add("""
        @app.task
        def fail():
            raise ValueError
    """)
    worker = project.worker()
    result = project.tasks.fail.enqueue()
    for retried in range(3):
        until(lambda retried=retried: state(project, result).get("retried") == retried + 1)  # type: ignore[misc]
        until(lambda: place(project, result) == "scheduled")
        due_ms = project.server.client.zscore(key("scheduled"), result.id)
        delay_s = due_ms / 1000 - time.time()
        least = retried**4 + 15
        assert least - SLACK_S < delay_s <= least + 29 * (retried + 1) + 1
        project.server.client.zadd(key("scheduled"), {result.id: 1})
        project.tasks.add.enqueue(1).wait(timeout=60)
    assert worker.stop() == 0
    random.seed(1)
    assert all(c**4 + 15 <= default_retry_delay(c) <= c**4 + 15 + 29 * (c + 1) for c in range(26) for _ in range(50))
