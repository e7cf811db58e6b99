"""Attacks on deadlines and on the master: every task ends as promised, with evidence, and the worker works on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork import TaskResult
from tests.cli.command import prefork
from tests.conftest import SLACK_S, Project, Worker, until
from tests.process.scene import STEPS, Clock, gone, lives, place, state

# Each has this long, and none of them ends by itself. -> what its evidence has to hold
TIMEOUT_S = 3
STUCK = {
    "asleep": ("time.sleep(60)", "in step"),
    "in C that holds the GIL": ("pow(3, 1 << 300_000, (1 << 300_000) - 1)", "in step"),
    "in C that looks for nothing": ("sum(range(1 << 60))", "in step"),
    "in a regex": ("import re; re.match('(a*)*b', 'a' * 40)", "in step"),
    "swallowing everything": ("""
while True:
    try: time.sleep(60)
    except BaseException: pass""", "in step"),
    "waiting for a lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "in step"),
    "shielded": ("""
import asyncio
async def shielded():
    while True:
        try: await asyncio.shield(asyncio.sleep(60))
        except BaseException: pass
asyncio.run(shielded())""", "in step"),
    "at exit": ("import atexit; atexit.register(time.sleep, 60); threading.Event().wait()", "in step"),
    "ignoring all signals": ("""
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
time.sleep(60)""", "no Python stack: its task ignores the signal that asks for one"),
    "blocking all signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(60)",
                             "no Python stack: its task blocks the signal that asks for one"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "is in state T (stopped)"),
    "in the kernel": ("""
os.mkfifo(here / "fifo")
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, str(here / "fifo"), 0, 0)])""",
                      "is in state D (disk sleep), in the kernel at "),
    "without a slate": ("os.closerange(100, 1000); time.sleep(60)", "no Python stack"),
    "dying when asked for its stack": ("signal.signal(signal.SIGURG, lambda *_: os._exit(3)); time.sleep(60)", ""),
}  # fmt: skip

KILLED = "killed by SIGKILL: "
# What ends at once, by its own doing, or when the end of its pipe is seen before it has. -> the error's class, what its
# message or evidence has to hold
SUDDEN = {
    "_exit": ("os._exit(3)", "ChildDied", "exited with 3"),
    "_exit 0": ("os._exit(0)", "ChildDied", "exited with 0"),
    "exec": ("os.execvp('true', ['true'])", "ChildDied", ""),
    "kill -9": ("os.kill(os.getpid(), signal.SIGKILL)", "ChildDied", "killed by SIGKILL"),
    "abort": ("os.abort()", "ChildDied", "killed by SIGABRT"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "ChildDied", "in step"),
    "stack overflow": ("""
global deeper
import resource
sys.setrecursionlimit(10**9)
# From 3.12 on Python has a limit of its own for calls of C, which leaves this much unused.
resource.setrlimit(resource.RLIMIT_STACK, (1 << 17, resource.getrlimit(resource.RLIMIT_STACK)[1]))
def deeper(_=0): return max([0], key=deeper)
deeper()""", "ChildDied", "killed by SIGSEGV"),
    "sys.exit": ("sys.exit(3)", "SystemExit", "3"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit", ""),
    "RecursionError": ("global deepest\ndef deepest(): deepest()\ndeepest()", "RecursionError", ""),
    "MemoryError": ("bytearray(1 << 60)", "MemoryError", ""),
    "closes our pipes": ("os.closerange(0, 1000)", "ChildDied", "pipe"),
    "closes our pipes and stays": ("os.closerange(0, 1000); time.sleep(600)", "ChildDied", "closed its pipe"),
    "exec that stays": ("os.execvp('sleep', ['sleep', '600'])", "ChildDied", "closed its pipe"),
    "garbage": ("spill(b'\\xff' * 200)", "ChildDied", "sent garbage"),
    "a failed start": ("spill(ANSWER.pack(0, 5, 0, 0.0, 0.0, 0)); time.sleep(60)", "ChildDied", "garbage"),
    "a second start": ("spill(ANSWER.pack(0, 0, 0, 0.0, 0.0, 0)); time.sleep(60)", "ChildDied", "garbage"),
    "no number": ("spill(ANSWER.pack(1, 1, 0, float('nan'), float('inf'), 0)); time.sleep(60)", "ChildDied", "garbage"),
}  # fmt: skip

# With a soft timeout. -> the class of the error: SoftTimeout where Python gets to run, else the hard one comes
SOFT = {
    "lock": ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "SoftTimeout"),
    "subprocess": ("subprocess.run(['sleep', '60'])", "SoftTimeout"),
    "join": ("thread = threading.Thread(target=time.sleep, args=(60,)); thread.start(); thread.join()", "SoftTimeout"),
    "grandchild": ("os.waitpid(os.fork() or time.sleep(60) or os._exit(0), 0)", "SoftTimeout"),
    "loop": ("import asyncio; asyncio.run(asyncio.sleep(60))", "SoftTimeout"),
    "C that looks for signals": ("pow(3, 1 << 300_000, (1 << 300_000) - 1)", "SoftTimeout"),
    "C that does not": ("sum(range(1 << 60))", "TaskTimeout"),
    "C without the GIL": ("import hashlib; hashlib.pbkdf2_hmac('sha512', b'x', b'y', 2_000_000_000)", "TaskTimeout"),
    "ignored": ("signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)", "TaskTimeout"),
    "blocked": ("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(60)", "TaskTimeout"),
    "timer taken": ("signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(60)", "TaskTimeout"),
    "finally": ("""
try: time.sleep(60)
finally: time.sleep(60)""", "TaskTimeout"),
    "swallowing": ("""
while True:
    try: time.sleep(60)
    except BaseException: pass""", "TaskTimeout"),
    "__del__": ("""
class Last:
    def __del__(self): time.sleep(60)
Last()
time.sleep(60)""", "TaskTimeout"),
}  # fmt: skip

SPILL = """
import struct
ANSWER = struct.Struct("<QBIddI")

def spill(data):
    for fd in range(3, 300):
        try: os.write(fd, data)
        except OSError: pass
"""


def last_error(project: Project, result: TaskResult[Any]) -> dict[str, Any]:
    until(lambda: place(project, result) == "dead", what=f"{result} is a dead letter")
    result.refresh()
    return dict(result._known["errors"][-1])


def works(project: Project, worker: Worker, children: int) -> None:
    """All children are there, and each of them runs tasks."""
    results = [project.tasks.nap.enqueue(n, 0.05) for n in range(2 * children)]
    assert [result.wait(timeout=60) for result in results] == list(range(2 * children))
    until(lambda: len(worker.children()) == children, what="all children are there")
    assert worker.process.poll() is None


def test_whatever_a_task_is_stuck_in_it_ends_at_its_deadline_with_evidence(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker("concurrency = 4\nmax_crashes = 1")
    step = project.tasks.step.using(timeout=TIMEOUT_S, max_retries=0)
    results = {name: step.enqueue(name, how) for name, (how, _) in STUCK.items()}
    for name, (_, words) in STUCK.items():
        error = last_error(project, results[name])
        assert error["class"] == ("prefork.TaskTimeout" if words else "prefork.ChildDied"), (name, error)
        assert words in error.get("stack", ""), (name, error)
        assert error["exit"].startswith(f"{KILLED}timeout of {TIMEOUT_S} s" if words else "exited with 3"), name
        assert TIMEOUT_S / 2 < error["ran_s"] < TIMEOUT_S + SLACK_S, (name, error)
        assert error["peak_bytes"] > 10 << 20, name
        assert error["host"], name
        assert error["child_cpu_s"] >= 0, name
        until(lambda pid=error["pid"]: gone(pid), what=name)  # type: ignore[misc]
    works(project, worker, 4)
    shown = prefork("show", results["in a regex"].id, "--broker", project.server.url)
    for words in (f"{KILLED}timeout of {TIMEOUT_S} s", "peak memory", "CPU of its whole life", "in step", "pid "):
        assert words in shown
    assert worker.stop() == 0


def test_a_soft_timeout_ends_what_python_can_end_and_the_hard_one_the_rest(project: Project) -> None:
    project.add(STEPS)
    worker = project.worker("concurrency = 5")
    step = project.tasks.step.using(soft_timeout=2, timeout=6, max_retries=0)
    results = {name: step.enqueue(name, how) for name, (how, _) in SOFT.items()}
    for name, (_, kind) in SOFT.items():
        error = last_error(project, results[name])
        assert error["class"] == f"prefork.{kind}", (name, error)
        assert {"host", "pid", "peak_bytes", "ran_s"} <= set(error), (name, error)
        assert 1 < error["ran_s"] < 6 + SLACK_S, (name, error)
    shown = prefork("show", results["lock"].id, "--broker", project.server.url)
    for words in ("SoftTimeout: still running after 2 s", "exec(how)", "peak memory", "CPU 0.", "its child, pid "):
        assert words in shown
    works(project, worker, 5)
    assert worker.stop() == 0


def test_whatever_a_task_does_to_its_process_is_its_own_failure(project: Project) -> None:
    project.add(SPILL + STEPS)
    worker = project.worker("concurrency = 3\nmax_crashes = 1")
    results = {name: project.tasks.step.using(max_retries=0).enqueue(name, how) for name, (how, *_) in SUDDEN.items()}
    for name, (_, kind, words) in SUDDEN.items():
        error = last_error(project, results[name])
        assert error["class"].rpartition(".")[2] == kind, (name, error)
        assert words in error["message"] + error.get("stack", ""), (name, error)
        if kind == "ChildDied":
            assert {"exit", "host", "pid", "peak_bytes", "child_cpu_s", "ran_s"} <= set(error), (name, error)
    works(project, worker, 3)
    assert worker.stop() == 0


# Of cgroup version 1: what is frozen there cannot be killed, as if it hung on a dead network disk.
FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def freeze() -> Iterator[Callable[[int | None], None]]:
    """Put a process into uninterruptible sleep; None: let all go."""
    folder = FREEZER / f"prefork-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs root, and the freezer of cgroup version 1")

    def put(pid: int | None) -> None:
        if pid is not None:
            (folder / "cgroup.procs").write_text(str(pid))
        (folder / "freezer.state").write_text("THAWED" if pid is None else "FROZEN")

    yield put
    put(None)
    until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_a_child_that_the_kernel_does_not_let_die_is_left_behind(project: Project, freeze: Any) -> None:
    worker = project.worker("concurrency = 1")
    stuck = project.tasks.nap.using(timeout=5, max_retries=0).enqueue(1, 60)
    pid = int(until(lambda: project.lines("started"))[0].split()[1])
    freeze(pid)
    clock = Clock()
    next = project.tasks.add.enqueue(1)
    assert next.wait(timeout=60) == 3
    assert clock.s < 5 + 0.25 + 2 + SLACK_S
    error = last_error(project, stuck)
    assert error["class"] == "prefork.TaskTimeout"
    assert "in state D (disk sleep)" in error["stack"]
    assert lives(pid)
    assert "the kernel holds it" in worker.log
    freeze(None)
    until(lambda: gone(pid) and "left behind, has ended" in worker.log)
    works(project, worker, 1)
    assert worker.stop() == 0


def test_while_the_largest_child_dies_no_other_is_killed_for_its_memory(project: Project, freeze: Any) -> None:
    project.add("""
        @app.task
        def grow(mb, seconds):
            kept = bytearray(mb << 20)
            note("grown", os.getpid())
            time.sleep(seconds)
    """)
    worker = project.worker("max_memory = 500MB\nmax_crashes = 1")
    large = project.tasks.grow.enqueue(300, 60)
    freeze(int(until(lambda: project.lines("grown"))[0]))
    small = project.tasks.grow.enqueue(250, 5)
    small.wait(timeout=60)
    assert small.attempts == 1
    assert "this child had the most" in last_error(project, large)["message"]
    freeze(None)
    assert worker.stop() == 0


def test_what_a_killed_child_has_started_ends_with_it_also_in_sessions_of_its_own(project: Project) -> None:
    project.add("""
        @app.task(timeout=5, max_retries=0)
        def spawn():
            script = "sleep 600 & echo $! >> pids; exec sleep 600"
            note("pids", subprocess.Popen(["sh", "-c", script], cwd=here, start_new_session=True).pid)
            if os.fork() == 0:
                os.setsid()
                note("pids", os.getpid())
                while True:
                    time.sleep(60)
            time.sleep(60)
    """)
    worker = project.worker()
    result = project.tasks.spawn.enqueue()
    until(lambda: len(project.lines("pids")) == 3)
    pids = [int(line) for line in project.lines("pids")]
    assert last_error(project, result)["class"] == "prefork.TaskTimeout"
    until(lambda: gone(*pids))
    assert worker.stop() == 0


def test_a_task_that_kills_its_master_each_time_is_a_dead_letter_after_max_takeovers(project: Project) -> None:
    project.add(STEPS)
    poison = project.tasks.step.enqueue(1, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    lives_on = project.tasks.step.using(priority=-1).enqueue(2)
    for takeovers in range(2):
        worker = project.worker("concurrency = 1\nmax_takeovers = 2", wait=False)
        assert worker.wait() == -signal.SIGKILL, worker.log
        until(lambda n=takeovers + 1: len(project.lines("steps")) == n)  # type: ignore[misc]
    worker = project.worker("concurrency = 1\nmax_takeovers = 2")
    assert lives_on.wait(timeout=60) == 2
    error = last_error(project, poison)
    assert error["class"] == "prefork.WorkerDied"
    assert "died, 2 times" in error["message"]
    assert project.lines("steps") == ["1", "1", "2"]
    assert worker.stop() == 0


def test_a_task_that_stops_its_master_goes_back_to_its_queue(project: Project) -> None:
    project.add(STEPS)
    result = project.tasks.step.enqueue(1, "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    worker = project.worker("shutdown_timeout = 0.2", wait=False)
    assert worker.wait() == 0
    assert place(project, result) == "pending"
    assert state(project, result) == {}


def test_a_crash_loop_of_children_is_said_once_and_so_is_its_end(project: Project) -> None:
    project.add("""
        @app.on_child_start
        def connect():
            note("boots")
            if not (here / "database").exists():
                raise ConnectionError("no database today")
    """)
    worker = project.worker(wait=False)
    until(lambda: len(project.lines("boots")) >= 9)
    for words in ("could not start:", "ConnectionError: no database", "the next one starts in", "with nothing running"):
        assert worker.log.count(words) == 1, worker.log
    (project.folder / "database").touch()
    worker.wait_for("children work again, after")
    works(project, worker, 2)
    os.kill(worker.children()[0], signal.SIGKILL)
    until(lambda: worker.log.count("with nothing running") == 2)
    assert worker.stop() == 0


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Start what is started next with 250 MB, in a memory cgroup of version 1; called again: as before."""
    at = next(
        (line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), ""
    )
    own = Path(f"/sys/fs/cgroup/memory{at}")
    inner = own / f"prefork-test-{os.getpid()}"
    try:
        inner.mkdir()
        (inner / "memory.limit_in_bytes").write_text(str(250 << 20))
    except OSError:
        pytest.skip("needs root, and a memory cgroup of version 1")
    turns = iter((inner, own))

    def turn() -> None:
        (next(turns, own) / "cgroup.procs").write_text(str(os.getpid()))

    yield turn
    (own / "cgroup.procs").write_text(str(os.getpid()))
    until(lambda: not (inner / "cgroup.procs").read_text())
    inner.rmdir()


def test_what_the_kernel_kills_for_memory_is_told_and_neither_master_nor_siblings_die(
    project: Project, little_memory: Callable[[], None]
) -> None:
    project.add("""
        @app.task
        def fill():
            kept = bytearray(600 << 20)
    """)
    little_memory()
    worker = project.worker("max_crashes = 2")
    little_memory()
    other = project.tasks.nap.enqueue(1, 2)
    until(lambda: project.lines("started"))
    full = project.tasks.fill.enqueue()
    error = last_error(project, full)
    assert error["exit"] == "killed by the kernel, which was out of memory"
    assert 50 << 20 < error["peak_bytes"] < 251 << 20
    assert [error["class"] for error in full._known["errors"]] == ["prefork.ChildDied"] * 2
    assert other.wait(timeout=60) == 1
    assert other.attempts == 1
    os.kill(worker.children()[0], signal.SIGKILL)  # not by the kernel, this time
    worker.wait_for("killed by SIGKILL (out of memory?), with nothing running")
    works(project, worker, 2)
    assert worker.stop() == 0
    assert "killed by the kernel, which was out of memory" in prefork("show", full.id, "--broker", project.server.url)
