"""What signals do to a worker, but for those that stop it (test_shutdown)."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import socket
import time

import psutil
import pytest

from prefork import TaskFailed
from tests.conftest import Project, Worker, until
from tests.process.scene import active, counts, gone, key, lives, place


def reloads(worker: Worker) -> int:
    return worker.log.count("the new version is good")


def ready(worker: Worker) -> int:
    """How often it has said that it is."""
    return worker.log.count("is ready")


def hang_up(worker: Worker) -> None:
    before = ready(worker)
    worker.send(signal.SIGHUP)
    until(lambda: ready(worker) > before or worker.process.poll() is not None, what="it is ready again")
    assert worker.process.poll() is None, worker.log


def edit(project: Project, old: str, new: str) -> None:
    path = project.folder / f"{project.module_name}.py"
    path.write_text(path.read_text().replace(old, new))
    # Python takes a cached module for current if size and second of its last change are the same.
    stamp = time.time() + 10
    os.utime(path, (stamp, stamp))


# -- HUP --------------------------------------------------------------------------------------------------------------


def test_HUP_goes_on_with_the_new_code_in_the_same_process(project: Project) -> None:
    project.add("""
        @app.task
        def version():
            return "old"
    """)
    worker = project.worker()
    tasks = project.tasks
    assert tasks.version.enqueue().wait(timeout=60) == "old"
    edit(project, '"old"', '"brand new"')
    hang_up(worker)
    assert tasks.version.enqueue().wait(timeout=60) == "brand new"
    assert worker.process.poll() is None
    assert reloads(worker) == 1
    assert worker.stop() == 0


def test_HUP_takes_the_new_configuration_and_keeps_the_flags(project: Project) -> None:
    worker = project.worker("concurrency = 1", "-Q", "default,other")
    assert len(worker.children()) == 1
    conf = worker._conf
    conf.write_text(conf.read_text().replace("concurrency = 1", "concurrency = 3"))
    hang_up(worker)
    until(lambda: len(worker.children()) == 3)
    assert worker.log.count("queues default, other") == 2
    assert worker.stop() == 0


def test_HUP_takes_new_code_whose_folder_has_taken_the_place_of_the_old_one(project: Project) -> None:
    """The folder that the worker is in has no name any more then."""
    name = f"{project.module_name}.py"
    release = project.folder / "release"
    release.mkdir()
    (project.folder / name).rename(release / name)
    worker = project.worker("directory = release")
    release.rename(project.folder / "old")
    shutil.copytree(project.folder / "old", release)
    shutil.rmtree(project.folder / "old")
    for times in (2, 3):
        worker.send(signal.SIGHUP)
        until(lambda times=times: worker.log.count("is ready") == times, what=worker.log)
    assert worker.stop() == 0


def test_HUP_starts_from_the_environment_that_the_worker_was_started_in(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the old version of the app has put there, as from a .env file, would hide what the file says now."""
    (project.folder / ".env").write_text("old")
    project.add("""
        os.environ.setdefault("GREETING", (here / ".env").read_text())
        given = os.environ.pop("GIVEN")

        @app.task
        def greet():
            return os.environ["GREETING"], given
    """)
    worker = project.worker("prefix = %(ENV_SHOP)s", SHOP="prefork", GIVEN="a secret")
    monkeypatch.setenv("GIVEN", "for the import in this process")
    monkeypatch.setenv("GREETING", "as above")
    greet = project.tasks.greet
    assert greet.enqueue().wait(timeout=60) == ["old", "a secret"]
    (project.folder / ".env").write_text("new")
    hang_up(worker)
    assert greet.enqueue().wait(timeout=60) == ["new", "a secret"]
    assert worker.stop() == 0


@pytest.mark.parametrize("fault", ["code", "conf", "broker"])
def test_a_broken_new_version_is_reported_and_the_old_one_works_on(project: Project, fault: str) -> None:
    worker = project.worker()
    children = worker.children()
    tasks = project.tasks
    conf = worker._conf
    good = conf.read_text()
    if fault == "code":
        edit(project, "import os, signal", "import os, signal, there_is_no_such_module")
        said = "there_is_no_such_module"
    elif fault == "conf":
        conf.write_text(good + "\nconcurency = 3\n")
        said = "did you mean 'concurrency'"
    else:
        conf.write_text(good + "\nbroker = redis://127.0.0.1:1/0\n")
        said = "refuses the connection"
    worker.send(signal.SIGHUP)
    until(lambda: "the old one goes on" in worker.log)
    assert said in worker.log
    assert "Traceback" not in worker.log
    assert tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.children() == children
    conf.write_text(good)
    edit(project, ", there_is_no_such_module", "")
    hang_up(worker)
    assert tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


def test_HUP_lets_what_runs_end_and_puts_back_what_takes_too_long(project: Project) -> None:
    project.add("""
        @app.task
        def long():
            note("long")
            if len((here / "long").read_text().splitlines()) == 1:
                time.sleep(60)
            return "at last"
    """)
    worker = project.worker("shutdown_timeout = 2s")
    long = project.tasks.long.enqueue()
    until(lambda: project.lines("long"))
    worker.send(signal.SIGHUP)
    until(lambda: "checking" in worker.log)
    short = project.tasks.nap.enqueue("short", 1)
    until(lambda: ready(worker) == 2)
    assert short.wait(timeout=60) == "short"
    assert long.wait(timeout=60) == "at last"
    assert len(project.lines("long")) == 2
    assert worker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_TERM_or_a_first_INT_during_a_reload_stops(project: Project, number: signal.Signals) -> None:
    worker = project.worker("shutdown_timeout = 20s")
    tasks = project.tasks
    held = tasks.hold.enqueue("held")
    until(lambda: project.lines("started"))
    worker.send(signal.SIGHUP)
    until(lambda: reloads(worker))
    worker.send(number)
    worker.wait_for("in place of going on as the new version")
    project.let_go()
    assert worker.wait() == 0
    assert held.wait(timeout=60) == "held"
    assert ready(worker) == 1


def test_TERM_at_the_very_end_of_a_reload_stops(project: Project) -> None:
    """After the loop has turned for the last time, and before the new version has begun."""
    project.add("""
        from prefork.worker.loop import Loop
        turn = Loop.run

        def run(loop):
            turn(loop)
            os.kill(os.getpid(), signal.SIGTERM)

        Loop.run = run
    """)
    worker = project.worker()
    worker.send(signal.SIGHUP)
    assert worker.wait() == 0
    assert ready(worker) == 1
    assert "stopping, in place of going on as the new version" in worker.log


def test_TERM_while_the_new_version_is_checked_stops_and_leaves_nothing_behind(project: Project) -> None:
    worker = project.worker()
    edit(project, "import os, signal", "import os, signal, time\ntime.sleep(600)\nimport sys")
    worker.send(signal.SIGHUP)
    checking = until(lambda: [p for p in psutil.Process(worker.pid).children() if "--check" in " ".join(p.cmdline())])
    assert worker.stop() == 0
    until(lambda: gone(*(process.pid for process in checking)))


def test_HUP_lets_a_burst_go_on_with_the_new_code(project: Project) -> None:
    held, after = project.tasks.hold.enqueue("held"), project.tasks.add.enqueue(1)
    worker = project.worker("concurrency = 1", "--burst", wait=False)
    until(lambda: project.lines("started"))
    worker.send(signal.SIGHUP)
    until(lambda: reloads(worker))
    project.let_go()
    assert worker.wait() == 0
    assert (held.wait(timeout=60), after.wait(timeout=60)) == ("held", 3)
    assert ready(worker) == 2


def test_many_HUPs_at_once_are_few_reloads(project: Project) -> None:
    worker = project.worker()
    for _ in range(20):
        worker.send(signal.SIGHUP)
    until(lambda: ready(worker) >= 2)
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    until(lambda: ready(worker) == 1 + reloads(worker))
    assert reloads(worker) <= 4
    assert worker.stop() == 0


def test_a_reload_under_load_loses_and_repeats_nothing(project: Project) -> None:
    project.add("""
        @app.task(result_ttl=0)
        def tick(n):
            note("ticks", n)
    """)
    worker = project.worker("concurrency = 4")
    tasks = project.tasks
    for begin in range(0, 10_000, 500):
        tasks.app.enqueue_many(tasks.tick.s(n) for n in range(begin, begin + 500))
        hang_up(worker)
    until(lambda: len(project.lines("ticks")) >= 10_000, 120)
    assert reloads(worker) == 20
    assert set(counts(project, "ticks").values()) == {1}
    assert len(counts(project, "ticks")) == 10_000
    assert worker.process.poll() is None
    assert worker.stop() == 0


def test_what_the_old_version_could_not_put_back_is_not_taken_for_the_new_ones_own(own_project: Project) -> None:
    project = own_project
    worker = project.worker("concurrency = 1\nlease = 1s\nshutdown_timeout = 6s")
    held = project.tasks.hold.enqueue("held")
    until(lambda: project.lines("started"))
    worker.send(signal.SIGHUP)
    until(lambda: reloads(worker))
    assert project.server.process
    project.server.process.send_signal(signal.SIGSTOP)  # nobody takes what is to be put back
    until(lambda: "these tasks may run again" in worker.log)
    project.server.process.send_signal(signal.SIGCONT)
    until(lambda: ready(worker) == 2)
    project.let_go()
    assert held.wait(timeout=60) == "held"
    assert worker.stop() == 0
    assert len({line.split("worker ")[1].split()[0] for line in worker.log.splitlines() if "is ready" in line}) == 2


# -- TTIN, TTOU -------------------------------------------------------------------------------------------------------


def test_TTIN_and_TTOU_are_one_child_more_or_fewer(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    tasks = project.tasks
    nap = tasks.hold.enqueue("first")
    until(lambda: project.lines("started"))
    worker.send(signal.SIGTTIN)
    until(lambda: len(worker.children()) == 2)
    assert tasks.add.enqueue(1).wait(timeout=60) == 3  # beside the first
    for _ in range(3):
        worker.send(signal.SIGTTOU)
        time.sleep(0.02)
    project.let_go()
    until(lambda: len(worker.children()) == 1)
    assert nap.wait(timeout=60) == "first"
    assert tasks.add.enqueue(5).wait(timeout=60) == 7
    assert len(worker.children()) == 1  # never none
    assert counts(project, "started").total() == 1
    assert worker.stop() == 0


# -- USR1 -------------------------------------------------------------------------------------------------------------


def test_USR1_says_what_each_child_does_with_its_stack(project: Project) -> None:
    project.add("""
        import re

        @app.task
        def lost_in_c():
            note("started", "c")
            re.match("(a+)+$", "a" * 200 + "b")  # holds the GIL for ages

        @app.task
        async def lost_in_a_coroutine():
            import asyncio
            note("started", "async")
            await asyncio.sleep(60)

        def deep(n):
            if n:
                deep(n - 1)
            else:
                note("started", "deep")
                time.sleep(60)

        @app.task
        def lost_in_a_function():
            deep(3)
    """)
    worker = project.worker("concurrency = 4\nshutdown_timeout = 0")
    tasks = project.tasks
    for task in (tasks.lost_in_c, tasks.lost_in_a_coroutine, tasks.lost_in_a_function):
        task.enqueue()
    until(lambda: len(project.lines("started")) == 3)
    worker.send(signal.SIGUSR1)
    idle = re.compile(r"child \d \(pid \d+\): (ready|booting),")
    until(lambda: worker.log.count(": runs ") == 3 and idle.search(worker.log), what="all have told")
    assert "in lost_in_c\n" in worker.log
    assert worker.log.count("in deep\n") == 4
    assert "in lost_in_a_function\n" in worker.log
    assert "does not tell" not in worker.log
    assert "prefork/worker/child.py" not in worker.log
    worker.send(signal.SIGUSR1)
    until(lambda: worker.log.count(": runs ") == 6)
    assert len(worker.children()) == 4
    assert worker.stop() == 0


# -- USR2 -------------------------------------------------------------------------------------------------------------


def test_USR2_pauses_and_resumes_claiming(project: Project) -> None:
    worker = project.worker()
    tasks = project.tasks
    worker.send(signal.SIGUSR2)
    until(lambda: "paused" in worker.log)
    results = [tasks.add.enqueue(n) for n in range(5)]
    # One may be on its way to the worker, which puts it back.
    until(lambda: [place(project, result) for result in results] == ["pending"] * 5)
    time.sleep(0.5)
    assert [place(project, result) for result in results] == ["pending"] * 5
    assert psutil.Process(worker.pid).cpu_percent(0.3) < 20  # it sleeps
    worker.send(signal.SIGUSR2)
    assert [result.wait(timeout=60) for result in results] == [2, 3, 4, 5, 6]
    assert worker.stop() == 0


def test_a_paused_worker_leaves_the_work_to_others(project: Project) -> None:
    worker, other = project.worker(), project.worker()
    worker.send(signal.SIGUSR2)
    until(lambda: "paused" in worker.log)
    results = [project.tasks.nap.enqueue(n, 0.05) for n in range(20)]
    for n, result in enumerate(results):
        assert result.wait(timeout=60) == n
    pids = {int(line.split()[1]) for line in project.lines("started")}
    assert pids <= set(other.children())
    assert worker.stop() == other.stop() == 0


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_a_program_can_cancel_what_runs(project: Project) -> None:
    worker = project.worker()
    nap = project.tasks.nap.enqueue("nap", 60)
    until(lambda: project.lines("started"))
    assert not nap.cancel()
    assert nap.cancel(running=True)
    with pytest.raises(TaskFailed, match="Cancelled"):
        nap.wait(timeout=60)
    assert not nap.cancel(running=True)
    assert worker.stop() == 0


def cancel(project: Project, id: str) -> str:
    return project.tasks.app.client.cancel("default", id, 60_000, {"status": "FAILED", "errors": []}, stop=True)


def finished(project: Project, id: str) -> None:
    until(lambda: project.tasks.app.client.inspect("default", id)[0] == "finished", what="it has ended")


STUBBORN = """
@app.task(max_retries=5, retry_delay=0)
def polite():
    try:
        note("started")
        time.sleep(60)
    except BaseException as error:
        note("raised", type(error).__name__)
        raise

@app.task(max_retries=5, retry_delay=0)
async def cooperative():
    import asyncio
    try:
        note("started")
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note("raised", "CancelledError")
        raise

@app.task(max_retries=5, retry_delay=0)
def stubborn():
    begins = ["started"]
    while True:
        try:
            while begins:
                note(begins.pop())
            time.sleep(60)
        except BaseException as error:
            note("raised", type(error).__name__)

@app.task(max_retries=5, retry_delay=0)
def threaded():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    try:
        note("started")
        time.sleep(60)
    except BaseException as error:
        note("raised", type(error).__name__)
        raise
"""


@pytest.mark.parametrize("task", ["polite", "cooperative", "threaded"])
def test_a_running_task_that_is_cancelled_is_told_and_ends(project: Project, task: str) -> None:
    project.add(STUBBORN)
    worker = project.worker("concurrency = 1")
    children = worker.children()
    result = getattr(project.tasks, task).enqueue()
    until(lambda: project.lines("started"))
    assert cancel(project, result.id) == "asked"
    finished(project, result.id)
    result.refresh()
    assert result.status == "FAILED"
    assert result.errors[-1].exception_class_path == "prefork.Cancelled"
    assert project.lines("raised") == ["CancelledError" if task == "cooperative" else "Cancelled"]
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.children() == children
    assert active(project) == 0
    assert int(project.server.client.hget(key("stats"), "cancelled")) == 1
    assert worker.stop() == 0
    assert len(project.lines("started")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda it: it.name)
def test_a_cancel_outlives_the_worker_that_was_told(project: Project, number: signal.Signals) -> None:
    project.add(STUBBORN)
    worker = project.worker("concurrency = 1\nlease = 1")
    result = project.tasks.stubborn.enqueue()
    until(lambda: project.lines("started"))
    if number == signal.SIGKILL:
        assert result.cancel(running=True)
        until(lambda: "told to stop" in worker.log)
        worker.send(number)
    else:  # it never hears of it
        worker.send(number)
        assert result.cancel(running=True)
    next_one = project.worker("concurrency = 1")
    with pytest.raises(TaskFailed, match=r"Cancelled: cancelled while it ran"):
        result.wait(timeout=60)
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert len(project.lines("started")) == 1
    assert active(project) == 0
    assert project.server.client.keys(key("stop:*")) == []
    assert next_one.stop() == 0


def test_a_cancelled_task_that_goes_on_is_killed_and_its_stack_kept(project: Project) -> None:
    project.add(STUBBORN)
    worker = project.worker("concurrency = 1")
    result = project.tasks.stubborn.enqueue()
    until(lambda: project.lines("started"))
    assert cancel(project, result.id) == "asked"
    finished(project, result.id)
    result.refresh()
    assert result.errors[-1].exception_class_path == "prefork.Cancelled"
    assert "in stubborn" in result._known["errors"][-1]["stack"]
    assert project.lines("raised") == ["Cancelled"]
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert len(project.lines("started")) == 1
    assert worker.stop() == 0


def test_what_waits_in_a_child_is_cancelled_without_harm_to_what_runs(project: Project) -> None:
    worker = project.worker("concurrency = 1")
    tasks = project.tasks
    first, second = tasks.hold.enqueue("first"), tasks.nap.enqueue("second", 0)
    until(lambda: project.lines("started"))
    assert cancel(project, second.id) in ("cancelled", "asked")
    finished(project, second.id)
    project.let_go()
    assert first.wait(timeout=60) == "first"
    assert [line.split()[0] for line in project.lines("started")] == ["first"]
    assert worker.stop() == 0


# -- what was it doing ------------------------------------------------------------------------------------------------


def test_the_stack_at_the_deadline_is_kept(project: Project) -> None:
    project.add("""
        import re

        @app.task(timeout=3, max_retries=0)
        def stuck():
            re.match("(a+)+$", "a" * 200 + "b")
    """)
    project.worker("concurrency = 1")
    result = project.tasks.stuck.enqueue()
    until(lambda: place(project, result) == "dead")
    result.refresh()
    assert "in stuck" in result._known["errors"][-1]["stack"]


def test_the_stack_of_a_segfault_is_kept(project: Project) -> None:
    project.add("""
        @app.task
        def segfault():
            import ctypes
            ctypes.string_at(0)
    """)
    project.worker("concurrency = 1\nmax_crashes = 1")
    result = project.tasks.segfault.enqueue()
    until(lambda: place(project, result) == "dead")
    result.refresh()
    assert "in segfault" in result._known["errors"][-1]["stack"]


def test_a_task_that_closes_every_descriptor_does_no_harm(project: Project) -> None:
    project.add("""
        @app.task(max_retries=0)
        def close_all():
            os.closerange(3, 4096)
    """)
    worker = project.worker("concurrency = 1\nmax_crashes = 1")
    result = project.tasks.close_all.enqueue()
    until(lambda: place(project, result) == "dead")
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0


# -- before it is up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--check", "--burst"])
def test_ctrl_c_while_the_broker_does_not_answer_is_no_traceback(project: Project, flag: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(20)
        conf = f"broker = redis://127.0.0.1:{silent.getsockname()[1]}/0\npidfile = it.pid"
        worker = project.worker(conf, flag, wait=False)
        connection, _ = silent.accept()
        with connection:
            worker.send(signal.SIGINT)
            assert worker.wait() == 130
    assert worker.log == "prefork-worker: interrupted before it was up\n"
    assert not (project.folder / "it.pid").exists()


# -- ping -------------------------------------------------------------------------------------------------------------


def ask(worker: Worker, *flags: str) -> tuple[int, str]:
    import subprocess
    import sys

    command = [sys.executable, "-m", "prefork.cli.worker", "-c", str(worker._conf), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("pidfile", [False, True])
def test_ping_and_ready(own_project: Project, pidfile: bool) -> None:
    project = own_project
    worker = project.worker("pidfile = it.pid" if pidfile else "")
    until(lambda: ask(worker, "--ping") == (0, "pong\n"))
    until(lambda: ask(worker, "--ready") == (0, "ready\n"))
    project.server.kill()
    until(lambda: "broker away" in ask(worker, "--ready")[1])
    assert ask(worker, "--ready")[0] == 1
    until(lambda: ask(worker, "--ping") == (0, "pong\n"))
    project.server.start()
    until(lambda: ask(worker, "--ready")[0] == 0)
    hang_up(worker)
    until(lambda: ask(worker, "--ready") == (0, "ready\n"))
    worker.send(signal.SIGSTOP)
    code, said = ask(worker, "--ping")
    assert code == 1
    assert "does not answer" in said
    worker.send(signal.SIGCONT)
    until(lambda: ask(worker, "--ping")[0] == 0)
    assert worker.stop() == 0
    code, said = ask(worker, "--ping")
    assert code == 1
    assert "no worker of" in said


def test_ping_needs_no_password_of_the_broker(project: Project) -> None:
    worker = project.worker("broker = %(ENV_SHOP_BROKER)s", SHOP_BROKER=project.server.url)
    assert "SHOP_BROKER" not in os.environ
    until(lambda: ask(worker, "--ping") == (0, "pong\n"))
    until(lambda: ask(worker, "--ready") == (0, "ready\n"))
    assert ask(worker, "--check")[0] == 78
    assert worker.stop() == 0


def test_what_a_killed_worker_left_behind_misleads_nobody(project: Project) -> None:
    worker = project.worker()
    worker.send(signal.SIGKILL)
    worker.wait()
    assert ask(worker, "--ping")[0] == 1


def test_ping_loads_neither_the_app_nor_the_client_of_redis(tmp_path: pathlib.Path) -> None:
    import subprocess
    import sys

    code = """
import sys
from prefork.cli.worker import main
main(["-c", sys.argv[1], "--ping"])
heavy = {"redis", "asyncio", "psutil", "orjson", "prefork.app", "nowhere"} & set(sys.modules)
print("loaded:", sorted(heavy))
"""
    conf = tmp_path / "it.conf"
    conf.write_text("[prefork]\napp = nowhere:app\n")
    done = subprocess.run([sys.executable, "-c", code, str(conf)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "loaded: []\n"


def test_children_are_gone_after_the_group_was_killed(project: Project) -> None:
    worker = project.worker("concurrency = 2")
    children = worker.children()
    project.tasks.nap.enqueue("nap", 60)
    until(lambda: project.lines("started"))
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    until(lambda: not any(map(lives, children)))
