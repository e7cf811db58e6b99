"""The end of another worker's process is heard of at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prefork.worker.loop import Loop
from prefork.worker.neighbours import Neighbours

PATIENCE_S = 60


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="elsewhere the next beat finds it")
@pytest.mark.parametrize("reaped", [False, True])
def test_the_kernel_tells_of_an_end_once(reaped: bool) -> None:
    loop, told = Loop(), list[str]()

    def ended() -> None:
        told.append("ended")
        loop.stop()

    it = Neighbours(loop, ended)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    it.watch({"worker": process.pid})
    assert not it.has_ended("worker")
    process.kill()
    if reaped:
        process.wait(PATIENCE_S)
    loop.call_later(PATIENCE_S, loop.stop)
    loop.run()
    process.wait(PATIENCE_S)
    assert told == ["ended"]
    it.watch({"worker": process.pid, "other": os.getpid()})
    assert (it.has_ended("worker"), it.has_ended("other")) == (True, False)
    it.watch({})  # it was taken over
    assert not it.has_ended("worker")
    assert process.stdin
    process.stdin.close()


def test_what_cannot_be_watched_has_not_ended() -> None:
    it = Neighbours(Loop(), lambda: None)
    it.watch({"worker": 2**22 + 1})  # no such process
    assert not it.has_ended("worker")
