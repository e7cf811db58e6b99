"""Several faults at once, at the worst moment: nothing is lost, or stands still, or runs twice without a cause."""

from __future__ import annotations

import os
import shutil
import signal
import time

import psutil
import pytest

from prefork import ResultUnavailable
from tests.conftest import Project, Worker, until
from tests.process.scene import active, counts, gone, key, pending

QUICK = """
@app.task(name="quick", result_ttl=600)
def quick(n):
    note("quick", n)
    return n

@app.task(name="edge", result_ttl=600, max_retries=0, timeout=0.3)
def edge(n, seconds):
    note("edge_began", f"{n} {os.getpid()}")
    time.sleep(seconds)
    note("edge", n)
    return n
"""


def family(worker: Worker) -> list[int]:
    return [it.pid for it in psutil.Process(worker.pid).children(recursive=True)]


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3, 0.6, 0.9, 1.3])
def test_a_master_killed_at_any_moment_of_a_reload_loses_nothing(project: Project, delay_s: float) -> None:
    project.add(QUICK)
    worker = project.worker("shutdown_timeout = 0.3\nconcurrency = 2")
    quick, nap = project.tasks.quick, project.tasks.nap
    naps = [nap.enqueue(n, 0.5) for n in range(2)]
    results = [quick.enqueue(n) for n in range(200)]
    until(lambda: len(project.lines("started")) >= 2)
    worker.send(signal.SIGHUP)
    time.sleep(delay_s)
    seen = family(worker)
    worker.process.kill()
    worker.wait()
    until(lambda: gone(*seen), what="nothing outlives the master")
    other = project.worker()
    assert [it.wait(timeout=60) for it in naps + results] == [0, 1, *range(200)]
    until(lambda: active(project) == 0)
    assert max(counts(project, "ended").values()) <= 2
    assert pending(project) == []
    assert other.stop() == 0
    assert project.server.client.hlen(key("m")) == 0


def test_fenced_while_the_broker_dies_it_comes_back_and_all_is_done(own_project: Project) -> None:
    project = own_project
    project.add(QUICK)
    conf = "lease = 4\nconcurrency = 2"
    first = project.worker(conf)
    quick = project.tasks.quick
    held = [project.tasks.hold.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("started")) == 2)
    results = [quick.enqueue(n) for n in range(300)]
    first.send(signal.SIGSTOP)
    project.let_go()
    second = project.worker(conf)
    until(lambda: "took over from worker" in second.log)
    project.server.kill()
    first.send(signal.SIGCONT)  # it finds neither its lease nor a broker
    time.sleep(0.5)
    project.server.start()
    time.sleep(0.1)
    project.server.kill()
    project.server.start()
    assert [it.wait(timeout=60) for it in held + results] == [0, 1, *range(300)]
    until(lambda: active(project) == 0)
    assert set(counts(project, "quick").values()) == {1} or "lost the lease" in second.log
    late = [quick.enqueue(n) for n in range(1000, 1100)]
    assert [it.wait(timeout=60) for it in late] == list(range(1000, 1100))
    until(lambda: project.server.client.zcard(key("leases")) == 2, what="both work")
    assert (first.stop(), second.stop()) == (0, 0)
    assert project.server.client.hlen(key("m")) == 0


def test_all_workers_that_stood_still_together_come_to_rest(project: Project) -> None:
    project.add(QUICK)
    workers = [project.worker("lease = 5\nconcurrency = 2") for _ in range(3)]
    quick, nap = project.tasks.quick, project.tasks.nap
    naps = [nap.enqueue(n, 0.7) for n in range(6)]
    until(lambda: len(project.lines("started")) >= 6)
    results = [quick.enqueue(n) for n in range(300)]
    for worker in workers:
        worker.send(signal.SIGSTOP)
    time.sleep(6)
    for worker in workers:
        worker.send(signal.SIGCONT)
    assert [it.wait(timeout=60) for it in naps + results] == [*range(6), *range(300)]
    until(lambda: active(project) == 0)
    assert set(counts(project, "quick").values()) == {1}
    until(lambda: project.server.client.zcard(key("leases")) == 3)
    assert [worker.stop() for worker in workers] == [0, 0, 0]


def test_an_attempt_that_ends_at_its_very_deadline_has_one_outcome(project: Project) -> None:
    project.add(QUICK)
    worker = project.worker("concurrency = 4")
    edge = project.tasks.edge
    results = [edge.enqueue(n, 0.27 + 0.002 * (n % 20)) for n in range(80)]
    for result in results:
        until(lambda result=result: result.refresh() or result.status in ("SUCCESSFUL", "FAILED"), 40)  # type: ignore[misc]
    ended, began = counts(project, "edge"), [line.split()[0] for line in project.lines("edge_began")]
    assert sorted(began, key=int) == [str(n) for n in range(80)], "each began once"
    for n, result in enumerate(results):
        if result.status == "SUCCESSFUL":
            assert ended[str(n)] == 1
    until(lambda: active(project) == 0)
    assert worker.stop() == 0


def test_a_stopped_child_whose_deadline_falls_and_that_goes_on_just_then(project: Project) -> None:
    project.add(QUICK)
    worker = project.worker("concurrency = 1")
    edge, quick = project.tasks.edge, project.tasks.quick
    for n in range(8):
        result = edge.enqueue(n, 0.05)
        until(lambda n=n: len(project.lines("edge_began")) > n)  # type: ignore[misc]
        pid = int(project.lines("edge_began")[-1].split()[1])
        after = quick.enqueue(n)
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.29 + 0.01 * (n % 4))
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass
        until(lambda result=result: result.refresh() or result.status in ("SUCCESSFUL", "FAILED"))  # type: ignore[misc]
        assert after.wait(timeout=60) == n, "what waited behind it is not charged"
        after.refresh()
        assert after.attempts == 1
    assert set(counts(project, "quick").values()) == {1}
    assert worker.stop() == 0


def test_a_broker_that_is_restored_from_an_older_copy(own_project: Project) -> None:
    """As from a backup: what was settled since is there again, what was enqueued since is not."""
    project, server = own_project, own_project.server
    project.add(QUICK)
    worker = project.worker("lease = 2\nconcurrency = 2")
    quick, nap = project.tasks.quick, project.tasks.nap
    early = [project.tasks.hold.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("started")) == 2)
    waiting = [quick.enqueue(n) for n in range(50)]
    copy = server.folder.with_name(server.folder.name + "-copy")
    shutil.copytree(server.folder, copy, ignore=lambda folder, names: [n for n in names if n == "s"])
    project.let_go()
    try:
        assert [it.wait(timeout=60) for it in early + waiting] == [0, 1, *range(50)]
        late = nap.enqueue(9, 3)
        until(lambda: len(project.lines("started")) == 3)
        server.kill()
        shutil.rmtree(server.folder)
        shutil.copytree(copy, server.folder)
        server.start()
        assert [it.wait(timeout=30) for it in early + waiting] == [0, 1, *range(50)]
        until(lambda: counts(project, "ended")["9"] == 1)
        assert quick.enqueue(100).wait(timeout=60) == 100
        until(lambda: active(project) == 0)
        assert set(counts(project, "quick").values()) == {1, 2}, "what was undone runs again"
        with pytest.raises(ResultUnavailable):
            late.refresh()
        assert worker.stop() == 0
        assert server.client.hlen(key("m")) == 0
    finally:
        shutil.rmtree(copy)
