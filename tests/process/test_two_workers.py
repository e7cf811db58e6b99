"""Several workers on one queue, and nothing waits behind a long task while anybody is free."""

from __future__ import annotations

import signal
from collections import Counter

from prefork import TaskStatus
from tests.conftest import SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, active, counts, gone, key, place

QUICK = """
@app.task(name="quick", result_ttl=0)
def quick(n, gate=""):
    note("quick", f"{n} {os.getppid()}")
    if gate:
        note("slow", n)
        while not (here / gate).exists():
            time.sleep(0.01)
        note("slow ended", n)
"""


def test_two_workers_run_each_task_once(project: Project) -> None:
    project.add(QUICK)
    workers = [project.worker(), project.worker()]
    quick = project.tasks.quick
    project.tasks.app.enqueue_many(quick.s(n) for n in range(8000))
    until(lambda: len(project.lines("quick")) >= 8000)
    assert [worker.stop() for worker in workers] == [0, 0]
    lines = [line.split() for line in project.lines("quick")]
    assert sorted(int(n) for n, _ in lines) == list(range(8000))
    assert project.server.client.hlen(key("m")) == 0


def test_two_workers_share_long_tasks_fairly(project: Project) -> None:
    project.add(QUICK)
    workers = [project.worker(), project.worker()]
    results = [project.tasks.quick.enqueue(n, "go") for n in range(16)]
    until(lambda: len(project.lines("slow")) == 4)
    masters = Counter(int(line.split()[1]) for line in project.lines("quick"))
    assert masters == {worker.pid: 2 for worker in workers}
    until(lambda: [place(project, result) for result in results].count("active") == 4, what="nobody keeps more")
    project.let_go()
    until(lambda: len(project.lines("slow ended")) == 16)
    assert [worker.stop() for worker in workers] == [0, 0]


def test_workers_that_come_and_go_under_load_lose_and_repeat_nothing(project: Project) -> None:
    project.add(QUICK)
    project.tasks.app.enqueue_many(project.tasks.quick.s(n) for n in range(12_000))
    first = project.worker()
    for seen in (1500, 4000, 7000):
        until(lambda seen=seen: len(project.lines("quick")) > seen)  # type: ignore[misc]
        second = project.worker()
        assert first.stop() == 0
        first = second
    until(lambda: len(project.lines("quick")) >= 12_000)
    assert first.stop() == 0
    assert sorted(int(line.split()[0]) for line in project.lines("quick")) == list(range(12_000))


def test_one_worker_takes_over_at_once_from_another_that_was_killed(project: Project) -> None:
    victim, heir = project.worker("lease = 60"), project.worker("lease = 60")
    results = [project.tasks.hold.enqueue(n) for n in range(4)]
    until(lambda: len(project.lines("started")) == 4)
    held = active(project)
    assert held == 4
    clock = Clock()
    victim.send(signal.SIGKILL)
    victim.wait()
    until(lambda: "took over from worker" in heir.log)
    assert clock.s < 20 + SLACK_S, "a beat, and not the lease"
    project.let_go()
    assert sorted(result.wait(timeout=60) for result in results) == [0, 1, 2, 3]
    started = [line.split()[0] for line in project.lines("started")]
    assert sorted(started.count(str(n)) for n in range(4)) == [1, 1, 2, 2]
    assert sum(result.attempts for result in results) == 4
    assert heir.stop() == 0


def test_short_tasks_do_not_wait_behind_a_long_one(project: Project) -> None:
    project.add(QUICK)
    worker = project.worker()
    quick = project.tasks.quick
    quick.enqueue(-1, "go")
    until(lambda: project.lines("slow"))
    project.tasks.app.enqueue_many(quick.s(n) for n in range(500))
    until(lambda: len(project.lines("quick")) == 501)
    project.let_go()
    assert worker.stop() == 0


def test_what_waits_behind_a_task_that_was_fast_until_now_runs_on_the_other_child(project: Project) -> None:
    project.add(QUICK)
    worker = project.worker()
    quick = project.tasks.quick
    project.tasks.app.enqueue_many(quick.s(-1) for _ in range(500))
    until(lambda: len(project.lines("quick")) == 500)
    for round in range(3):
        before = len(project.lines("quick"))
        ended = len(project.lines("slow ended"))
        calls = [quick.s(-2, f"go{round}" if n == 20 else "") for n in range(60)]
        project.tasks.app.enqueue_many(calls)
        until(lambda before=before: len(project.lines("quick")) == before + 60)  # type: ignore[misc]
        project.let_go(f"go{round}")
        until(lambda ended=ended: len(project.lines("slow ended")) == ended + 1)  # type: ignore[misc]
    assert worker.stop() == 0


def test_what_one_worker_cannot_start_another_one_gets(project: Project) -> None:
    project.add(QUICK)
    stuck = project.worker()
    quick = project.tasks.quick
    project.tasks.app.enqueue_many(quick.s(-1) for _ in range(500))
    until(lambda: len(project.lines("quick")) == 500)
    # Both children get one that takes long, each amid many that are short.
    project.tasks.app.enqueue_many(quick.s(-2, "go" if n in (20, 60) else "") for n in range(120))
    until(lambda: len(project.lines("slow")) == 2)
    other = project.worker()
    until(lambda: len(project.lines("quick")) == 620)
    project.let_go()
    assert [worker.stop() for worker in (stuck, other)] == [0, 0]


def test_an_idle_worker_gets_what_a_busy_one_cannot_start_without_being_started_anew(project: Project) -> None:
    project.add(QUICK)
    workers = [project.worker(), project.worker()]
    quick = project.tasks.quick
    project.tasks.app.enqueue_many(quick.s(-1) for _ in range(1000))
    until(lambda: len(project.lines("quick")) == 1000)
    project.tasks.app.enqueue_many(quick.s(-2, "go" if n in (20, 60, 100) else "") for n in range(200))
    until(lambda: len(project.lines("quick")) == 1200)
    project.let_go()
    assert [worker.stop() for worker in workers] == [0, 0]


def test_long_tasks_of_a_name_never_seen_are_started_in_their_order(project: Project) -> None:
    project.add(QUICK)
    worker = project.worker("concurrency = 1")
    project.tasks.app.enqueue_many(project.tasks.quick.s(-1) for _ in range(400))
    until(lambda: len(project.lines("quick")) == 400)
    results = [project.tasks.nap.enqueue(n, 0.1) for n in range(20)]
    for result in results:
        result.wait(timeout=60)
    assert [int(line.split()[0]) for line in project.lines("started")] == list(range(20))
    assert worker.stop() == 0


def test_a_worker_that_stood_still_beyond_its_lease_is_fenced(project: Project) -> None:
    project.add("""
        @app.task
        def gated(n):
            note("gated", f"{n} {os.getppid()}")
            while not (here / "go").exists():
                time.sleep(0.01)
            return os.getppid()
    """)
    paused = project.worker("lease = 5\nconcurrency = 1")
    result = project.tasks.gated.enqueue(1)
    until(lambda: project.lines("gated"))
    paused.send(signal.SIGSTOP)
    heir = project.worker("lease = 5\nconcurrency = 1")
    until(lambda: len(project.lines("gated")) == 2)
    assert "its lease has ended" in heir.log
    # The child of the paused one ends now; nobody must believe what it says.
    (project.folder / "go").touch()
    assert result.wait(timeout=60) == heir.pid
    paused.send(signal.SIGCONT)
    until(lambda: "lost the lease" in paused.log)
    result.refresh()
    assert result.return_value == heir.pid
    assert result.status is TaskStatus.SUCCESSFUL
    assert heir.stop() == 0
    again = project.tasks.gated.enqueue(2)
    assert again.wait(timeout=60) == paused.pid
    assert len([line for line in paused.log.splitlines() if "lost the lease" in line]) == 1
    assert paused.stop() == 0
    assert project.server.client.zcard(key("leases")) == 0


def test_what_a_fenced_worker_is_running_is_stopped(project: Project) -> None:
    paused = project.worker("lease = 5")
    result = project.tasks.hold.enqueue(1)
    until(lambda: project.lines("started"))
    pid = int(project.lines("started")[0].split()[1])
    paused.send(signal.SIGSTOP)
    heir = project.worker("lease = 5")
    until(lambda: len(project.lines("started")) == 2)
    paused.send(signal.SIGCONT)
    until(lambda: gone(pid))
    project.let_go()
    until(lambda: len(paused.children()) == 2)
    assert result.wait(timeout=60) == 1
    assert project.lines("ended") == ["1"]
    assert result.attempts == 1
    assert [worker.stop() for worker in (heir, paused)] == [0, 0]


def test_a_short_pause_within_the_lease_changes_nothing(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker("lease = 30")
    heir = project.worker("lease = 30\nqueues = elsewhere")
    result = project.tasks.nap.enqueue(1, 0.3)
    until(lambda: project.lines("started"))
    worker.send(signal.SIGSTOP)
    until(lambda: project.lines("ended"))
    worker.send(signal.SIGCONT)
    assert result.wait(timeout=60) == 1
    assert place(project, result) == "finished"
    assert counts(project, "ended") == {"1": 1}
    assert "lost the lease" not in worker.log
    assert [worker.stop(), heir.stop()] == [0, 0]
