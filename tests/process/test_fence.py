"""Who holds a message: one that was cut off, stood still or was taken for dead comes back, and does no harm.

Clocks that are wrong, and names that are equal, mislead nobody.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from prefork.worker import lease
from tests.conftest import SLACK_S, Project, Server, Worker, until
from tests.process.proxy import Network
from tests.process.scene import Clock, active, gone, key

GATED = """
@app.task(name="gated", result_ttl=600)
def gated(n):
    note("gated", f"{n} {os.getpid()} {os.getppid()}")
    while not (here / f"go {os.getppid()}").exists():
        time.sleep(0.01)
    note("through", f"{n} {os.getppid()}")
    return os.getppid()
"""
LOST = "lost the lease"


@pytest.fixture
def network(project: Project) -> Iterator[Network]:
    project.add(GATED)
    with Network(project.server.path) as network:
        yield network
        network.heal()


def behind(network: Network) -> str:
    return f"broker = redis://127.0.0.1:{network.port}/0"


def let_go(project: Project, worker: Worker) -> None:
    (project.folder / f"go {worker.pid}").touch()


def _rests(project: Project) -> bool:
    """Whether no script is run for a while, shorter than between two beats."""

    def scripts() -> int:
        return int(project.server.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    before = scripts()
    time.sleep(0.1)
    return scripts() == before


def said(worker: Worker, words: str) -> int:
    return sum(words in line for line in worker.log.splitlines())


# -- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hold", "drop", "refuse"])
def test_one_that_was_cut_off_comes_back_and_drops_what_it_ran(project: Project, network: Network, mode: str) -> None:
    if mode == "drop":
        project.add("""
            if "pytest" not in sys.modules:
                from prefork.broker import channel, dial
                dial.CONNECT_LIMIT_S = channel.REPLY_LIMIT_S = 1.0
                channel.Channel.send.__defaults__ = channel.Channel.send_words.__defaults__ = (1.0,)
        """)
    cut_off = project.worker(f"lease = 5\nconcurrency = 1\n{behind(network)}")
    result = project.tasks.gated.enqueue(1)
    until(lambda: project.lines("gated"))
    child = int(project.lines("gated")[0].split()[1])
    network.set(mode, error=b"-LOADING somewhere else\r\n")
    clock = Clock()
    heir = project.worker("lease = 5\nconcurrency = 1")
    until(lambda: len(project.lines("gated")) == 2)
    # Its lease, another one if the heir was late itself, two seconds, and some for a busy machine.
    assert clock.s < 5 + 5 + 2 + SLACK_S
    assert not gone(child), "nobody can tell it"
    network.heal()
    until(lambda: said(cut_off, LOST) == 1)
    until(lambda: gone(child), what="what it ran is stopped")
    let_go(project, heir)
    assert result.wait(timeout=60) == heir.pid
    assert project.lines("through") == [f"1 {heir.pid}"]
    # It works on, under another name.
    assert heir.stop() == 0
    let_go(project, cut_off)
    assert project.tasks.gated.enqueue(2).wait(timeout=60) == cut_off.pid
    assert said(cut_off, LOST) == 1
    assert cut_off.stop() == 0
    assert project.server.client.zcard(key("leases")) == active(project) == 0


def test_an_outcome_that_arrives_after_the_takeover_counts_for_nothing(project: Project, network: Network) -> None:
    cut_off = project.worker(f"lease = 5\nconcurrency = 1\n{behind(network)}")
    result = project.tasks.gated.enqueue(1)
    until(lambda: project.lines("gated"))
    network.set("hold")
    let_go(project, cut_off)
    until(lambda: project.lines("through"))  # its settle is on its way, and stays there
    heir = project.worker("lease = 5\nconcurrency = 1")
    until(lambda: len(project.lines("gated")) == 2)
    network.heal()
    until(lambda: said(cut_off, LOST) == 1)
    result.refresh()
    assert not result.is_finished
    let_go(project, heir)
    assert result.wait(timeout=60) == heir.pid
    assert [worker.stop() for worker in (heir, cut_off)] == [0, 0]
    result.refresh()
    assert result.return_value == heir.pid


def test_a_claim_that_arrives_after_the_takeover_takes_nothing(project: Project, network: Network) -> None:
    cut_off = project.worker(f"lease = 5\nconcurrency = 1\n{behind(network)}")
    let_go(project, cut_off)
    network.set("hold", replies_only=True)  # what it is told to claim for, it hears late
    results = [project.tasks.gated.enqueue(n) for n in range(3)]
    clock = Clock()
    until(lambda: clock.s > 0.5)
    network.set("hold")
    heir = project.worker("lease = 5\nconcurrency = 1")
    let_go(project, heir)
    until(lambda: said(heir, "took over"))
    network.heal()
    assert {result.wait(timeout=60) for result in results} <= {heir.pid, cut_off.pid}
    assert sorted(line.split()[0] for line in project.lines("gated")) == ["0", "1", "2"]
    until(lambda: said(cut_off, LOST) == 1)
    assert [worker.stop() for worker in (heir, cut_off)] == [0, 0]


def test_what_was_claimed_just_before_the_fence_is_run_by_its_new_holder_alone(
    project: Project, network: Network
) -> None:
    """Of its two queues one was taken over: what the reply to a claim from the other one brings is no longer its."""
    results = [project.tasks.gated.enqueue(n) for n in range(3)]  # before it is up: no wake-up is on its way
    worker = project.worker(f"lease = 5\nconcurrency = 1\nqueues = default, other\n{behind(network)}")
    until(lambda: project.lines("gated"))
    client = project.server.client
    (name,) = client.zrange(key("leases"), 0, -1)
    ends = client.zscore(key("leases"), name)
    until(lambda: client.zscore(key("leases"), name) != ends)  # the next beat is a second and a half away
    until(lambda: _rests(project))  # nor is the claim under way that follows it: held, it would keep it from the next
    network.set("hold", replies_only=True)
    client.zrem(key("leases", "other"), name)
    ends = client.zscore(key("leases"), name)
    until(lambda: client.zscore(key("leases"), name) != ends)  # the beats of both queues go together
    let_go(project, worker)
    until(lambda: client.zrange(key(f"active:{name.decode()}"), 0, -1) == [results[1].id.encode()])
    network.heal()
    assert [result.wait(timeout=60) for result in results] == [worker.pid] * 3
    assert said(worker, LOST) == 1
    assert sorted(line.split()[0] for line in project.lines("gated")) == ["0", "1", "2"]
    assert worker.stop() == 0


# -- trouble that all have at once is nobody's death ------------------------------------------------------------------


def both_refused(server: Server) -> Callable[[], Any]:
    server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    return lambda: server.client.execute_command("REPLICAOF", "NO", "ONE")


def stopped(server: Server) -> Callable[[], Any]:
    assert server.process
    server.process.send_signal(signal.SIGSTOP)
    return lambda: server.process and server.process.send_signal(signal.SIGCONT)


def restarted(server: Server) -> Callable[[], Any]:
    server.kill()
    return server.start


@pytest.mark.parametrize("trouble", [both_refused, stopped, restarted], ids=lambda it: it.__name__)
def test_after_trouble_longer_than_the_lease_nobody_takes_over_from_the_living(
    own_project: Project, trouble: Callable[[Server], Callable[[], Any]]
) -> None:
    project = own_project
    project.add(GATED)
    workers = [project.worker("lease = 5\nconcurrency = 1") for _ in range(3)]
    results = [project.tasks.gated.enqueue(n) for n in range(3)]
    until(lambda: len(project.lines("gated")) == 3)
    end = trouble(project.server)
    clock = Clock()
    until(lambda: clock.s > 7)
    end()
    clock = Clock()
    until(lambda: clock.s > 6)
    for worker in workers:
        let_go(project, worker)
    assert {result.wait(timeout=60) for result in results} == {worker.pid for worker in workers}
    assert [said(worker, "took over") + said(worker, LOST) for worker in workers] == [0] * 3
    assert len(project.lines("gated")) == 3
    assert [worker.stop() for worker in workers] == [0] * 3


# -- clocks -----------------------------------------------------------------------------------------------------------

SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long long *ahead;
__attribute__((constructor)) static void begin(void) {
    ahead = mmap(0, 8, PROT_READ, MAP_SHARED, open(getenv("CLOCK_AHEAD"), O_RDONLY), 0);
}
int gettimeofday(struct timeval *tv, void *tz) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    tv->tv_sec = now.tv_sec + *ahead;
    tv->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


class Skewed:
    """A server whose clock can be moved."""

    def __init__(self, folder: pathlib.Path, binary: str) -> None:
        self._file = folder / "ahead"
        self.move(0)
        (folder / "shim.c").write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
        wrapper = folder / "server"
        wrapper.write_text(
            f'#!/bin/sh\nCLOCK_AHEAD={self._file} LD_PRELOAD={folder}/shim.so exec "{binary}" "$@"\n'
        )  # so that nothing else has it
        wrapper.chmod(0o755)
        self.server = Server(str(wrapper))

    def move(self, seconds: int) -> None:
        """The clock is so far ahead from now on."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))


@pytest.fixture
def skewed(tmp_path: pathlib.Path, server_binary: str) -> Iterator[tuple[Skewed, Project]]:
    if not shutil.which("cc"):
        pytest.skip("moving a server's clock needs a C compiler")
    (tmp_path / "clock").mkdir()
    it = Skewed(tmp_path / "clock", server_binary)
    before = it.server.client.time()[0]
    it.move(-100)  # it looks now and then
    until(lambda: it.server.client.time()[0] < before - 50, what="its clock can be moved")
    it.move(0)
    until(lambda: it.server.client.time()[0] >= before)
    project = Project(tmp_path, it.server, f"tasks_{abs(hash(str(tmp_path))) % 10**9}")
    project.add(GATED)
    yield it, project
    project.close()
    it.server.close()


@pytest.mark.parametrize("hours", [3, -3])
def test_a_leap_of_the_servers_clock_makes_nobody_take_over(skewed: tuple[Skewed, Project], hours: int) -> None:
    it, project = skewed
    workers = [project.worker("lease = 5\nconcurrency = 1") for _ in range(3)]
    results = [project.tasks.gated.enqueue(n) for n in range(3)]
    until(lambda: len(project.lines("gated")) == 3)
    it.move(hours * 3600)
    clock = Clock()
    until(lambda: clock.s > 7)
    for worker in workers:
        let_go(project, worker)
    assert {result.wait(timeout=60) for result in results} == {worker.pid for worker in workers}
    assert [said(worker, "took over") + said(worker, LOST) for worker in workers] == [0] * 3
    assert len(project.lines("gated")) == 3
    assert [worker.stop() for worker in workers] == [0] * 3


def test_after_a_leap_back_the_dead_of_other_hosts_are_taken_over_all_the_same(skewed: tuple[Skewed, Project]) -> None:
    it, project = skewed
    worker = project.worker("lease = 5\nconcurrency = 1")
    result = project.tasks.gated.enqueue(1)
    until(lambda: project.lines("gated"))
    # As if it were another host's: its lease and what it holds, under another name.
    client = it.server.client
    (name,) = client.zrange(key("leases"), 0, -1)
    client.zadd(key("leases"), {"elsewhere:00000000:7:7:7": int(client.zscore(key("leases"), name))})
    client.rename(key(f"active:{name.decode()}"), key("active:elsewhere:00000000:7:7:7"))
    ends = client.zscore(key("leases"), name)
    until(lambda: client.zscore(key("leases"), name) != ends)  # a beat, which sees it
    it.move(-3 * 3600)
    until(lambda: said(worker, "elsewhere"), 15 + 3 * SLACK_S, "three leases, and some for a busy machine")
    let_go(project, worker)
    assert result.wait(timeout=60) == worker.pid
    assert worker.stop() == 0


@pytest.mark.parametrize("hours", [5, -5])
def test_a_worker_whose_own_clock_is_wrong_harms_nobody(project: Project, hours: int) -> None:
    project.add(GATED)
    wrong = f"""
        import datetime as real_datetime
        if "prefork" in sys.argv[0] or sys.argv[0] == "-m":
            from prefork.worker import clock
            ahead = lambda real: lambda: real() + {hours} * 3600 * (10**9 if real is time_ns else 1)
            time_ns = time.time_ns
            time.time, time.time_ns = ahead(time.time), ahead(time.time_ns)
            note("clocks", time.time())
    """
    right = project.worker("lease = 5\nconcurrency = 1")
    project.add(wrong)
    other = project.worker("lease = 5\nconcurrency = 1")
    assert abs(float(project.lines("clocks")[0]) - __import__("time").time()) > 4 * 3600
    results = [project.tasks.gated.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("gated")) == 2)
    delayed = project.tasks.add.using(run_after=4, expires=60).enqueue(1)
    clock = Clock()
    until(lambda: clock.s > 3)
    delayed.refresh()
    assert not delayed.is_finished
    for worker in (right, other):
        let_go(project, worker)
    assert {result.wait(timeout=60) for result in results} == {right.pid, other.pid}
    assert delayed.wait(timeout=60) == 3
    assert [said(worker, "took over") + said(worker, LOST) for worker in (right, other)] == [0, 0]
    assert [worker.stop() for worker in (right, other)] == [0, 0]


def test_no_decision_reads_the_local_clock() -> None:
    """Where it is read: ids, which only have to be unique; what people are shown; and until the server has spoken."""
    shown = {"message.py", "clock.py", "report.py", "child.py", "result.py", "doctor.py", "output.py", "keyspace.py"}
    words = ("time.time(", "time.time_ns(", "datetime.now(", "utcnow(", "date.today(", "localtime(")
    house = pathlib.Path(lease.__file__).parents[1]
    files = [*house.glob("*.py"), *house.glob("broker/*.py"), *house.glob("worker/*.py"), *house.glob("cli/*.py")]
    assert {file.name for file in files if any(word in file.read_text() for word in words)} <= shown


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_name_with_the_pid_of_another_process_is_taken_over_at_once_and_that_of_a_living_one_is_not(
    project: Project,
) -> None:
    client, pid = project.server.client, os.getpid()
    name = lease.identity(1)  # of this process, which lives
    reused = name.replace(f":{pid}:", f":{psutil.Process(pid).ppid()}:")  # that pid has another start
    end_ms = int(client.time()[0]) * 1000 + 60_000
    client.zadd(key("leases"), {name: end_ms, reused: end_ms})
    held = {}
    for n, worker in enumerate((name, reused)):
        held[worker] = project.tasks.add.enqueue(n)
        client.lpop(key("pending"))
        client.zadd(key(f"active:{worker}"), {held[worker].id: 1})
    worker = project.worker("lease = 60")
    assert held[reused].wait(timeout=60) == 3
    assert client.zcard(key(f"active:{name}")) == 1
    assert said(worker, "took over") == 1
    assert worker.stop() == 0


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="elsewhere the next beat finds it")
def test_a_neighbour_that_dies_is_taken_over_at_once(project: Project) -> None:
    project.add(GATED)
    dying, heir = (project.worker("lease = 60\nconcurrency = 1") for _ in range(2))
    results = [project.tasks.gated.enqueue(n) for n in range(2)]
    until(lambda: len(project.lines("gated")) == 2)
    dying, heir = (heir, dying) if _watches(dying, heir) else (dying, heir)
    until(lambda: _watches(heir, dying))
    let_go(project, heir)
    clock = Clock()
    dying.process.kill()
    dying.process.wait(10)
    assert [result.wait(timeout=60) for result in results] == [heir.pid, heir.pid]
    assert clock.s < 2 * SLACK_S, "a third of the lease is 20 s"
    assert said(heir, "its process is gone") == 1
    assert heir.stop() == 0


def _watches(worker: Worker, other: Worker) -> bool:
    """Whether one has been told of the other, at a beat."""
    folder = pathlib.Path(f"/proc/{worker.pid}/fdinfo")
    return any(f"Pid:\t{other.pid}\n" in fd.read_text() for fd in folder.iterdir())


UNSHARE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def may_unshare() -> None:
    if sys.platform != "linux" or not shutil.which("unshare"):
        pytest.skip("needs Linux and unshare")
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")


def test_two_hosts_of_the_same_name_do_not_take_each_other_for_dead(project: Project, may_unshare: None) -> None:
    """As two containers with one image: the same host name, and the same pid."""
    project.add(GATED)
    conf = project.folder / "boxed.conf"
    conf.write_text(f"[prefork]\napp = {project.module_name}:app\nconcurrency = 1\nlease = 5\n")
    boxes = []
    for n in range(2):
        with (project.folder / f"boxed{n}.log").open("wb") as log:
            command = [*UNSHARE, sys.executable, "-m", "prefork.cli.worker", "-c", str(conf)]
            boxes.append(subprocess.Popen(command, cwd=project.folder, stdout=log, stderr=log))
    logs = [project.folder / f"boxed{n}.log" for n in range(2)]
    try:
        until(lambda: all("is ready" in log.read_text() for log in logs))
        names = [name.decode().split(":") for name in project.server.client.zrange(key("leases"), 0, -1)]
        assert names[0][0] == names[1][0] == socket.gethostname()
        assert names[0][2] == names[1][2] == "1"
        results = [project.tasks.gated.enqueue(n) for n in range(2)]
        until(lambda: len(project.lines("gated")) == 2)
        clock = Clock()
        until(lambda: clock.s > 6)
        assert not [log for log in logs if "took over" in log.read_text()]
        boxes[0].kill()  # and the kernel ends what is in it
        clock = Clock()
        until(lambda: "took over" in logs[1].read_text())
        # Not at once, since it is not of this host: when its lease has ended, and another one, as above.
        assert 0.3 < clock.s < 5 + 5 + 2 + SLACK_S
        (project.folder / "go 1").touch()
        assert [result.wait(timeout=60) for result in results] == [1, 1]
    finally:
        for box in boxes:
            box.kill()
            box.wait(10)
