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
    done = subprocess.run([sys.executable, "-c", CODE, *users], capture_output=True, text=True, timeout=20)
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
    assert project.tasks.who.enqueue().wait(timeout=20) == [nobody.pw_uid] * 3 + [nobody.pw_dir]
    pidfile = project.folder / "it.pid"
    assert pidfile.read_text().strip() == str(worker.pid)
    assert pidfile.stat().st_uid == nobody.pw_uid
    worker.send(signal.SIGHUP)
    until(lambda: worker.log.count("is ready") == 2)
    assert project.tasks.who.enqueue().wait(timeout=20)[1] == nobody.pw_uid
    assert worker.stop() == 0
    assert not pidfile.exists()
