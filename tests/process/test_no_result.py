"""Tasks that keep no result: the usual ones of those who have many, which the compiled part runs."""

from __future__ import annotations

import os
import signal

from tests.conftest import Project, until
from tests.process.scene import counts, gone, pending

PLAIN = """
@app.task(result_ttl=0, retry_delay=0)
def plain(n, *, how=""):
    note("ran", n)
    if how == "once" and not (here / f"failed{n}").exists():
        (here / f"failed{n}").touch()
        raise ValueError("the first time")
    if how == "die" and not (here / f"died{n}").exists():
        (here / f"died{n}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "print":
        print("no newline", n, end="")

@app.task(result_ttl=0, max_retries=0)
def sleeper(seconds):
    from prefork import Cancelled
    try:
        note("started", os.getpid())
        time.sleep(seconds)
    except Cancelled:
        note("told")
        raise
"""


def test_what_keeps_no_result_is_done_once_whatever_happens_beside_it(project: Project) -> None:
    project.add(PLAIN)
    plain, n = project.tasks.plain, 3000
    odd = {7: "once", 1500: "once", 2999: "once", 900: "die", 2200: "die", 5: "print", 2500: "print"}
    project.tasks.app.enqueue_many(plain.s(k, how=odd[k]) if k in odd else plain.s(k) for k in range(n))
    worker = project.worker()
    again = {str(k) for k, how in odd.items() if how in ("once", "die")}
    until(lambda: len(project.lines("ran")) == n + len(again))
    project.tasks.app.enqueue_many(plain.s(n + k) for k in range(2000))
    until(lambda: len(counts(project, "ran")) > n + 100)
    assert worker.stop() == 0
    rest = len(pending(project))
    done = counts(project, "ran")
    assert len(done) + rest == n + 2000
    assert {k for k, times in done.items() if times > 1} == again
    assert set(done.values()) == {1, 2}
    assert "no newline 5" in worker.log
    last = project.worker("", "--burst", wait=False)
    assert last.wait() == 0
    assert len(counts(project, "ran")) == n + 2000
    assert not project.server.client.hlen("prefork:{default}:m")


def test_what_keeps_no_result_can_be_cancelled_amid_its_run(project: Project) -> None:
    project.add(PLAIN)
    worker = project.worker()
    result = project.tasks.sleeper.enqueue(60)
    until(lambda: project.lines("started"))
    assert result.cancel(running=True)
    until(lambda: project.lines("told"))
    pid = int(project.lines("started")[0])
    after = project.tasks.plain.enqueue(1)
    until(lambda: project.lines("ran") == ["1"])
    assert not gone(pid), "it was told, not killed"
    os.kill(pid, signal.SIGKILL)
    assert after
    assert worker.stop() == 0
