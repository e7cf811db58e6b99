"""Attacks on deadlines and on the master: every task ends as promised, with evidence, and the worker works on."""

from __future__ import annotations

from typing import Any

from prefork import TaskResult
from tests.cli.command import prefork
from tests.conftest import Project, Worker, until
from tests.process.scene import STEPS, gone, place

# Each has this long, and none of them ends by itself. -> what its evidence has to hold
TIMEOUT_S = 0.6
STUCK = {
    "asleep": ("time.sleep(60)", "in step"),
    "in C that holds the GIL": ("pow(3, 1 << 300_000, (1 << 300_000) - 1)", "in step"),
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

# What ends at once, by its own doing. -> the error's class, what its message or evidence has to hold
SUDDEN = {
    "_exit": ("os._exit(3)", "ChildDied", "exited with 3"),
    "_exit 0": ("os._exit(0)", "ChildDied", "exited with 0"),
    "exec": ("os.execvp('true', ['true'])", "ChildDied", "exited with 0"),
    "kill -9": ("os.kill(os.getpid(), signal.SIGKILL)", "ChildDied", "killed by SIGKILL"),
    "abort": ("os.abort()", "ChildDied", "killed by SIGABRT"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "ChildDied", "in step"),
    "stack overflow": ("""
global deeper
sys.setrecursionlimit(10**9)
def deeper(_=0): return max([0], key=deeper)
deeper()""", "ChildDied", "killed by SIGSEGV"),
    "sys.exit": ("sys.exit(3)", "SystemExit", "3"),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit", ""),
    "RecursionError": ("global deepest\ndef deepest(): deepest()\ndeepest()", "RecursionError", ""),
    "MemoryError": ("bytearray(1 << 60)", "MemoryError", ""),
    "closes our pipes": ("os.closerange(0, 1000)", "ChildDied", "its pipes to the master were closed"),
    "closes our pipes and stays": ("os.closerange(0, 1000); time.sleep(600)", "ChildDied", "closed its pipe"),
    "exec that stays": ("os.execvp('sleep', ['sleep', '600'])", "ChildDied", "closed its pipe"),
    "garbage": ("spill(b'\\xff' * 200)", "ChildDied", "sent garbage"),
    "a failed start": ("spill(ANSWER.pack(0, 5, 0, 0.0, 0.0, 0)); time.sleep(60)", "ChildDied", "garbage"),
    "a second start": ("spill(ANSWER.pack(0, 0, 0, 0.0, 0.0, 0)); time.sleep(60)", "ChildDied", "garbage"),
    "no number": ("spill(ANSWER.pack(1, 1, 0, float('nan'), float('inf'), 0)); time.sleep(60)", "ChildDied", "garbage"),
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
    assert [result.wait(timeout=20) for result in results] == list(range(2 * children))
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
        assert error["exit"].startswith("killed by SIGKILL: timeout of 0.6 s" if words else "exited with 3"), name
        assert 0.5 < error["ran_s"] < TIMEOUT_S + 2, (name, error)
        assert error["peak_bytes"] > 10 << 20, name
        assert error["host"], name
        assert error["child_cpu_s"] >= 0, name
        until(lambda pid=error["pid"]: gone(pid), what=name)  # type: ignore[misc]
    works(project, worker, 4)
    shown = prefork("show", results["in a regex"].id, "--broker", project.server.url)
    for words in ("killed by SIGKILL: timeout of 0.6 s", "peak memory", "CPU of its whole life", "in step", "pid "):
        assert words in shown
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
