"""A broker that cannot be used: its address, what is wrong, the remedy; exit code 69, from each of those who ask it.

Each row is a place to which the worker, `--check`, a producer and the operator's command go; all say the same line.
"""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from prefork import BrokerError, Prefork
from tests.broker.wires import Listener, Redislike, Says, free_port
from tests.conftest import Project, Server, Worker, until
from tests.wrong import APP, LIMIT_S, begin, end, run, the_line

EXIT_BROKER = 69
TCP_LIMIT_S = 0.6  # of the app's own, so that what never answers is told soon
GIVEN_S = 20.0  # the same where somebody answers, who may be late on a busy machine
AGAIN_S = 5.0  # the same where it is tried again until then, whatever is answered
USERS = {
    "reader": "~* +@read +@connection +info",
    "stranger": "~* +ping",
    "unscripted": "~* +@all -eval -evalsha -script",
    "elsewhere": "~other:* +@all",
    "uninformed": "~* &* +@all -info -client|setname",
}
DENIED = (
    b"-DENIED Redis is running in protected mode because protected mode is enabled and no password is set for the "
    b"default user. In this mode connections are only accepted from the loopback interface.\r\n"
)


class Greets(Listener):
    """Speaks first, as servers of other protocols do, and then says the same to whatever comes."""

    def __init__(self, greeting: bytes, answer: bytes = b"", *, then_close: bool = False) -> None:
        self._greeting, self._answer, self._then_close = greeting, answer, then_close
        super().__init__()

    def talk(self, connection: socket.socket) -> None:
        connection.sendall(self._greeting)
        while not self._then_close and connection.recv(1 << 16):
            connection.sendall(self._answer)


class Forwarder(Listener):
    """Passes all on to a port, from an address that is not quite the local one."""

    def __init__(self, port: int, source: str) -> None:
        self._target, self._source = port, source
        super().__init__()

    def talk(self, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target), source_address=(self._source, 0)) as server:
            threading.Thread(target=self._back, args=(server, connection), daemon=True).start()
            while data := connection.recv(1 << 16):
                server.sendall(data)

    def _back(self, server: socket.socket, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                connection.sendall(data)


class Web(http.server.ThreadingHTTPServer):
    """A real web server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Places:
    """The servers and listeners of this module's rows, each started when it is asked for first. -> their URLs"""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._urls: dict[str, str] = {}
        self._ends = contextlib.ExitStack()

    def url(self, name: str) -> str:
        if name not in self._urls:
            self._urls[name] = getattr(self, name)()
        return self._urls[name]

    def close(self) -> None:
        self._ends.close()

    def server(self, *options: str, binary: str = "") -> int:
        """A real server on a port of this host. -> the port"""
        port, folder = free_port(), tempfile.mkdtemp(prefix="pf", dir="/tmp")
        command = [binary or self._binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._ends.callback(shutil.rmtree, folder, ignore_errors=True)
        self._ends.callback(process.wait, 10)
        self._ends.callback(process.kill)

        def listens() -> bool:
            assert process.poll() is None, (command, options)
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True
            return False

        until(listens, what="the server listens")
        return port

    def _listener(self, listener: Listener) -> str:
        self._ends.callback(listener.close)
        return listener.url

    # -- real servers -------------------------------------------------------------------------------------------

    def good(self) -> str:
        return f"redis://127.0.0.1:{self.server()}/0"

    def locked(self) -> str:
        users = [word for name, rules in USERS.items() for word in ("--user", name, "on", ">secret", *rules.split())]
        return f"127.0.0.1:{self.server('--requirepass', 'secret', *users)}/0"

    def replica(self) -> str:
        primary = self.server("--repl-diskless-sync-delay", "0")
        port = self.server("--replicaof", f"127.0.0.1 {primary}")
        until(lambda: redis.Redis(port=port).info("replication")["master_link_status"] == "up", what="it is a replica")
        return f"redis://127.0.0.1:{port}/0"

    def orphan(self) -> str:
        return f"redis://127.0.0.1:{self.server('--replicaof', f'127.0.0.1 {free_port()}')}/0"

    def strict_replica(self) -> str:
        port = self.server("--replicaof", f"127.0.0.1 {free_port()}", "--replica-serve-stale-data", "no")
        return f"redis://127.0.0.1:{port}/0"

    def protected(self) -> str:
        """Redis itself, asked from an address that isn't the loopback's usual one; without it, what it says."""
        if binary := shutil.which("redis-server"):
            port = self.server("--bind", "127.0.0.1", "127.0.0.2", "--protected-mode", "yes", binary=binary)
            url = self._listener(there := Forwarder(port, "127.0.0.2"))
            with socket.create_connection(("127.0.0.1", there.port), 5) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(100).startswith(b"-DENIED"):
                    return url
        return self._listener(Greets(DENIED, then_close=True))

    def cluster(self) -> str:
        return f"redis://127.0.0.1:{self.server('--cluster-enabled', 'yes', '--cluster-port', str(free_port()))}/0"

    def full(self) -> str:
        return f"redis://127.0.0.1:{self.server('--maxclients', '1')}/0"

    # -- others -------------------------------------------------------------------------------------------------

    def web(self) -> str:
        web = Web()
        self._ends.callback(web.server_close)
        self._ends.callback(web.shutdown)
        return f"redis://127.0.0.1:{web.server_port}/0"

    def mail(self) -> str:
        return self._listener(Greets(b"220 mail.example.org ESMTP\r\n", b"502 5.5.2 command not recognized\r\n"))

    def ssh(self) -> str:
        return self._listener(Greets(b"SSH-2.0-OpenSSH_9.2\r\n"))

    def mysql(self) -> str:
        return self._listener(Greets(b"J\x00\x00\x00\x0a5.7.33\x00\x08\x00\x00\x00"))

    def garbage(self) -> str:
        return self._listener(Greets(b"\x00\xff\x17\x1b[31m\r\n" * 50))

    def yes_man(self) -> str:
        return self._listener(Says(b"+hello\r\n"))

    def proxy(self) -> str:
        return self._listener(Redislike(lambda words: b"-ERR unknown command '\x1b[31m%s'\r\n" % words[0]))

    def old(self) -> str:
        return self._listener(Redislike(version="5.0.0"))

    def silent(self) -> str:
        return self._listener(Listener())

    def endless(self) -> str:
        return self._listener(Says(b"$1000000000\r\n"))

    def closes(self) -> str:
        return self._listener(Says(b"", then_close=True))

    def hangs_up(self) -> str:
        return self._listener(Greets(b"", then_close=True))

    def nobody(self) -> str:
        return f"redis://127.0.0.1:{free_port()}/0"


@pytest.fixture(scope="module")
def places(server_binary: str) -> Iterator[Places]:
    places = Places(server_binary)
    yield places
    places.close()


FORMS = "write redis://host:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock or embedded:./var/prefork"
PROTOCOL = "does not speak Redis's protocol; check host and port in the broker URL"
PASSWORD = "refuses the password; check user and password in the broker URL"
PERMIT = ("does not permit this user what prefork needs (", "); extend its ACL")
REPLICA = "is a read-only replica; name the primary in the broker URL"
ANSWERS = "does not answer in time; is it a Redis, and is the network open?"
LOG = "is it a Redis, and what does its log say?"
CLUSTER = "is a cluster that is down; look at CLUSTER INFO"
SILENT = "does not answer in time", "refuses the connection", "has no socket there"
REFUSED_FOR_NOW = LOG, REPLICA, CLUSTER

# {name}: the URL of that place. What all of them say. "*": the operator's command, which only reads, has no trouble
# there.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bad scheme": ("http://127.0.0.1:6379", ("has the scheme 'http'", FORMS)),
    "no scheme": ("127.0.0.1:6379", ("has no scheme", FORMS)),
    "bad port": ("redis://127.0.0.1:66666/0", ("cannot be read (Port out of range 0-65535)", FORMS)),
    "bad option": ("redis://127.0.0.1:1/0?speed=high", ("has an option that cannot be used", "speed")),
    "bad address": ("redis://[::1/0", ("cannot be read (Invalid IPv6 URL)", FORMS)),
    "embedded nowhere": ("embedded:", ("embedded:",)),
    "unknown host": ("redis://no.such.host.invalid:6379/0", ("is on a host whose name", "check the broker URL")),
    "refused": ("{nobody}", ("refuses the connection; is it running there?",)),
    "no such socket": ("unix:///nowhere/redis.sock", ("has no socket there; is it running, and is this its path?",)),
    "a file for a socket": ("unix:///etc/passwd", ("refuses the connection; is it running there?",)),
    "no answer": ("{silent}", (ANSWERS,)),
    "no end of the answer": ("{endless}", (ANSWERS,)),
    "no answer to TLS": ("s{silent}", ("does not answer in time; does it speak TLS, and is the network open?",)),
    "TLS to a server without": ("s{good}", ("does not answer in time; does it speak TLS, and is the network open?",)),
    "TLS to something else": ("s{mail}", ("does not speak TLS; write redis:// in place of rediss://",)),
    "wrong password": ("redis://:wrong@{locked}", (PASSWORD,)),
    "wrong user": ("redis://bob:secret@{locked}", (PASSWORD,)),
    "no password": ("redis://{locked}", ("asks for a password; put it into the broker URL: redis://:password@",)),
    "no permission for anything": ("redis://stranger:secret@{locked}", PERMIT),
    "*no permission to write": ("redis://reader:secret@{locked}", PERMIT),
    "*no permission for scripts": ("redis://unscripted:secret@{locked}", PERMIT),
    "no permission for these keys": ("redis://elsewhere:secret@{locked}", PERMIT),
    "no such database": ("redis://:secret@{locked}999", ("has no such database (", "the number at the end of the")),
    "no number of a database": ("{nobody}/mail", ("names the database '0/mail'; databases are numbers",)),
    "web server": ("{web}", (PROTOCOL,)),
    "mail server": ("{mail}", (PROTOCOL,)),
    "ssh server": ("{ssh}", (PROTOCOL,)),
    "mysql server": ("{mysql}", (PROTOCOL,)),
    "garbage": ("{garbage}", (PROTOCOL,)),
    "always the same": ("{yes_man}", (PROTOCOL,)),
    "a proxy that knows no command": ("{proxy}", ("does not know a command that prefork needs (", r"\x1b[31m")),
    "closes": ("{closes}", (LOG,)),
    "hangs up": ("{hangs_up}", (LOG,)),
    "*replica": ("{replica}", (REPLICA,)),
    "*replica without its primary": ("{orphan}", (REPLICA,)),
    "too old": ("{old}", ("is redis 5.0.0; prefork needs Redis 6.2 or newer, or Valkey",)),
    "protected mode": ("{protected}", ("runs in protected mode; connect from its own host, or set a password on it",)),
    "*cluster that nobody has set up": ("{cluster}", (CLUSTER,)),
}


# Those that an operator will meet sooner or later, asked by every command ("no answer" below); the others by the
# worker and by a producer.
USUAL = {
    "bad scheme", "unknown host", "refused", "wrong password", "*no permission to write", "web server",
    "*replica", "too old", "protected mode", "no such database",
}  # fmt: skip


class Urls(dict[str, str]):
    """For `format_map`: what a row names is started when the row is run."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def __missing__(self, name: str) -> str:
        return self._places.url(name)


def url_of(row: str, places: Places) -> str:
    """`s{name}` makes rediss:// of redis://."""
    form = ROWS[row][0]
    url = form.removeprefix("s{").join(("{", "")) if form.startswith("s{") else form
    url = url.format_map(Urls(places))
    return url.replace("redis://", "rediss://") if form.startswith("s{") else url


def shown(url: str) -> str:
    """As people may see it."""
    scheme, _, rest = url.partition("://")
    userinfo, at, place = rest.rpartition("@")
    user = userinfo.partition(":")[0]
    return f"{scheme}://{user + at if user else ''}{place.partition('?')[0]}" if rest else url


@pytest.mark.parametrize("row", ROWS)
def test_a_broker_that_cannot_be_used(tmp_path: Path, places: Places, row: str) -> None:
    url, parts = url_of(row, places), ROWS[row][1]
    limit_s = TCP_LIMIT_S if parts[0].startswith(SILENT) else AGAIN_S if parts[0] in REFUSED_FOR_NOW else GIVEN_S
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=limit_s))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\nconcurrency = 1\n")
    commands = [begin(tmp_path, "-c", "shop.conf")]
    if row in USUAL:
        commands.append(begin(tmp_path, "-c", "shop.conf", "--check"))
    if row in USUAL and row[0] != "*":
        commands.append(begin(tmp_path, "queues", "-c", "shop.conf", program="prefork"))

    said = [produce(url, limit_s)]
    for n, command in enumerate(commands):
        said.append(the_line(end(command), EXIT_BROKER, program="prefork" if n == 2 else "prefork-worker"))
    for line in said:
        assert shown(url) in line
        assert "secret" not in line.replace("secret@", "")
        for part in parts:
            assert part in line, (part, line)
    assert row not in USUAL or said[1] == said[2], "--check says what the worker would say"


def produce(url: str, limit_s: float = TCP_LIMIT_S) -> str:
    """What an enqueue says."""
    app = Prefork("shop", broker=url, limit_s=limit_s)
    task = app.task(name="t")(lambda: None)
    begun = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        task.enqueue()
    assert time.monotonic() - begun < LIMIT_S
    app.client.close()
    line = str(caught.value)
    assert line.isprintable()
    return line


def test_the_usual_limit_is_below_that_of_a_patient_operator(tmp_path: Path, places: Places) -> None:
    """Whatever is slow here, all is over in about five seconds."""
    url = places.url("silent")
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=5.0))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    commands = [begin(tmp_path, "-c", "shop.conf"), begin(tmp_path, "-c", "shop.conf", "--check")]
    operator = begin(tmp_path, "queues", "--broker", url, program="prefork")
    for command in commands:
        the_line(end(command), EXIT_BROKER, ANSWERS)
    the_line(end(operator), EXIT_BROKER, ANSWERS, program="prefork")


def test_a_server_with_no_connection_left(tmp_path: Path, places: Places) -> None:
    url = places.url("full")
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=AGAIN_S))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    with redis.Redis.from_url(url) as only:
        until(lambda: answers(only), what="the only connection")
        the_line(run(tmp_path, "-c", "shop.conf"), EXIT_BROKER, url, "has no connection left; raise its maxclients")


def answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(client.ping())
    return False


def test_a_replica_that_has_lost_its_primary_and_says_so(tmp_path: Path, places: Places) -> None:
    url = places.url("strict_replica")
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=AGAIN_S))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    the_line(run(tmp_path, "-c", "shop.conf"), EXIT_BROKER, url, "replica", "name the primary in the broker URL")


def test_an_address_without_a_broker_anywhere(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP.format(url=None, limit_s=1))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    the_line(run(tmp_path, "-c", "shop.conf", PREFORK_BROKER=""), 78, "app shop has no broker", "PREFORK_BROKER")


def test_a_bad_address_of_the_environment_is_told_alike(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP.format(url=None, limit_s=1))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    said = run(tmp_path, "-c", "shop.conf", PREFORK_BROKER="http://broker")
    the_line(said, EXIT_BROKER, "http://broker has the scheme 'http'", FORMS)


# -- what is no reason not to start ---------------------------------------------------------------------------------

EVICTS = "maxmemory-policy is allkeys-lru: when memory is short, tasks are thrown away"


@pytest.fixture
def evicting(server_binary: str) -> Iterator[Server]:
    server = Server(server_binary, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    yield server
    server.close()


def test_a_policy_that_evicts_is_warned_of_at_the_start(tmp_path: Path, evicting: Server) -> None:
    project = Project(tmp_path, evicting, "evicting")
    try:
        worker = project.worker("concurrency = 1")
        (line,) = [line for line in worker.log.splitlines() if "maxmemory" in line]
        for part in ("WARNING", evicting.url, EVICTS, "CONFIG SET maxmemory-policy noeviction"):
            assert part in line
        assert worker.stop() == 0
    finally:
        project.close()


def test_a_policy_that_evicts_is_warned_of_by_check_and_by_doctor(tmp_path: Path, evicting: Server) -> None:
    (tmp_path / "shop.py").write_text(APP.format(url=evicting.url, limit_s=GIVEN_S))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\n")
    said = run(tmp_path, "-c", "shop.conf", "--check")
    assert (said.code, said.out[:12]) == (0, "ok: shop:app")
    (line,) = said.err.splitlines()
    for part in ("prefork-worker: warning: ", evicting.url, EVICTS, "CONFIG SET maxmemory-policy noeviction"):
        assert part in line
    doctor = run(tmp_path, "doctor", "-c", "shop.conf", program="prefork")
    assert doctor.code == 1
    assert EVICTS in doctor.out
    assert "CONFIG SET maxmemory-policy noeviction" in doctor.out


def test_a_server_without_memory_takes_no_task_but_its_worker_starts(tmp_path: Path, places: Places) -> None:
    """What is there runs, so that memory gets free."""
    port = places.server("--maxmemory", "1")
    url = f"redis://127.0.0.1:{port}/0"
    assert "is out of memory and refuses writes; raise its maxmemory, or empty what is not needed" in produce(
        url, GIVEN_S
    )
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=GIVEN_S))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\nconcurrency = 1\n")
    said = run(tmp_path, "-c", "shop.conf", "--burst")
    assert said.code == 0
    assert "% of maxmemory is used; remedy: raise maxmemory, or drain the queues" in said.err


def test_a_user_who_may_not_ask_how_the_server_is_can_work(tmp_path: Path, places: Places) -> None:
    url = f"redis://uninformed:secret@{places.url('locked')}"
    (tmp_path / "shop.py").write_text(APP.format(url=url, limit_s=GIVEN_S))
    (tmp_path / "shop.conf").write_text("[prefork]\napp = shop:app\nconcurrency = 1\n")
    check, burst = begin(tmp_path, "-c", "shop.conf", "--check"), begin(tmp_path, "-c", "shop.conf", "--burst")
    checked, worked = end(check), end(burst)
    assert (checked.code, checked.err) == (0, "")
    assert checked.out.startswith("ok: shop:app")
    warned = [line for line in worked.err.splitlines() if "WARNING" in line and "run as root" not in line]
    assert (worked.code, "ERROR" in worked.err, warned) == (0, False, []), worked.err


def test_a_user_who_may_not_take_a_lease_is_told_of_by_the_worker(tmp_path: Path, places: Places) -> None:
    """What no look beforehand can find out: which commands the scripts use."""
    locked = places.url("locked")
    client = redis.Redis.from_url(f"redis://:secret@{locked}")
    client.acl_setuser("leaseless", enabled=True, passwords=["+secret"], keys=["*"], channels=["*"],
                       categories=["+@all"], commands=["-zadd"])  # fmt: skip
    (tmp_path / "shop.py").write_text(APP.format(url=f"redis://leaseless:secret@{locked}", limit_s=GIVEN_S))
    worker = Worker(tmp_path, "app = shop:app\nconcurrency = 1\nlease = 1\n", wait=False)
    try:
        until(lambda: "refuses" in worker.log, LIMIT_S, "the worker says that it has no lease")
        client.acl_setuser("leaseless", commands=["+zadd"])
        until(lambda: "is ready" in worker.log, LIMIT_S, "it begins when it may")
        assert worker.stop() == 0
    finally:
        worker.close()
    assert "another worker has taken over" not in worker.log
    assert "Traceback" not in worker.log
