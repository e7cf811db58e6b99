"""The torture's private server."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from prefork.torture import server as private
from prefork.torture.server import Server, break_snapshots, connect


def test_one_that_refuses_to_end_because_it_cannot_save_is_killed(
    tmp_path: Path, server_binary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "END_LIMIT_S", 5.0)
    monkeypatch.setattr(private, "ASK_LIMIT_S", 60.0)
    folder = tmp_path / "server"
    server = Server(server_binary, folder)
    server.start()
    try:
        connect(server.url).one("CONFIG", "SET", "save", "86400 1000000000")
        break_snapshots(folder)
        server.end(signal.SIGTERM)
        assert not server.up
        assert "can't exit" in (folder / "server.log").read_text()
    finally:
        server.close()
