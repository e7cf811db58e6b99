"""TERM, INT and QUIT, whatever the tasks do: out in time, what is unfinished back in its place, nothing left behind."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, active, counts, gone, lives, pending, place, state

STOP_AT_1S = "shutdown_timeout = 1"
LIMIT_S = 1 + 1 + SLACK_S

STUBBORN = {
    "sleeping": "time.sleep(60)",
    "looping": "while True: pass",
    "in_C": "import hashlib; hashlib.pbkdf2_hmac('sha512', b'x', b'y', 2_000_000_000)",
    "in_C_holding_the_lock": "import re; re.match('(a*)*b', 'a' * 40)",
    "ignoring_signals": """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
time.sleep(60)""",
    "swallowing_everything": """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass""",
    "blocking_signals": """
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
time.sleep(60)""",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "waiting_for_a_subprocess": "subprocess.run(['sleep', '60'])",
    "joining_a_thread": """
thread = threading.Thread(target=time.sleep, args=(60,))
thread.start()
thread.join()""",
}


def test_an_idle_worker_stops_at_once(project: Project) -> None:
    worker = project.worker()
    children = until(lambda: len(worker.children()) == 2 and worker.children())
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < SLACK_S
    until(lambda: gone(*children))


def test_a_worker_that_never_had_a_broker_stops_in_time(own_project: Project) -> None:
    worker = own_project.worker(STOP_AT_1S)
    own_project.server.kill()
    until(lambda: "ERROR" in worker.log)
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < LIMIT_S


@pytest.mark.parametrize("what", STUBBORN.values(), ids=STUBBORN)
def test_tasks_that_do_not_end_are_killed_and_put_back_in_order(project: Project, what: str) -> None:
    project.add(STEPS)
    worker = project.worker(STOP_AT_1S)
    results = [project.tasks.step.enqueue(n, what) for n in range(5)]
    until(lambda: len(project.lines("how")) == 2)
    children = worker.children()
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < LIMIT_S
    until(lambda: gone(*children))
    assert pending(project) == [result.id for result in results]
    assert all(state(project, result).get("attempts", 0) == 0 for result in results)
    assert all(state(project, result).get("crashes", 0) == 0 for result in results)
    assert active(project) == 0
    assert not project.server.client.zcard("prefork:{default}:leases")


def test_what_many_children_were_running_goes_back_in_order(project: Project) -> None:
    worker = project.worker(STOP_AT_1S + "\nconcurrency = 12")
    results = [project.tasks.nap.enqueue(n, 60) for n in range(15)]
    until(lambda: len(project.lines("started")) == 12)
    assert worker.stop() == 0
    assert pending(project) == [result.id for result in results]


def test_short_tasks_end_and_those_not_started_go_back_in_order(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker()
    step = project.tasks.step
    results = project.tasks.app.enqueue_many(step.s(n) for n in range(6000))
    until(lambda: len(project.lines("steps")) > 1500)
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < SLACK_S
    left = pending(project)
    order = {result.id: n for n, result in enumerate(results)}
    assert [order[id] for id in left] == sorted(order[id] for id in left)
    ran = counts(project, "steps")
    assert set(ran.values()) == {1}
    assert len(ran) + len(left) == 6000
    assert set(ran) == {str(order[result.id]) for result in results} - {str(order[id]) for id in left}
    assert active(project) == 0


def test_what_runs_may_end_within_the_shutdown_timeout(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 60s")
    results = [project.tasks.hold.enqueue(n) for n in range(4)]
    until(lambda: len(project.lines("started")) == 2)
    clock = Clock()
    worker.send(signal.SIGTERM)
    worker.wait_for("stopping")
    project.let_go()
    assert worker.wait() == 0
    assert clock.s < 1 + SLACK_S
    assert sorted(project.lines("ended")) == ["0", "1"]
    assert [result.wait(timeout=60) for result in results[:2]] == [0, 1]
    assert pending(project) == [result.id for result in results[2:]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_do_not_cut_a_drain_short(project: Project, number: int) -> None:
    worker = project.worker()
    results = [project.tasks.nap.enqueue(n, 1.0) for n in range(2)]
    until(lambda: len(project.lines("started")) == 2)
    os.killpg(worker.pid, number)
    assert worker.wait() == 0
    assert [result.wait(timeout=60) for result in results] == [0, 1]
    assert all(result.attempts == 1 for result in results)


def test_a_second_TERM_changes_nothing(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.nap.enqueue(1, 1.5)
    until(lambda: project.lines("started"))
    for _ in range(5):
        worker.send(signal.SIGTERM)
        until(lambda: "stopping" in worker.log)
    assert worker.wait() == 0
    assert result.wait(timeout=60) == 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_further_INT_stops_at_once(project: Project, first: int) -> None:
    worker = project.worker("shutdown_timeout = 60")
    results = [project.tasks.nap.enqueue(n, 60) for n in range(4)]
    until(lambda: len(project.lines("started")) == 2)
    worker.send(first)
    until(lambda: "stopping" in worker.log)
    assert worker.process.poll() is None
    clock = Clock()
    assert worker.stop(signal.SIGINT) == 0
    assert clock.s < SLACK_S
    assert pending(project) == [result.id for result in results]
    assert all(state(project, result) == {} for result in results)


def test_QUIT_stops_at_once(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 60")
    results = [project.tasks.nap.enqueue(n, 60) for n in range(4)]
    until(lambda: len(project.lines("started")) == 2)
    clock = Clock()
    assert worker.stop(signal.SIGQUIT) == 0
    assert clock.s < SLACK_S
    assert pending(project) == [result.id for result in results]
    assert all(state(project, result) == {} for result in results)


def test_a_shutdown_timeout_of_zero_kills_at_once(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 0")
    result = project.tasks.nap.enqueue(1, 60)
    until(lambda: project.lines("started"))
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < SLACK_S
    assert pending(project) == [result.id]


def test_nothing_that_tasks_have_started_outlives_the_worker(project: Project) -> None:
    project.add("""
        @app.task
        def spawn(wait):
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            note("pids", process.pid)
            if wait:
                process.wait()
    """)
    worker = project.worker(STOP_AT_1S)
    project.tasks.spawn.enqueue(False).wait(timeout=60)
    project.tasks.spawn.enqueue(True)
    until(lambda: len(project.lines("pids")) == 2)
    pids = [int(line) for line in project.lines("pids")]
    family = [process.pid for process in psutil.Process(worker.pid).children(recursive=True)]
    assert all(lives(pid) for pid in pids)
    assert worker.stop() == 0
    until(lambda: gone(*pids, *family))


def test_many_stuck_children_are_all_reaped(project: Project) -> None:
    worker = project.worker("shutdown_timeout = 0\nconcurrency = 32")
    results = [project.tasks.nap.enqueue(n, 60) for n in range(32)]
    until(lambda: len(project.lines("started")) == 32)
    children = worker.children()
    assert worker.stop() == 0, worker.log[-2000:]
    until(lambda: gone(*children))
    assert sorted(pending(project)) == sorted(result.id for result in results)


def test_a_drain_lets_a_delayed_message_wait_where_it_is(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.add.using(run_after=30).enqueue(1)
    project.tasks.add.enqueue(1).wait(timeout=60)
    assert worker.stop() == 0
    assert place(project, result) == "scheduled"


def test_a_worker_whose_children_cannot_start_stops_at_once(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots")
            time.sleep(600)
    """)
    worker = project.worker(STOP_AT_1S, wait=False)
    until(lambda: len(project.lines("boots")) == 2)
    assert "is ready" not in worker.log
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < LIMIT_S
