"""Deadlines: soft, an exception in the task; hard, SIGKILL by the master, counted from the task's own start."""

from __future__ import annotations

import pytest

from tests.conftest import Project, until
from tests.process.scene import STEPS, counts, gone, place, state, wait_dead, warm_up
from tests.process.test_shutdown import STUBBORN


@pytest.mark.parametrize("what", STUBBORN.values(), ids=STUBBORN)
def test_a_task_is_killed_at_its_deadline_whatever_it_does(project: Project, what: str) -> None:
    project.add(STEPS)
    worker = project.worker()
    project.tasks.add.enqueue(1).wait(timeout=60)
    result = project.tasks.step.using(timeout=2, max_retries=0).enqueue(1, what)
    until(lambda: project.lines("how"))
    wait_dead(project, result)
    assert result._known["errors"][-1]["ran_s"] >= 2
    assert result.attempts == 1
    assert result.errors[-1].exception_class_path == "prefork.TaskTimeout"
    assert "2 s" in result.errors[-1].message
    pid = int(project.lines("how")[0].split()[1])
    until(lambda: gone(pid))
    until(lambda: len(worker.children()) == 2)
    assert worker.stop() == 0


def test_what_a_timed_out_task_has_started_is_killed_with_it(project: Project) -> None:
    project.add("""
        @app.task(timeout=5, max_retries=0)
        def spawn():
            process = subprocess.Popen(["sleep", "600"])
            note("pids", process.pid)
            process.wait()
    """)
    worker = project.worker()
    result = project.tasks.spawn.enqueue()
    wait_dead(project, result)
    until(lambda: gone(int(project.lines("pids")[0])))
    assert worker.stop() == 0


def test_a_task_is_timed_from_its_start_and_not_from_when_it_was_queued_behind_another(project: Project) -> None:
    project.add("""
        @app.task(name="some", timeout=6, max_retries=0)
        def some(seconds):
            note("some", f"{seconds} {os.getpid()}")
            time.sleep(seconds)
            return seconds
    """)
    worker = project.worker("concurrency = 1")
    some = project.tasks.some
    for result in project.tasks.app.enqueue_many(some.s(0) for _ in range(300)):
        result.wait(timeout=60)
    # All of these are handed over before the first of them turns out to be slow.
    results = project.tasks.app.enqueue_many(some.s(2.0) for _ in range(4))
    assert [result.wait(timeout=60) for result in results] == [2.0] * 4
    assert all(result.attempts == 1 for result in results)
    assert worker.stop() == 0


def test_what_else_the_killed_child_held_is_not_charged(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker("concurrency = 1")
    warm_up(project)
    step = project.tasks.step
    invocations = [step.using(timeout=0.5, max_retries=1).s(0, "while True: pass"), *(step.s(n) for n in range(1, 30))]
    slow, *others = project.tasks.app.enqueue_many(invocations)
    for result in others:
        result.wait(timeout=60)
        assert (result.attempts, result.errors) == (1, [])
    wait_dead(project, slow)
    assert slow.attempts == 2
    ran = counts(project, "steps")
    assert all(ran[str(n)] == 1 for n in range(1, 30))
    assert worker.stop() == 0


def test_a_timed_out_task_is_retried_and_then_a_dead_letter(project: Project) -> None:
    project.add("""
        @app.task(timeout=0.4, max_retries=2, retry_delay=0.1)
        def slow():
            time.sleep(60)
    """)
    worker = project.worker()
    result = project.tasks.slow.enqueue()
    wait_dead(project, result)
    assert result.attempts == 3
    assert [error.exception_class_path for error in result.errors] == ["prefork.TaskTimeout"] * 3
    assert all(error["ran_s"] >= 0.4 for error in result._known["errors"])
    assert state(project, result).get("crashes", 0) == 0
    assert worker.stop() == 0


def test_a_task_within_its_deadline_is_left_alone_also_after_many(project: Project) -> None:
    worker = project.worker("timeout = 6")
    results = [project.tasks.nap.enqueue(n, 2) for n in range(8)]
    assert [result.wait(timeout=60) for result in results] == list(range(8))
    assert all(result.attempts == 1 for result in results)
    assert worker.stop() == 0


def test_the_deadline_of_the_configuration_holds_for_tasks_without_one(project: Project) -> None:
    worker = project.worker("timeout = 0.5")
    result = project.tasks.nap.using(max_retries=0).enqueue(1, 60)
    wait_dead(project, result)
    own = project.tasks.nap.using(timeout=5).enqueue(2, 1)
    assert own.wait(timeout=60) == 2
    assert worker.stop() == 0


SOFT = """
@app.task(soft_timeout=0.3, timeout=3, max_retries=0)
def sync(how):
    try:
        if how == "sleep":
            time.sleep(60)
        elif how == "loop":
            while True: pass
        elif how == "except Exception":
            while True:
                try:
                    time.sleep(60)
                except Exception:
                    note("swallowed")
        elif how == "bare except":
            while True:
                try:
                    time.sleep(60)
                except:
                    note("swallowed")
    finally:
        note("cleaned up")

@app.task(soft_timeout=0.3, timeout=3, max_retries=0)
async def asyn(how):
    import asyncio
    try:
        if how == "sleep":
            await asyncio.sleep(60)
        elif how == "gather":
            await asyncio.gather(asyncio.sleep(60), asyncio.sleep(61))
        elif how == "except Exception":
            while True:
                try:
                    await asyncio.sleep(60)
                except Exception:
                    note("swallowed")
        elif how == "bare except":
            while True:
                try:
                    await asyncio.sleep(60)
                except:
                    note("swallowed")
        elif how == "to_thread":
            await asyncio.to_thread(time.sleep, 0.8)
        elif how == "loop":
            while True: pass
    finally:
        note("cleaned up")

@app.task(soft_timeout=0.3, timeout=5)
def tidy():
    try:
        time.sleep(60)
    except SoftTimeout:
        return "half of it"

@app.task(soft_timeout=0.3, timeout=5)
async def atidy():
    import asyncio
    try:
        await asyncio.sleep(60)
    except SoftTimeout:
        await asyncio.sleep(0.1)
        return "half of it"

@app.task(soft_timeout=0.3)
def quick(n):
    return n

@app.task
def long(n):
    time.sleep(0.6)
    return n
"""


@pytest.mark.parametrize(
    ("task", "how"),
    [("sync", "sleep"), ("sync", "loop"), ("sync", "except Exception"), ("asyn", "sleep"), ("asyn", "gather"),
     ("asyn", "except Exception"), ("asyn", "to_thread")],
)  # fmt: skip
def test_a_soft_timeout_is_an_exception_in_the_task(project: Project, task: str, how: str) -> None:
    project.add(SOFT)
    worker = project.worker()
    result = getattr(project.tasks, task).enqueue(how)
    wait_dead(project, result)
    assert result.errors[-1].exception_class_path == "prefork.SoftTimeout"
    assert "0.3 s" in result.errors[-1].message
    assert project.lines("cleaned up")
    assert not project.lines("swallowed")
    assert worker.stop() == 0


@pytest.mark.parametrize(("task", "how"), [("sync", "bare except"), ("asyn", "bare except"), ("asyn", "loop")])
def test_after_the_soft_timeout_comes_the_hard_one(project: Project, task: str, how: str) -> None:
    project.add(SOFT)
    worker = project.worker()
    result = getattr(project.tasks, task).enqueue(how)
    wait_dead(project, result)
    assert result.errors[-1].exception_class_path == "prefork.TaskTimeout"
    assert not project.lines("cleaned up")
    assert worker.stop() == 0


@pytest.mark.parametrize("task", ["tidy", "atidy"])
def test_a_task_may_end_well_at_its_soft_timeout(project: Project, task: str) -> None:
    project.add(SOFT)
    worker = project.worker()
    assert getattr(project.tasks, task).enqueue().wait(timeout=60) == "half of it"
    assert worker.stop() == 0


def test_a_soft_timeout_is_over_with_its_task(project: Project) -> None:
    project.add(SOFT)
    worker = project.worker("concurrency = 1")
    for n in range(20):
        project.tasks.quick.enqueue(n)
    assert project.tasks.long.enqueue(7).wait(timeout=60) == 7
    assert project.tasks.tidy.enqueue().wait(timeout=60) == "half of it"
    long = project.tasks.long.enqueue(8)
    assert long.wait(timeout=60) == 8
    assert long.attempts == 1
    assert worker.stop() == 0


def test_a_deadline_further_away_than_a_month_is_kept_quietly(project: Project) -> None:
    worker = project.worker("timeout = 365d")
    assert project.tasks.nap.enqueue(1, 0.2).wait(timeout=60) == 1
    later = project.tasks.add.using(run_after=3000 * 86400.0).enqueue(1)
    assert project.tasks.nap.enqueue(2, 0.2).wait(timeout=60) == 2
    assert place(project, later) == "scheduled"
    assert worker.stop() == 0
