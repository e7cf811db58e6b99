"""Tasks that do to their process what they should not: each has an outcome, and what follows has a child that works."""

from __future__ import annotations

import os

import pytest

from tests.conftest import SLACK_S, Project, until
from tests.process.scene import STEPS, Clock, counts, gone, wait_dead, warm_up

HOSTILE = {
    "closes_stdin": "os.close(0)",
    "closes_stdout": "os.close(1)",
    "closes_stderr": "os.close(2)",
    "closes_all_three": "os.closerange(0, 3)",
    "closes_sys_stdout": "sys.stdout.close()",
    "closes_sys_stderr": "sys.stderr.close(); sys.stderr.write('more')",
    "closes_the_real_stdout": "sys.__stdout__.close(); print('more')",
    "replaces_stdout": "sys.stdout = None; print('more')",
    "replaces_stderr_by_rubbish": "sys.stderr = object()",
    "deletes_stdout": "del sys.stdout",
    "reconfigures_stdout": "sys.stdout.reconfigure(line_buffering=True); print('more', flush=True)",
    "writes_bytes": "sys.stdout.buffer.write(b'more'); sys.stdout.buffer.flush()",
    "asks_stdout_for_what_it_is": """
for stream in (sys.stdout, sys.stderr):
    assert not stream.closed and stream.writable() and not stream.readable() and not stream.seekable()
    stream.encoding, stream.errors, stream.name, stream.mode, stream.line_buffering, stream.newlines
    stream.fileno(), stream.isatty(), stream.flush(), stream.buffer""",
    "changes_directory": "os.chdir('/')",
    "changes_to_a_directory_that_is_gone": """
import tempfile
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)""",
    "leaves_a_thread": "threading.Thread(target=time.sleep, args=(600,)).start()",
    "leaves_a_busy_thread": """
def burn():
    while True: pass
threading.Thread(target=burn).start()""",
    "leaves_a_thread_that_fails": "threading.Thread(target=lambda: 1 / 0).start()",
    "leaves_a_process": "subprocess.Popen(['sleep', '600'])",
    "leaves_a_pool": """
from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(2).submit(time.sleep, 600)""",
    "ignores_every_signal": """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass""",
    "blocks_every_signal": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "ignores_SIGCHLD": "signal.signal(signal.SIGCHLD, signal.SIG_IGN); subprocess.run(['true'])",
    "leaves_an_alarm": "signal.alarm(1)",
    "leaves_a_timer": "signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)",
    "leaves_an_alarm_that_raises": """
def late(*_): raise RuntimeError('too late')
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.3)""",
    "sends_itself_SIGINT_ignored": "signal.signal(signal.SIGINT, lambda *_: None); os.kill(os.getpid(), signal.SIGINT)",
    "sets_a_wakeup_fd": "r, w = os.pipe(); os.set_blocking(w, False); signal.set_wakeup_fd(w)",
    "takes_the_recursion_limit": "sys.setrecursionlimit(60)",
    "disables_the_collector": "import gc; gc.disable(); gc.unfreeze()",
    "clears_the_environment": "os.environ.clear()",
    "changes_umask_and_niceness": "os.umask(0o777); os.nice(1)",
    "turns_logging_off": "import logging; logging.disable(); logging.shutdown()",
    "configures_logging": """
import logging
logging.basicConfig(force=True, level=0, stream=sys.stdout)
logging.error('x')""",
    "adds_a_handler": """
import logging
logging.getLogger().addHandler(logging.StreamHandler())
logging.error('x')
print('y')""",
    "closes_logging_handlers": """
import logging
for handler in logging.getLogger().handlers: handler.close()
logging.getLogger().handlers.clear()""",
    "traces": "sys.settrace(lambda *_: None); sys.setprofile(lambda *_: None)",
    "removes_builtins": "import builtins; builtins.print = None",
    "changes_the_json_module": "import json; json.dumps = None",
    "forgets_modules": "sys.modules.pop('time'); sys.modules.pop('orjson')",
    "runs_a_loop": "import asyncio; asyncio.run(asyncio.sleep(0))",
    "leaves_a_loop": "import asyncio; asyncio.set_event_loop(asyncio.new_event_loop())",
    "multiprocessing_pool": """
import multiprocessing
with multiprocessing.Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]""",
    "multiprocessing_spawn": """
import multiprocessing
process = multiprocessing.get_context('spawn').Process(target=print, args=(1,))
process.start(); process.join(); assert process.exitcode == 0""",
    "thread_pool": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(abs, [-1, -2])) == [1, 2]""",
    "process_pool": """
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2) as pool:
    assert list(pool.map(abs, [-1, -2])) == [1, 2]""",
    "subprocess": "assert subprocess.check_output(['echo', 'hello']) == b'hello\\n'",
    "subprocess_to_its_stdout": "subprocess.run(['echo', 'hello'], stdout=sys.stdout, stderr=sys.stderr, check=True)",
    "shell": "assert os.system('echo hello; exit 3') >> 8 == 3",
    "reads_stdin": "assert sys.stdin.read() == ''",
    "forks_and_returns": """
if os.fork() == 0:
    note('grandchild')""",
    "forks_and_raises": """
if os.fork() == 0:
    note('grandchild')
    raise ValueError('in the copy')""",
    "forks_and_exits": """
if os.fork() == 0:
    sys.exit(1)
os.wait()""",
    "forks_and_execs": """
if os.fork() == 0:
    os.execvp('sleep', ['sleep', '600'])""",
    "prints_much_without_a_newline": "print('x' * 1_000_000, end='')",
    "prints_little_very_often_without_a_newline": "for n in range(300_000): print('.', end='')",
    "leaves_threads_that_print": """
def talk():
    while True:
        threading.Thread(target=print, args=('.',), kwargs={'end': ''}).start()
        time.sleep(0.001)
threading.Thread(target=talk, daemon=True).start()""",
    "prints_surrogates_and_escapes": "print('\\ud800 \\x00 \\x1b[31m \\r\\n\\n\\n')",
    "prints_an_object_that_fails": """
class Mute:
    def __str__(self): raise RuntimeError
try: print(Mute())
except RuntimeError: pass""",
    "logs_wrongly": "import logging; logging.error('%d %d', 'x')",
    "logs_much": "import logging; logging.error('y' * 1_000_000)",
    "logs_with_a_broken_record": "import logging; logging.error('surrogate \\ud800', extra={'task': 1}, exc_info=True)",
    "warns": "import warnings; warnings.simplefilter('always'); warnings.warn('careful')",
    "becomes_a_daemon_thread_holder": """
lock = threading.Lock(); lock.acquire()
threading.Thread(target=lock.acquire).start()""",
    "registers_exit_handlers": "import atexit; atexit.register(os._exit, 7)",
    "starts_a_session_leader": "subprocess.Popen(['true'], start_new_session=True).wait()",
    "deletes_its_module": "sys.modules.pop(__name__, None)",
    "patches_time": "time.time = time.perf_counter = time.process_time = lambda: 0.0",
    "patches_time_forwards": "time.time = time.perf_counter = time.process_time = lambda: 1e300",
    "patches_time_to_nonsense": "time.time = time.perf_counter = lambda: float('nan')",
}


@pytest.mark.parametrize("what", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_task_ends_well_and_so_does_what_follows_it(project: Project, what: str) -> None:
    project.add(STEPS)
    project.add("""
        @app.task(max_retries=1, retry_delay=0)
        async def asynchronous():
            import asyncio
            await asyncio.sleep(0.01)
            return 7

        @app.task(soft_timeout=0.3)
        def soft():
            try: time.sleep(60)
            except SoftTimeout: return "soft"
    """)
    worker = project.worker("concurrency = 1\nshutdown_timeout = 1")
    result = project.tasks.step.using(max_retries=0).enqueue(1, what)
    follow = [project.tasks.nap.enqueue(2, 0.5), project.tasks.asynchronous.enqueue(), project.tasks.soft.enqueue(),
              *(project.tasks.step.enqueue(n) for n in range(3, 20))]  # fmt: skip
    assert result.wait(timeout=60) == 1
    assert [other.wait(timeout=60) for other in follow] == [2, 7, "soft", *range(3, 20)]
    assert all(other.attempts == 1 for other in [result, *follow])
    assert counts(project, "steps") == {str(n): 1 for n in [1, *range(3, 20)]}
    family = worker.children()
    clock = Clock()
    assert worker.stop() == 0
    assert clock.s < 1 + SLACK_S
    until(lambda: gone(*family))


@pytest.mark.parametrize("after", ["", "; sys.kept = [open('/dev/null', 'w') for _ in range(64)]"])
def test_a_task_that_closes_all_descriptors_is_charged_and_nobody_else(project: Project, after: str) -> None:
    project.add(STEPS)
    worker = project.worker("concurrency = 1")
    warm_up(project)
    step = project.tasks.step
    first = step.s(1, "os.closerange(3, 1024)" + after)
    deadly, *others = project.tasks.app.enqueue_many([first, *(step.s(n) for n in range(2, 40))])
    assert [result.wait(timeout=60) for result in others] == list(range(2, 40))
    assert all(result.attempts == 1 for result in others)
    wait_dead(project, deadly)
    assert deadly.errors[-1].exception_class_path == "prefork.ChildDied"
    assert worker.stop() == 0


def test_a_thread_left_behind_that_reports_progress_does_not_garble_a_large_result(project: Project) -> None:
    project.add("""
        @app.task(takes_context=True)
        def chatty(context):
            def talk():
                while True:
                    context.progress(1, 1, "again")
            threading.Thread(target=talk, daemon=True).start()
            return "x" * 1_000_000
    """)
    worker = project.worker("concurrency = 1")
    for _ in range(3):
        result = project.tasks.chatty.enqueue()
        assert len(result.wait(timeout=60)) == 1_000_000
        assert result.attempts == 1
    assert worker.stop() == 0


def test_what_a_task_left_running_ends_with_its_child(project: Project) -> None:
    project.add("""
        @app.task
        def spawn():
            note("pids", subprocess.Popen(["sleep", "600"]).pid)
            return os.getpid()
    """)
    worker = project.worker("max_tasks_per_child = 1")
    project.tasks.spawn.enqueue().wait(timeout=60)
    until(lambda: gone(int(project.lines("pids")[0])))
    assert worker.stop() == 0


def test_an_async_task_that_stops_or_closes_its_loop_spoils_no_other(project: Project) -> None:
    project.add("""
        @app.task(max_retries=0)
        async def spoil(how):
            import asyncio
            getattr(asyncio.get_running_loop(), how)()
            await asyncio.sleep(0)

        @app.task(max_retries=0)
        async def leave_some():
            import asyncio
            async def forever():
                while True:
                    try: await asyncio.sleep(0.001)
                    except BaseException: pass
            global kept
            kept = [asyncio.create_task(forever()) for _ in range(3)]

        @app.task(max_retries=0)
        async def fine():
            import asyncio
            await asyncio.sleep(0.01)
            return "fine"
    """)
    worker = project.worker("concurrency = 1\nshutdown_timeout = 1")
    for task, args in (("spoil", ["stop"]), ("spoil", ["close"]), ("leave_some", [])):
        result = getattr(project.tasks, task).enqueue(*args)
        assert project.tasks.fine.enqueue().wait(timeout=60) == "fine"
        until(lambda result=result: result.refresh() or result.is_finished)  # type: ignore[misc]
    assert worker.stop() == 0


def test_children_reseed_their_random_numbers(project: Project) -> None:
    project.add("""
        import random, uuid
        random.seed(1)
        @app.task
        def draw():
            time.sleep(0.2)
            return [random.random(), str(uuid.uuid4()), os.getpid()]
    """)
    worker = project.worker("concurrency = 3")
    drawn = [result.wait(timeout=60) for result in [project.tasks.draw.enqueue() for _ in range(3)]]
    assert len({first for first, _, _ in drawn}) == 3
    assert len({second for _, second, _ in drawn}) == 3
    assert worker.stop() == 0


def test_a_task_does_not_see_the_descriptors_of_the_master_or_of_other_children(project: Project) -> None:
    project.add("""
        @app.task
        def look():
            time.sleep(0.3)
            return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{fd}") or True and os.path.islink(f"/proc/self/fd/{fd}")}
    """)
    worker = project.worker("concurrency = 4")
    seen = [result.wait(timeout=60) for result in [project.tasks.look.enqueue() for _ in range(4)]]
    for descriptors in seen:
        assert len([name for name in descriptors.values() if name.startswith("pipe:")]) == 3
        assert not [name for name in descriptors.values() if name.startswith(("socket:", "anon_inode:[eventpoll]"))]
    pid = worker.children()[0]
    assert os.getpgid(pid) == pid
    assert worker.stop() == 0
