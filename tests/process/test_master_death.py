"""SIGKILL of the master: its children go with it, and whoever comes next has everything back at once."""

from __future__ import annotations

import signal

import pytest

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, active, counts, gone, key, lives, pending

BUSY = {
    "sleeping": "time.sleep(60)",
    "looping": "while True: pass",
    "in_C": "import hashlib; hashlib.pbkdf2_hmac('sha512', b'x', b'y', 2_000_000_000)",
    "in_C_holding_the_lock": "import re; re.match('(a*)*b', 'a' * 40)",
    "ignoring_signals": """
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
time.sleep(60)""",
    "idle": "",
}


@pytest.mark.parametrize("what", BUSY.values(), ids=BUSY)
def test_children_do_not_outlive_a_killed_master(project: Project, what: str) -> None:
    project.add(STEPS)
    worker = project.worker()
    if what:
        project.tasks.step.enqueue(1, what)
        project.tasks.step.enqueue(2, what)
        until(lambda: len(project.lines("how")) == 2)
    children = until(lambda: len(worker.children()) == 2 and worker.children())
    assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: gone(*children), what="the children have gone")


def test_a_child_that_is_starting_does_not_outlive_a_killed_master(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots", os.getpid())
            time.sleep(60)
    """)
    worker = project.worker(wait=False)
    until(lambda: len(project.lines("boots")) == 2)
    worker.stop(signal.SIGKILL)
    until(lambda: gone(*map(int, project.lines("boots"))), what="the children have gone")


def test_the_next_start_on_the_same_host_restores_at_once(project: Project) -> None:
    worker = project.worker("lease = 60")
    results = [project.tasks.hold.enqueue(n) for n in range(4)]
    until(lambda: len(project.lines("started")) == 2)
    until(lambda: active(project) == 2, what="what was claimed and finds no child goes back")
    worker.stop(signal.SIGKILL)
    clock = Clock()
    worker = project.worker("lease = 60")
    until(lambda: len(project.lines("started")) >= 4)
    assert clock.s < 3 * SLACK_S, "its start, and not a third of the lease, 20 s"
    (project.folder / "go").touch()
    assert [result.wait(timeout=60) for result in results] == [0, 1, 2, 3]
    started = sorted(line.split()[0] for line in project.lines("started"))
    assert started == ["0", "0", "1", "1", "2", "3"]
    assert sorted(project.lines("ended")) == ["0", "1", "2", "3"]
    assert "took over" in worker.log
    assert worker.stop() == 0


def test_under_load_nothing_is_lost_and_only_what_was_running_runs_twice(project: Project) -> None:
    project.add(STEPS)
    project.add("""
        @app.task(name="quick", result_ttl=0)
        def quick(n):
            note("quick", n)
    """)
    worker = project.worker("lease = 60")
    project.tasks.app.enqueue_many(project.tasks.quick.s(n) for n in range(20_000))
    for seen in (3000, 8000):
        until(lambda seen=seen: len(project.lines("quick")) > seen)  # type: ignore[misc]
        children = worker.children()
        worker.stop(signal.SIGKILL)
        until(lambda children=children: gone(*children))  # type: ignore[misc]
        worker = project.worker("lease = 60")
    until(lambda: len(set(project.lines("quick"))) == 20_000)
    until(lambda: active(project) == 0)
    # What had ended in the last moments, its outcome not yet with the broker, runs again too: a bounded few.
    again = [n for n, times in counts(project, "quick").items() if times > 1]
    assert len(again) < 1000
    assert worker.stop() == 0
    assert project.server.client.hlen("prefork:{default}:m") == 0


def test_restored_messages_run_in_the_order_in_which_they_were_claimed(project: Project) -> None:
    project.add("""
        @app.task(name="quick", result_ttl=0)
        def quick(n):
            note("quick", n)
    """)
    worker = project.worker("lease = 60")
    results = project.tasks.app.enqueue_many(project.tasks.quick.s(n) for n in range(20_000))
    until(lambda: len(project.lines("quick")) > 2000)
    before = worker.children()
    worker.stop(signal.SIGKILL)
    until(lambda: gone(*before))
    client, names = project.server.client, {f"prefork-{worker.pid}", f"prefork-{worker.pid}-wait"}
    until(lambda: not names & {it["name"] for it in client.client_list()}, what="all that it sent is carried out")
    seen = len(project.lines("quick"))
    held = [id.decode() for name in client.keys(key("active:*")) for id in client.zrange(name, 0, -1)]
    due = held + pending(project)  # what it had put back stands behind what was running, be that claimed later
    project.worker("lease = 60\nconcurrency = 1")
    until(lambda: len(project.lines("quick")) == seen + len(due))
    number = {id: n for n, id in enumerate(results.ids)}
    assert [int(line) for line in project.lines("quick")[seen:]] == [number[id] for id in due]


def test_a_killed_master_leaves_what_is_delayed_where_it_is(project: Project) -> None:
    worker = project.worker()
    result = project.tasks.add.using(run_after=2).enqueue(1)
    worker.stop(signal.SIGKILL)
    project.worker()
    assert result.wait(timeout=60) == 3
    assert not lives(worker.pid)
