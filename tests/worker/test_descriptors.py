from __future__ import annotations

import contextlib
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from prefork.worker.descriptors import FOR_EACH_CHILD, FOR_THE_REST
from tests.conftest import Project, until


def room(soft: int, hard: int, children: int) -> tuple[int, str]:
    """What a process with these limits has after it has made room, and what it says."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        f"from prefork.worker.descriptors import make_room; said = make_room({children})\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    limit, _, said = done.stdout.strip().partition(" ")
    return int(limit), said


@pytest.mark.parametrize(
    ("soft", "hard", "children", "limit"), [(1024, 2000, 4, 1024), (256, 2000, 4, 276), (256, 1256, 200, 1256)]
)
def test_the_limit_is_raised_only_as_far_as_needed(soft: int, hard: int, children: int, limit: int) -> None:
    assert room(soft, hard, children) == (limit, "")


def test_a_limit_that_cannot_be_raised_so_far_is_told() -> None:
    said = "1000 children need up to 5256 open files, the limit is 512; raise it (ulimit -n, LimitNOFILE=)"
    assert room(256, 512, 1000) == (512, said)


@contextlib.contextmanager
def limited(soft: int) -> Iterator[None]:
    """What is started here may have only so many open files, unless it raises that."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_a_worker_has_as_many_children_as_wanted_whatever_the_limit(project: Project) -> None:
    with limited(160):
        worker = project.worker("concurrency = 40")
    until(lambda: len(worker.children()) == 40)
    assert "cannot fork" not in worker.log
    assert psutil.Process(worker.pid).num_fds() <= 40 * FOR_EACH_CHILD + FOR_THE_REST // 4
    assert worker.stop() == 0
