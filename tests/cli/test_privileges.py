from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
import sys

import pytest

from tests.conftest import Project, until

CODE = """
import os, sys
from prefork.cli import privileges
from prefork.errors import NoPrivilege
try:
    for user in sys.argv[1:]:
        privileges.become(user)
except NoPrivilege as error:
    print(error)
else:
    print(os.getuid(), os.geteuid(), os.getgid(), os.environ["HOME"], os.environ["USER"], len(os.getgroups()))
try:
    os.setuid(0)
    print("root again")
except PermissionError:
    print("for good")
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


def become(*users: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, *users], capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.stdout.splitlines()


@as_root
def test_root_becomes_the_user_for_good() -> None:
    nobody = pwd.getpwnam("nobody")
    said, again = become("nobody")
    assert said.split()[:5] == [str(nobody.pw_uid)] * 2 + [str(nobody.pw_gid), nobody.pw_dir, "nobody"]
    assert again == "for good"


@as_root
def test_a_group_may_be_named() -> None:
    assert become("nobody:daemon")[0].split()[2] == str(grp.getgrnam("daemon").gr_gid)


@as_root
def test_one_who_is_that_user_stays_and_no_other_is_to_be_had() -> None:
    assert become("nobody", "nobody")[1] == "for good"
    assert become("nobody", "daemon")[0].startswith("user = daemon: only root may become another user, this is nobody")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)


@as_root
def test_a_user_without_a_name_is_told_too() -> None:
    """As in a container that is given any uid."""
    before = "import os\nfrom prefork.cli import privileges\nos.setgid(54321)\nos.setuid(54321)\n"
    code = before + CODE.replace("sys.argv[1:]", "['nobody']")
    said, again = run(code).stdout.splitlines()
    assert said == "user = nobody: only root may become another user, this is uid 54321; start it as root or nobody"
    assert again == "for good"


@as_root
def test_a_group_that_cannot_be_had_is_told() -> None:
    assert become("nobody", "nobody:daemon")[0] == (
        "user = nobody:daemon: only root may take on another group, this is nobody; start it as root or nobody:daemon"
    )


@as_root
def test_one_who_is_of_another_group_than_his_first_stays_so() -> None:
    assert become("nobody:daemon", "nobody")[0].split()[2] == str(grp.getgrnam("daemon").gr_gid)


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has capabilities that outlive a change of the user")
def test_one_who_could_become_root_again_is_refused() -> None:
    done = run("""
import ctypes
from prefork.cli import privileges
from prefork.errors import NoPrivilege
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 4
assert ctypes.CDLL(None).prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
try:
    privileges.become("nobody")
except NoPrivilege as error:
    print(error)
""")
    assert done.stdout == "user = nobody: this process could become root again; take CAP_SETUID from it\n", done.stderr


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_a_child_of_the_user_can_still_say_that_it_is_to_be_killed_first() -> None:
    done = run("""
import os, pathlib
from prefork.cli import privileges
privileges.become("nobody")
child = os.fork()
if child == 0:
    pathlib.Path("/proc/self/oom_score_adj").write_text("500")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout == "0\n", done.stderr


@as_root
def test_tasks_run_as_the_user_of_the_configuration(project: Project) -> None:
    nobody = pwd.getpwnam("nobody")
    python = subprocess.run(["ls", os.__file__, sys.prefix], user="nobody", group=nobody.pw_gid, capture_output=True)
    if python.returncode:
        pytest.skip("this Python lies where others may not read")
    for folder in (project.folder, *project.folder.parents[:3]):
        folder.chmod(0o777)
    for path in (project.server.folder, project.server.path):
        path.chmod(0o777)
    project.add("""
        imported_by = os.getuid()

        @app.task
        def who():
            return [imported_by, os.getuid(), os.geteuid(), os.environ["HOME"]]
    """)
    worker = project.worker("user = nobody\npidfile = it.pid")
    assert project.tasks.who.enqueue().wait(timeout=60) == [nobody.pw_uid] * 3 + [nobody.pw_dir]
    pidfile = project.folder / "it.pid"
    assert pidfile.read_text().strip() == str(worker.pid)
    assert pidfile.stat().st_uid == nobody.pw_uid
    worker.send(signal.SIGHUP)
    until(lambda: worker.log.count("is ready") == 2)
    assert project.tasks.who.enqueue().wait(timeout=60)[1] == nobody.pw_uid
    assert worker.stop() == 0
    assert not pidfile.exists()


@as_root
@pytest.mark.parametrize(("conf", "times"), [("", 1), ("user = root", 0)])
def test_that_tasks_run_as_root_is_said_unless_it_is_meant(project: Project, conf: str, times: int) -> None:
    worker = project.worker(conf)
    assert worker.log.count("the tasks run as root; set `user`") == times
    assert worker.stop() == 0
