"""The child's side: receive, run, answer. It runs tasks one at a time and knows nothing of Redis.

1. Cut loose from what belongs to the master; end when it ends.
2. Call the app's `on_child_start` hooks; say READY.
3. For each message: decode the body, run the task, answer at once; whatever the task did.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pathlib
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, NoReturn

import orjson
from setproctitle import setproctitle

from prefork.app import Prefork
from prefork.context import Context
from prefork.errors import BadMessage, NotJSON, PayloadTooLarge
from prefork.message import derived_id, encode_result
from prefork.task import Task
from prefork.worker import arguments, failure, fast, frames, notify
from prefork.worker.frames import Given
from prefork.worker.handoff import ChildEnd
from prefork.worker.interrupt import Stopper, soft_timeout, with_soft_timeout
from prefork.worker.logs import Handler, capture_prints
from prefork.worker.slate import Slate

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger("prefork")
PROGRESS_EVERY_S = 0.2
EXIT_BOOT_FAILED, EXIT_LOST_MASTER = 11, 12
PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.001
# Of the compiled part: number; when its task began, None if it has not; what that returned; what it raised.
Ran = tuple[int, float | None, Any, BaseException | None]
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child:
    """One forked process."""

    def __init__(
        self,
        number: int,
        app: Prefork,
        tasks: list[Task[..., Any]],
        queues: tuple[str, ...],
        end: ChildEnd,
        slate: Slate,
        handler: Handler,
    ) -> None:
        self._number, self._app, self._tasks, self._queues = number, app, tasks, queues
        self._end, self._slate, self._log = end, slate, handler
        self._stopper = Stopper(slate)
        self._runner: asyncio.Runner | None = None
        self._title = f"prefork: child {number} of {app.name}"
        self._is_copy = False  # of the child, by a task that has forked
        self._look_s = self._cpu_s = 0.0
        self._peak_kib = 0

    def live(self, master: int) -> NoReturn:
        """Run until the master has no more work for this child, or is gone. Never returns."""
        code = 0
        try:
            cut_loose(master)
            self._slate.listen()
            self._stopper.arm()
            os.register_at_fork(after_in_child=self._become_copy)
            self._prints = capture_prints(self._log)
            setproctitle(self._title)
            if self._boot():
                self._cpu_s = _cpu_s()
                if fast.compiled:
                    self._work_compiled(fast.compiled.run)
                else:
                    while given := self._end.next():
                        self._run(given)
            else:
                code = EXIT_BOOT_FAILED
        except OSError:  # a task closed our pipes, or the master is gone
            code = EXIT_LOST_MASTER
        except BaseException:
            log.exception("child %d ends by an error of prefork's own", self._number)
            code = 1
        finally:
            os._exit(code)

    def _boot(self) -> bool:
        try:
            for hook in self._app.child_start_hooks:
                hook()
        except BaseException as error:
            self._end.answer(0, frames.BOOT_FAILED, orjson.dumps(failure.told(error)))
            return False
        self._end.answer(0, frames.READY)
        return True

    def _work_compiled(self, run: Callable[..., Ran | None]) -> None:
        """The same in C, as long as messages are usual; it returns with each that is not, before or after its task."""
        end, usual = self._end, tuple(
            None if task.is_async or task.options.takes_context else (task, task.name, bool(task.options.result_ttl_s))
            for task in self._tasks
        )  # fmt: skip
        while ran := run(
            self, end, end.task_r, end.token_r, end.answer_w, end.writing, self._log, self._stopper, usual,
            self._prints, orjson.loads, orjson.dumps, perf_counter, self._look,
        ):  # fmt: skip
            given = end.next(ran[0])
            if given is None:
                return
            self._run(given, ran)
            del ran  # and with it what a failed task has left in its frames

    def _run(self, given: Given, ran: Ran | None = None) -> None:
        task = self._tasks[given.task]
        self._log.task, self._log.task_id = task.name, given.id
        if given.flags & frames.WILL_LAST:
            setproctitle(f"{self._title}: {task.name} {given.id}")
        begun_s = (ran and ran[1]) or perf_counter()
        try:
            if ran is None or ran[1] is None:
                kind, payload = self._attempt(task, given)
            elif ran[3] is None:
                kind, payload = self._result(task, ran[2])
            else:
                kind, payload = frames.FAILED, failure.verdict(task, given.retried, ran[3])
        except BaseException as error:  # what a failing task left over, such as a signal that came late
            kind, payload = frames.FAILED, failure.verdict(task, given.retried, error)
        ended_s = perf_counter()
        if self._is_copy:  # the task has forked, and this copy has returned from it too
            os._exit(0)
        cpu_s = self._look(ended_s) if ended_s >= self._look_s or kind == frames.FAILED else 0.0
        for printed in self._prints:
            printed.finish()
        self._log.task = ""
        if given.flags & frames.WILL_LAST:
            setproctitle(self._title)
        self._end.answer(given.number, kind, payload, ended_s - begun_s, cpu_s, self._peak_kib)

    def _look(self, now_s: float) -> float:
        """What takes system calls: not after each of many short tasks. -> seconds of CPU since the last time"""
        self._look_s = now_s + LOOK_EVERY_S
        signal.setitimer(signal.ITIMER_REAL, 0)  # one that a task has set would end a later one
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime
        used_s, self._cpu_s, self._peak_kib = cpu_s - self._cpu_s, cpu_s, _peak_kib(usage)
        return used_s

    def _become_copy(self) -> None:
        self._is_copy = True

    def _attempt(self, task: Task[..., Any], given: Given) -> tuple[int, bytes]:
        try:
            args, kwargs = arguments.decode(given.body)
        except ValueError as error:
            bad = BadMessage(f"message {given.id} for {task.name} has a damaged body: {error}")
            return frames.FAILED, failure.dead(bad)
        context = None
        if task.options.takes_context:
            context = self._context(task, given)
            args.insert(0, context)
        try:
            self._stopper.running = given.number
            value = self._call(task, args, kwargs, given.soft_timeout_s)
            self._stopper.running = 0
        except BaseException as error:
            self._stopper.running = 0
            return frames.FAILED, failure.verdict(task, given.retried, error)
        kind, result = self._result(task, value)
        if context and context.follow_ups and kind == frames.DONE:
            return frames.DONE_WITH_FOLLOW_UPS, _follow_ups(given.id, context) + b"\n" + result
        return kind, result

    def _result(self, task: Task[..., Any], value: Any) -> tuple[int, bytes]:
        try:
            return frames.DONE, encode_result(task.name, value) if task.options.result_ttl_s else b""
        except (NotJSON, PayloadTooLarge) as error:
            return frames.FAILED, failure.dead(error)

    def _call(self, task: Task[..., Any], args: list[Any], kwargs: dict[str, Any], soft_s: float) -> Any:
        if not task.is_async:
            if not soft_s:
                return task.function(*args, **kwargs)
            with soft_timeout(soft_s):
                return task.function(*args, **kwargs)
        if self._runner is None:
            import asyncio  # done before the fork, for an app with such tasks

            self._runner = asyncio.Runner()
            self._stopper.loop = self._runner.get_loop()
        coroutine = task.function(*args, **kwargs)
        it = self._stopper.coroutine = with_soft_timeout(coroutine, soft_s) if soft_s else coroutine
        try:
            return self._runner.run(it)
        finally:
            self._stopper.coroutine = None

    def _context(self, task: Task[..., Any], given: Given) -> Context:
        said_s = 0.0

        def report(done: float, total: float | None, text: str) -> None:
            nonlocal said_s
            now_s = monotonic()
            if now_s - said_s >= PROGRESS_EVERY_S or done == total:
                said_s = now_s
                self._end.answer(given.number, frames.PROGRESS, _encode([done, total, failure.clean(str(text), 200)]))

        deadline = datetime.now(UTC) + timedelta(seconds=given.timeout_s) if given.timeout_s else None
        enqueued_at = datetime.fromtimestamp(given.enqueued_ms / 1000, UTC)
        left = max(0, given.max_retries - given.retried)
        return Context(
            given.id, task.name, self._queues[given.queue], given.attempt, left, enqueued_at, deadline, report=report
        )


def cut_loose(master: int) -> None:
    """Leave behind what belongs to the master, and make sure not to outlive it."""
    os.setsid()  # a kill of the group reaches what a task started; signals to the master's group don't come here
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_end_with, args=(master,), daemon=True).start()
    if os.getppid() != master:
        os._exit(EXIT_LOST_MASTER)
    with contextlib.suppress(OSError):  # short of memory, the kernel is to take a child rather than the master
        pathlib.Path("/proc/self/oom_score_adj").write_text("500")
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1,
                   signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU):  # fmt: skip
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    notify.forget()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def _end_with(master: int) -> None:
    """Where the kernel has no signal for a parent's death: look for it."""
    while os.getppid() == master:
        sleep(0.25)
    os.killpg(0, signal.SIGKILL)


def _follow_ups(parent: str, context: Context) -> bytes:
    entries = (invocation.entry(derived_id(parent, n)) for n, invocation in enumerate(context.follow_ups))
    return _encode([[e.queue, e.id, e.priority, e.at, e.payload.decode()] for e in entries])


def _encode(value: Any) -> bytes:
    return orjson.dumps(value)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_kib(usage: resource.struct_rusage) -> int:
    return min(0xFFFFFFFF, usage.ru_maxrss if sys.platform == "linux" else usage.ru_maxrss >> 10)
