"""What a task knows of itself, and what it starts: follow-ups with its own success, everything else at once."""

from __future__ import annotations

import time
from datetime import datetime

from tests.conftest import PATIENCE_S, Project, until
from tests.process.scene import STEPS, counts, key, place, wait_dead

TASKS = """
@app.task(takes_context=True, timeout=30, max_retries=4, retry_delay=0)
def look(context, wish=0):
    note("look")
    if context.attempt <= wish:
        raise ValueError
    return [context.id, context.attempt, context.retries_left, str(context.deadline), str(context.enqueued_at),
            context.task_name, context.queue_name]

@app.task(takes_context=True)
def slow(context):
    for done in range(0, 101, 10):
        context.progress(done, 100, f"page {done}")
        if done == 50:
            note("half")
            while not (here / "go").exists():
                time.sleep(0.01)

@app.task(takes_context=True)
async def aslow(context):
    import asyncio
    context.progress(1, 2)
    note("half")
    while not (here / "go").exists():
        await asyncio.sleep(0.01)
    return context.attempt

@app.task
def follower(n):
    note("follower", n)
    return n

@app.task(takes_context=True, max_retries=2, retry_delay=0)
def parent(context, fail_until=0, queue="default", n=1, how=""):
    results = [context.enqueue(follower.using(queue_name=queue).s(i)) for i in range(n)]
    note("parent", context.attempt)
    if context.attempt <= fail_until:
        exec(how or "raise ValueError")
    return [result.id for result in results]

@app.task(takes_context=True)
def both(context):
    context.enqueue(follower.using(queue_name="other").s(1))
    context.enqueue(follower.s(2))
    context.enqueue(follower.using(priority=50).s(3))
    context.enqueue(follower.using(run_after=5).s(4))

@app.task(takes_context=True, result_ttl=0)
def silent_parent(context):
    context.enqueue(follower.s(1))

@app.task
def plain():
    result = follower.enqueue(1)
    value = result.wait(timeout=10)
    return [result.id, value]

@app.task
async def aplain():
    result = await follower.aenqueue(2)
    import asyncio
    return await asyncio.to_thread(result.wait, 10)

@app.task(max_retries=0)
def plain_then_fail():
    follower.enqueue(3)
    raise ValueError

@app.task
def plain_many():
    app.enqueue_many(follower.s(n) for n in range(1200))

@app.task(takes_context=True)
def many(context, n):
    for i in range(n):
        context.enqueue(follower.s(i))
"""


def test_a_context_says_which_attempt_of_what_it_is(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    before = time.time()
    result = project.tasks.look.enqueue(2)
    id, attempt, left, deadline, enqueued, name, queue = result.wait(timeout=60)
    assert (id, attempt, left, queue) == (result.id, 3, 2, "default")
    assert name.endswith(".look")
    assert before - 1 < datetime.fromisoformat(enqueued).timestamp() < time.time() + 1
    assert 25 < datetime.fromisoformat(deadline).timestamp() - before < 30 + PATIENCE_S
    other = project.tasks.look.using(queue_name="default", max_retries=1).enqueue()
    assert other.wait(timeout=60)[1:3] == [1, 1]
    assert worker.stop() == 0


def test_progress_is_seen_while_the_task_runs(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    for task in ("slow", "aslow"):
        result = getattr(project.tasks, task).enqueue()
        until(lambda: project.lines("half"))
        until(lambda result=result: result.refresh() or result.progress is not None)  # type: ignore[misc]
        assert result.status == "RUNNING"
        done, total, _ = result.progress
        assert (done, total) in ((0, 100), (10, 100), (20, 100), (30, 100), (40, 100), (50, 100), (1, 2))
        assert result.attempts == 1
        (project.folder / "go").touch()
        result.wait(timeout=60)
        assert result.attempts == 1
        (project.folder / "go").unlink()
        (project.folder / "half").unlink()
    assert worker.stop() == 0


def test_a_follow_up_runs_once_its_parent_has_succeeded(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    result = project.tasks.parent.enqueue(n=3)
    ids = result.wait(timeout=60)
    app = project.tasks.app
    assert [app.result(id).wait(timeout=60) for id in ids] == [0, 1, 2]
    assert worker.stop() == 0


def test_an_attempt_that_fails_spawns_nothing_and_a_repeated_one_spawns_once(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    ok = project.tasks.parent.enqueue(2, n=2)
    ok.wait(timeout=60)
    failed = project.tasks.parent.enqueue(9, n=2)
    wait_dead(project, failed)
    until(lambda: len(project.lines("follower")) >= 2)
    project.tasks.add.enqueue(1).wait(timeout=60)
    assert counts(project, "follower") == {"0": 1, "1": 1}
    assert worker.stop() == 0


def test_an_attempt_whose_child_dies_spawns_nothing(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    project.tasks.parent.enqueue(1, n=2, how="os._exit(1)").wait(timeout=60)
    until(lambda: len(project.lines("follower")) >= 2)
    project.tasks.add.enqueue(1).wait(timeout=60)
    assert counts(project, "follower") == {"0": 1, "1": 1}
    assert worker.stop() == 0


def test_follow_ups_go_to_other_queues_too(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("queues = default, other")
    result = project.tasks.parent.enqueue(1, queue="other", n=3)
    ids = result.wait(timeout=60)
    until(lambda: len(project.lines("follower")) == 3)
    assert counts(project, "follower") == {"0": 1, "1": 1, "2": 1}
    assert [project.tasks.app.result(id).wait(timeout=60) for id in ids] == [0, 1, 2]
    assert worker.stop() == 0


def test_follow_ups_to_a_queue_that_nobody_has_used_before_are_found_by_their_id(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    ids = project.tasks.parent.enqueue(queue="brand-new").wait(timeout=60)
    assert project.tasks.app.result(ids[0]).queue_name == "brand-new"
    assert worker.stop() == 0


def test_follow_ups_keep_their_options(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker("queues = default, other")
    project.tasks.both.enqueue().wait(timeout=60)
    until(lambda: len(project.lines("follower")) == 4)
    assert sorted(project.lines("follower")) == ["1", "2", "3", "4"]
    assert project.lines("follower")[-1] == "4"
    project.tasks.silent_parent.enqueue()
    until(lambda: len(project.lines("follower")) == 5)
    assert worker.stop() == 0


def test_a_thousand_follow_ups_are_committed(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    project.tasks.many.enqueue(1000).wait(timeout=60)
    until(lambda: len(project.lines("follower")) == 1000)
    assert set(counts(project, "follower").values()) == {1}
    assert worker.stop() == 0


def test_follow_ups_beyond_measure_are_an_error_of_the_task(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    result = project.tasks.many.using(max_retries=0).enqueue(20_000)
    wait_dead(project, result)
    assert "follow-ups" in result.errors[-1].message
    assert project.lines("follower") == []
    assert worker.stop() == 0


def test_a_plain_enqueue_inside_a_task_is_accepted_at_once(project: Project) -> None:
    project.add(TASKS)
    worker = project.worker()
    id, value = project.tasks.plain.enqueue().wait(timeout=60)
    assert value == 1
    assert project.tasks.app.result(id).wait(timeout=60) == 1
    assert project.tasks.aplain.enqueue().wait(timeout=60) == 2
    failed = project.tasks.plain_then_fail.enqueue()
    wait_dead(project, failed)
    until(lambda: "3" in project.lines("follower"))
    project.tasks.plain_many.enqueue().wait(timeout=60)
    until(lambda: len(project.lines("follower")) == 1203)
    assert worker.stop() == 0


def test_children_that_only_work_have_no_connection(project: Project) -> None:
    project.add(TASKS)
    project.tasks.app.client.close()
    worker = project.worker("concurrency = 6")
    for result in [project.tasks.add.enqueue(n) for n in range(100)]:
        result.wait(timeout=60)
    own = [c for c in project.server.client.client_list() if c["name"].startswith(f"prefork-{worker.pid}")]
    assert len(own) == 2
    assert worker.stop() == 0


def test_progress_of_a_task_that_is_put_back_charges_nothing(project: Project) -> None:
    project.add(STEPS)
    project.add(TASKS)
    worker = project.worker("shutdown_timeout = 0")
    result = project.tasks.slow.enqueue()
    until(lambda: project.lines("half"))
    until(lambda: result.refresh() or result.progress is not None)
    assert worker.stop() == 0
    result.refresh()
    assert (result.status, place(project, result)) == ("READY", "pending")
    assert result.attempts == 0
    (project.folder / "go").touch()
    worker = project.worker()
    result.wait(timeout=60)
    assert result.attempts == 1
    assert project.server.client.hlen(key("state")) == 0
    assert worker.stop() == 0
