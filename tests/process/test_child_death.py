"""The death of a child, by every way to die: an outcome at once, charged only to what was running."""

from __future__ import annotations

import os
import signal

import pytest

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, counts, gone, lives, place, wait_dead, warm_up

WAYS_TO_DIE = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "abort": "os.abort()",
    "exit_0": "os._exit(0)",
    "exit_3": "os._exit(3)",
    "closed_pipes": "os.closerange(3, 256)",
}


@pytest.mark.parametrize("how", WAYS_TO_DIE.values(), ids=WAYS_TO_DIE)
def test_a_child_that_dies_charges_only_what_it_was_running(project: Project, how: str) -> None:
    project.add(STEPS)
    worker = project.worker()
    warm_up(project)
    step = project.tasks.step
    results = list(project.tasks.app.enqueue_many(step.s(n, how if n == 60 else "") for n in range(200)))
    deadly = results.pop(60)
    for result in results:
        assert result.wait(timeout=60) is not None
        assert (result.attempts, result.errors) == (1, [])
    wait_dead(project, deadly)
    assert deadly.attempts == 3
    assert [error.exception_class_path for error in deadly.errors] == ["prefork.ChildDied"] * 3
    ran = counts(project, "steps")
    assert ran.pop("60") == 3
    del ran["-1"]
    assert set(ran.values()) == {1}
    until(lambda: len(worker.children()) == 2)
    assert worker.stop() == 0


def test_a_child_killed_from_outside_is_replaced_at_once_and_its_message_runs_again(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.hold.enqueue(1)
    until(lambda: project.lines("started"))
    pid = int(project.lines("started")[0].split()[1])
    clock = Clock()
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(project.lines("started")) == 2)
    assert clock.s < SLACK_S
    project.let_go()
    assert result.wait(timeout=60) == 1
    assert result.attempts == 2
    assert result.errors[0].exception_class_path == "prefork.ChildDied"
    assert "SIGKILL" in result.errors[0].message
    assert len(project.lines("ended")) == 1
    line = next(line for line in worker.log.splitlines() if f"pid {pid}" in line)
    assert "hold" in line
    assert result.id in line
    assert "SIGKILL" in line
    assert worker.stop() == 0


def test_an_idle_child_that_is_killed_is_replaced_and_nothing_is_charged(project: Project) -> None:
    worker = project.worker()
    project.tasks.add.enqueue(1).wait(timeout=60)
    before = until(lambda: len(worker.children()) == 2 and worker.children())
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(worker.children()) == 2 and not set(worker.children()) & set(before))
    results = [project.tasks.add.enqueue(n) for n in range(20)]
    assert [result.wait(timeout=60) for result in results] == [n + 2 for n in range(20)]
    assert all(result.attempts == 1 for result in results)
    assert worker.stop() == 0


def test_a_task_that_allocates_beyond_its_limit_becomes_an_outcome(project: Project) -> None:
    project.add("""
        @app.task(max_retries=0)
        def gorge():
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
            kept = []
            while True:
                kept.append(bytearray(1 << 24))
    """)
    worker = project.worker()
    result = project.tasks.gorge.enqueue()
    until(lambda: place(project, result) == "dead")
    result.refresh()
    assert result.errors[-1].exception_class in ("MemoryError", "ChildDied")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_children_of_one_group_killed_all_at_once_cost_no_message(project: Project) -> None:
    worker = project.worker("concurrency = 8")
    results = [project.tasks.nap.enqueue(n, 0.3) for n in range(16)]
    until(lambda: len(project.lines("started")) >= 8)
    for pid in worker.children():
        os.kill(pid, signal.SIGKILL)
    assert sorted(result.wait(timeout=60) for result in results) == list(range(16))
    assert worker.stop() == 0


def test_many_poison_messages_do_not_keep_others_waiting(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker()
    step = project.tasks.step
    poison = project.tasks.app.enqueue_many(step.s(n, "os._exit(1)") for n in range(6))
    good = project.tasks.app.enqueue_many(step.s(n) for n in range(100, 130))
    for result in good:
        assert result.wait(timeout=60) is not None
    for result in poison:
        wait_dead(project, result)
    assert all(result.attempts == 3 for result in poison)
    assert worker.stop() == 0


def test_deaths_of_one_child_leave_the_tasks_of_others_alone(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker("concurrency = 3")
    long = project.tasks.nap.enqueue(1, 2.5)
    until(lambda: project.lines("started"))
    deadly = [project.tasks.step.enqueue(n, "os._exit(1)") for n in range(3)]
    for result in deadly:
        wait_dead(project, result)
    assert long.wait(timeout=60) == 1
    assert long.attempts == 1
    assert worker.stop() == 0


def test_a_hook_that_always_fails_backs_off_is_logged_and_does_not_keep_the_worker_from_stopping(
    project: Project,
) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots")
            raise ConnectionError("no database today")
    """)
    worker = project.worker(wait=False)
    clock = Clock()
    until(lambda: "the next one starts in" in worker.log)
    until(lambda: clock.s > 2)
    assert len(project.lines("boots")) < 14
    assert "no database today" in worker.log
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < SLACK_S


def test_a_hook_that_kills_its_child_backs_off_too(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots")
            os._exit(5)
    """)
    worker = project.worker(wait=False)
    clock = Clock()
    until(lambda: "the next one starts in" in worker.log)
    until(lambda: clock.s > 1.5)
    assert len(project.lines("boots")) < 14
    assert worker.stop() == 0


def test_all_children_are_there_again_once_a_failing_hook_succeeds(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots")
            if len((here / "boots").read_text().splitlines()) < 9:
                raise ConnectionError("not yet")
    """)
    worker = project.worker("concurrency = 4")
    results = [project.tasks.nap.enqueue(n, 0.5) for n in range(4)]
    for result in results:
        result.wait(timeout=60)
    until(lambda: len(worker.children()) == 4, what="all children are there")
    assert worker.stop() == 0


def test_a_stopped_child_is_killed_at_its_deadline(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.nap.using(timeout=5, max_retries=0).enqueue(1, 60)
    until(lambda: project.lines("started"))
    pid = int(project.lines("started")[0].split()[1])
    os.kill(pid, signal.SIGSTOP)
    wait_dead(project, result)
    until(lambda: gone(pid))
    assert result.errors[-1].exception_class == "TaskTimeout"
    assert worker.stop() == 0
    assert not lives(worker.pid)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_child_that_was_stopped_while_it_had_nothing_to_do_is_replaced(project: Project, concurrency: int) -> None:
    worker = project.worker(f"concurrency = {concurrency}")
    project.tasks.add.enqueue(1).wait(timeout=60)
    children = worker.children()
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    result = project.tasks.add.enqueue(3)
    assert result.wait(timeout=60) == 5
    assert "did not begin with what it was given" in worker.log
    assert not set(children) & set(worker.children()) or concurrency == 2
    assert worker.stop() == 0
