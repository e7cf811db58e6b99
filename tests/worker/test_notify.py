from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
from collections.abc import Iterator

import pytest

from prefork.worker import notify
from prefork.worker.notify import Notifier
from tests.conftest import Project, until


class Listener:
    """Stands for systemd."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self._socket.setblocking(False)
        self.heard: list[dict[str, str]] = []

    def listen(self) -> list[dict[str, str]]:
        while True:
            try:
                said = self._socket.recv(4096).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in said.splitlines()))

    def count(self, what: str) -> int:
        return sum(what in message for message in self.listen())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def listener(tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> Iterator[Listener]:
    it = Listener(str(tmp_path / "n") if request.param == "path" else f"@prefork-test-{os.getpid()}")
    yield it
    it.close()


def test_what_is_told(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listener.path)
    it = Notifier.from_environment()
    it.ready("4 children")
    it.status("5 children")
    it.reloading()
    it.stopping()
    it.watchdog()
    ready, resized, reloading, stopping, alive = listener.listen()
    assert resized == {"STATUS": "5 children"}
    assert ready == {"READY": "1", "STATUS": "4 children"}
    assert reloading["RELOADING"] == "1"
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert stopping["STOPPING"] == "1"
    assert alive == {"WATCHDOG": "1"}


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [("30000000", None, 15.0), ("30000000", "me", 15.0), ("30000000", "1", None), ("", None, None), ("x", None, None),
     ("0", None, None), ("-5", None, None), ("9" * 5000, None, None), ("3e7", None, None)],
)  # fmt: skip
def test_how_often_the_watchdog_wants_to_hear(
    usec: str, pid: str | None, interval_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "me" else pid)
    assert Notifier.from_environment().watchdog_interval_s == interval_s


def test_without_a_socket_or_with_one_that_is_gone_or_full_nothing_happens(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier.from_environment().ready("")
    Notifier("/nowhere", None).watchdog()
    full = Listener(str(tmp_path / "full"))
    for _ in range(2000):
        Notifier(full.path, None).watchdog()
    full.close()


def test_what_is_told_may_be_any_text(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listener.path)
    Notifier.from_environment().ready("queues é, 送信=1")
    assert listener.listen() == [{"READY": "1", "STATUS": "queues é, 送信=1"}]


def test_no_descriptor_is_left_open(listener: Listener) -> None:
    before = len(os.listdir("/dev/fd"))
    for _ in range(10):
        Notifier(listener.path, None).watchdog()
        Notifier("/nowhere", None).watchdog()
        Notifier("/" + "x" * 200, None).watchdog()
    assert len(os.listdir("/dev/fd")) <= before  # what other tests have left may go meanwhile


def test_a_child_forgets_it() -> None:
    environment = {"NOTIFY_SOCKET": "x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "HOME": "/"}
    notify.forget(environment)
    assert environment == {"HOME": "/"}


def test_a_worker_tells_of_its_life(project: Project, tmp_path: pathlib.Path) -> None:
    project.add("""
        @app.task
        def told():
            return os.environ.get("NOTIFY_SOCKET", "nobody")
    """)
    systemd = Listener(str(tmp_path / "systemd"))
    # What is sent while ten wait to be read is lost, so not many a second.
    worker = project.worker(NOTIFY_SOCKET=systemd.path, WATCHDOG_USEC="2000000")
    until(lambda: systemd.count("READY") == 1)
    until(lambda: systemd.count("WATCHDOG") >= 3)
    assert project.tasks.told.enqueue().wait(timeout=60) == "nobody"
    worker.send(signal.SIGHUP)
    until(lambda: systemd.count("READY") == 2)
    assert systemd.count("RELOADING") == 1
    assert systemd.count("STOPPING") == 0
    before = systemd.count("WATCHDOG")
    until(lambda: systemd.count("WATCHDOG") > before)
    assert worker.stop() == 0
    assert systemd.count("STOPPING") == 1
    systemd.close()


def test_the_status_follows_the_number_of_children_and_a_pause(project: Project, tmp_path: pathlib.Path) -> None:
    systemd = Listener(str(tmp_path / "systemd"))
    worker = project.worker("concurrency = 2", NOTIFY_SOCKET=systemd.path)
    told = ["2 children, queues default"]
    for number, status in [
        (signal.SIGTTIN, "3 children, queues default"),
        (signal.SIGTTOU, "2 children, queues default"),
        (signal.SIGUSR2, "paused, 2 children, queues default"),
        (signal.SIGUSR2, "2 children, queues default"),
    ]:
        until(lambda: len(systemd.listen()) == len(told))
        worker.send(number)
        told.append(status)
    until(lambda: len(systemd.listen()) == len(told))
    assert [message["STATUS"] for message in systemd.heard] == told
    assert [message for message in systemd.heard if "READY" in message] == systemd.heard[:1]
    assert worker.stop() == 0
    systemd.close()


def test_the_time_until_the_new_version_is_up_counts_from_its_start(project: Project, tmp_path: pathlib.Path) -> None:
    systemd = Listener(str(tmp_path / "systemd"))
    worker = project.worker(NOTIFY_SOCKET=systemd.path, WATCHDOG_USEC="600000000")
    until(lambda: systemd.count("READY") == 1)
    assert systemd.count("WATCHDOG") == 1
    worker.send(signal.SIGHUP)
    until(lambda: systemd.count("READY") == 2)
    assert [next(iter(message)) for message in systemd.heard] == [
        "WATCHDOG", "READY", "RELOADING", "WATCHDOG", "WATCHDOG", "READY"
    ]  # fmt: skip
    assert worker.stop() == 0
    systemd.close()


def test_a_watchdog_that_is_meant_for_another_process_hears_nothing(project: Project, tmp_path: pathlib.Path) -> None:
    systemd = Listener(str(tmp_path / "systemd"))
    worker = project.worker(NOTIFY_SOCKET=systemd.path, WATCHDOG_USEC="20000", WATCHDOG_PID="1")
    until(lambda: systemd.count("READY") == 1)
    assert project.tasks.nap.enqueue(1, 0.1).wait(timeout=60) == 1
    assert worker.stop() == 0
    assert [next(iter(message)) for message in systemd.listen()] == ["READY", "STOPPING"]
    systemd.close()


def test_a_worker_does_not_wait_for_one_who_does_not_listen(project: Project, tmp_path: pathlib.Path) -> None:
    systemd = Listener(str(tmp_path / "systemd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                probe.sendto(b"x", systemd.path)
        worker = project.worker(NOTIFY_SOCKET=systemd.path, WATCHDOG_USEC="2000")
        assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
        assert worker.stop() == 0
        assert "Traceback" not in worker.log
        with pytest.raises(BlockingIOError):  # full all the time
            probe.sendto(b"x", systemd.path)
    systemd.close()


def test_a_supervisor_that_is_gone_is_no_reason_to_fail(project: Project, tmp_path: pathlib.Path) -> None:
    systemd = Listener(str(tmp_path / "systemd"))
    worker = project.worker(NOTIFY_SOCKET=systemd.path, WATCHDOG_USEC="20000")
    systemd.close()
    (tmp_path / "systemd").unlink()
    assert project.tasks.add.enqueue(1).wait(timeout=60) == 3
    assert worker.stop() == 0
    assert "Traceback" not in worker.log
