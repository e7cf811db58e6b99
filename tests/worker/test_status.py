"""Where the status socket is, and what becomes of a worker that can't have one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefork.worker.loop import Loop
from prefork.worker.status import StatusSocket, ask, path_of, sockets


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_a_worker_that_can_have_no_folder_for_its_socket_says_so_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    """As in a container whose disk can't be written to."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / folder))
    conf = tmp_path / "shop.conf"
    path = path_of(conf, None, os.getpid())
    assert path.parent.parent == tmp_path / folder
    assert sockets(conf, None) == []
    it = StatusSocket(Loop(), path, lambda: b"{}")
    it.open()
    assert "no status socket at" in caplog.text
    it.close()


def test_a_worker_with_a_pidfile_needs_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    path = path_of(tmp_path / "shop.conf", tmp_path / "pid", 1)
    it = StatusSocket(Loop(), path, lambda: b"{}")
    it.open()
    assert sockets(tmp_path / "shop.conf", tmp_path / "pid") == [tmp_path / "pid.sock"]
    it.close()
    with pytest.raises(FileNotFoundError):
        ask(path, 1.0)
