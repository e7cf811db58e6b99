"""A worker's own life: recycling, --burst, --check, what its processes are called."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import PATIENCE_S, Project, until
from tests.process.scene import Clock, counts, gone, key, place, wait_dead

PIDS = """
@app.task(name="who", result_ttl=0)
def who(n):
    note("who", f"{n} {os.getpid()}")
"""


@pytest.mark.parametrize("most", [1, 5, 200])
def test_children_are_recycled_after_their_share_and_nothing_is_lost(project: Project, most: int) -> None:
    project.add(PIDS)
    total = 60 if most == 1 else 1500 if most == 200 else 300
    worker = project.worker(f"max_tasks_per_child = {most}\nconcurrency = 3")
    master = psutil.Process(worker.pid)
    project.tasks.app.enqueue_many(project.tasks.who.s(n) for n in range(total))
    alive = 0
    while len(project.lines("who")) < total:
        alive = max(alive, len(master.children()))
        assert worker.process.poll() is None
    assert alive <= 3
    lines = [line.split() for line in project.lines("who")]
    assert sorted(int(n) for n, _ in lines) == list(range(total))
    by_child = counts(project, "who")
    assert set(by_child.values()) == {1}
    shares: dict[str, int] = {}
    for _, pid in lines:
        shares[pid] = shares.get(pid, 0) + 1
    assert max(shares.values()) <= most
    assert len(shares) >= total / most
    assert "ERROR" not in worker.log
    assert worker.stop() == 0


def test_recycled_children_are_replaced_without_a_word_of_warning(project: Project) -> None:
    worker = project.worker("max_tasks_per_child = 1")
    for n in range(12):
        assert project.tasks.add.enqueue(n).wait(timeout=60) == n + 2
    until(lambda: len(worker.children()) == 2)
    assert not [line for line in worker.log.splitlines() if "WARNING" in line and "run as root" not in line]
    assert worker.stop() == 0


def test_burst_runs_all_that_is_there_and_ends(project: Project) -> None:
    project.add(PIDS)
    project.add("""
        @app.task(max_retries=0)
        def fail():
            raise ValueError
    """)
    app = project.tasks.app
    app.enqueue_many(project.tasks.who.s(n) for n in range(500))
    naps = [project.tasks.nap.enqueue(n, 0.2) for n in range(3)]
    failed = project.tasks.fail.enqueue()
    ranked = project.tasks.add.using(priority=-3).enqueue(1)
    worker = project.worker("", "--burst", wait=False)
    assert worker.wait() == 0
    assert len(project.lines("who")) == 500
    assert [result.wait(timeout=60) for result in naps] == [0, 1, 2]
    assert ranked.wait(timeout=60) == 3
    wait_dead(project, failed)


def test_burst_on_an_empty_queue_ends_at_once(project: Project) -> None:
    clock = Clock()
    worker = project.worker("queues = a, b:c".replace("b:c", "b"), "--burst", wait=False)
    assert worker.wait() == 0
    assert clock.s < PATIENCE_S / 3, "it waits for nothing, half a minute of it at a time"


def test_burst_drains_several_queues_and_follow_ups_too(project: Project) -> None:
    project.add("""
        @app.task(takes_context=True)
        def chain(context, n):
            note("chain", n)
            if n:
                context.enqueue(chain.using(queue_name="ab"[n % 2]).s(n - 1))
    """)
    project.tasks.chain.using(queue_name="a").enqueue(40)
    worker = project.worker("queues = a:1, b:1", "--burst", wait=False)
    assert worker.wait() == 0
    assert project.lines("chain") == [str(n) for n in range(40, -1, -1)]


def test_burst_leaves_what_is_not_due(project: Project) -> None:
    later = project.tasks.add.using(run_after=60).enqueue(1)
    worker = project.worker("", "--burst", wait=False)
    assert worker.wait() == 0
    assert place(project, later) == "scheduled"


def test_burst_can_be_stopped(project: Project) -> None:
    result = project.tasks.nap.enqueue(1, 60)
    worker = project.worker("shutdown_timeout = 0", "--burst")
    until(lambda: project.lines("started"))
    assert worker.stop() == 0
    assert place(project, result) == "pending"


def test_check_says_in_one_line_that_all_is_well_and_starts_nothing(project: Project) -> None:
    result = project.tasks.add.enqueue(1)
    worker = project.worker("", "--check", wait=False)
    assert worker.wait() == 0
    assert worker.log.startswith("ok:")
    assert len(worker.log.splitlines()) == 1
    assert place(project, result) == "pending"
    assert not project.server.client.exists(key("leases"))


def test_the_version_is_told() -> None:
    command = [sys.executable, "-m", "prefork.cli.worker", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("prefork ")


def test_titles_tell_who_is_who(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.nap.enqueue(1, 60)
    until(lambda: project.lines("started"))
    assert " ".join(psutil.Process(worker.pid).cmdline()).startswith("prefork: master of test")

    def titles() -> list[str]:
        return [" ".join(process.cmdline()) for process in psutil.Process(worker.pid).children()]

    until(lambda: all(title.startswith("prefork: child") for title in titles()))
    assert any("nap" in title and result.id in title for title in titles())
    assert worker.stop(signal.SIGQUIT) == 0


def test_an_import_that_leaves_a_thread_behind_is_warned_of(project: Project) -> None:
    project.add("""
        if __name__ != "__main__" and not os.environ.get("PYTEST_CURRENT_TEST", "").endswith("(call)"):
            pass
        threading.Thread(target=time.sleep, args=(600,), daemon=True, name="leftover").start()
    """)
    worker = project.worker()
    assert "leftover" in worker.log
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_on_child_start_runs_once_in_each_child_before_its_first_task(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            global opened
            opened = os.getpid()
            note("hook", os.getpid())

        @app.task
        def use():
            time.sleep(0.1)
            return opened == os.getpid()
    """)
    worker = project.worker("concurrency = 3")
    until(lambda: len(project.lines("hook")) >= 3)
    assert all(result.wait(timeout=60) for result in [project.tasks.use.enqueue() for _ in range(9)])
    assert len(project.lines("hook")) == len(set(project.lines("hook"))) == 3
    assert worker.stop() == 0


def test_a_worker_that_cannot_fork_for_a_while_lives_on(project: Project) -> None:
    worker = project.worker()
    project.tasks.add.enqueue(1).wait(timeout=60)
    children = until(lambda: len(worker.children()) == 2 and worker.children())
    limits = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(children[0], signal.SIGKILL)
    until(lambda: gone(children[0]))
    until(lambda: "WARNING" in worker.log or "ERROR" in worker.log)
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, limits)
    until(lambda: len(worker.children()) == 2, what="both children are there")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_a_child_that_has_grown_is_replaced_after_its_task(project: Project) -> None:
    project.add("""
        @app.task
        def grow(mb):
            kept = bytearray(mb << 20)
            return os.getpid()
    """)
    worker = project.worker("concurrency = 1\nmax_memory_per_child = 150MB")
    grow = project.tasks.grow
    first = grow.enqueue(1).wait(timeout=60)
    assert grow.enqueue(2).wait(timeout=60) == first
    assert grow.enqueue(200).wait(timeout=60) == first
    second = grow.enqueue(1).wait(timeout=60)
    assert second != first
    assert grow.enqueue(1).wait(timeout=60) == second
    assert "has used" in worker.log
    assert "ERROR" not in worker.log


GROW = """
@app.task
def grow(mb, seconds):
    kept = bytearray(mb << 20)
    note("grown", os.getpid())
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not (here / "go").exists():
        time.sleep(0.01)
    return os.getpid()
"""


def test_a_child_that_grows_beyond_all_measure_is_killed_amid_its_task_with_evidence(project: Project) -> None:
    project.add(GROW)
    worker = project.worker("concurrency = 1\nmax_memory_per_child = 100MB\nmax_crashes = 2")
    result = project.tasks.grow.enqueue(300, 60)
    until(lambda: place(project, result) == "dead")
    result.refresh()
    last = result._known["errors"][-1]
    assert "memory of" in last["message"]
    assert "more than twice max_memory_per_child" in last["message"]
    assert "in grow" in last["stack"]
    assert last["peak_bytes"] > 200_000_000
    assert last["pid"] not in (worker.pid, *worker.children())
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_of_all_children_together_the_largest_one_goes_first(project: Project) -> None:
    project.add(GROW)
    worker = project.worker("concurrency = 3\nmax_memory = 500MB\nmax_crashes = 1")
    small = [project.tasks.grow.enqueue(60, 60) for _ in range(2)]
    until(lambda: len(project.lines("grown")) == 2)
    large = project.tasks.grow.enqueue(400, 60)
    until(lambda: place(project, large) == "dead")
    large.refresh()
    assert "more than max_memory; this child had the most" in large.errors[-1].message
    project.let_go()
    assert {result.wait(timeout=60) for result in small} == set(map(int, project.lines("grown")[:2]))
    assert worker.stop() == 0


def test_short_of_memory_the_kernel_would_take_a_child_first(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    (child,) = worker.children()
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (worker.pid, child)]
    assert scores[1] >= 500 > scores[0]
