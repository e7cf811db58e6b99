"""Redis in trouble, in each way it knows: nothing is lost, one line says when it begins and one when it ends, the
worker idles meanwhile, and works again at once when it is over.

What each fault leads to is in docs/reliability.md; `benchmarks/recovery.py` measures how soon the worker is back.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import redis

from prefork.broker import trouble, verbs
from tests.broker.wires import free_port
from tests.conftest import SLACK_S, Project, Server, Worker, until
from tests.process.proxy import Network
from tests.process.scene import Clock, active, counts, key

BACK_S = 1.5  # from the end of the trouble to the next task
TROUBLE_S = 1.3
LATE_S = 5.3  # where it takes a limit to notice
CLAIM = verbs.script("claim").sha.encode()
SETTLE = verbs.script("settle").sha.encode()
BEAT = verbs.script("beat").sha.encode()

QUICK = """
@app.task(name="quick", result_ttl=600)
def quick(n):
    note("quick", n)
    return n
"""

# The master imports the app: so the limits are the real ones, only shorter, in the processes of one test.
SHORT_LIMITS = """
if "pytest" not in sys.modules:
    from prefork.broker import channel, dial
    dial.CONNECT_LIMIT_S = channel.REPLY_LIMIT_S = 4.0
    channel.Channel.send.__defaults__ = channel.Channel.send_words.__defaults__ = (4.0,)
"""


@dataclass
class Scene:
    """A server, a network in front of it, and a worker behind that."""

    project: Project
    network: Network
    more: list[Server] = field(default_factory=list)  # other servers
    undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def server(self) -> Server:
        return self.project.server

    @property
    def client(self) -> redis.Redis:
        return self.server.client

    def url(self, userinfo: str = "") -> str:
        return f"redis://{userinfo}127.0.0.1:{self.network.port}/0"

    def worker(self, conf: str = "lease = 30", *, userinfo: str = "", wait: bool = True) -> Worker:
        return self.project.worker(f"broker = {self.url(userinfo)}\n{conf}", wait=wait)

    def kick(self) -> None:
        """Have the server end the worker's connections."""
        for connection in self.client.client_list():
            if connection["name"].startswith("prefork-") and connection["name"] != "prefork-producer":
                self.client.execute_command("CLIENT", "KILL", "ID", connection["id"])


@pytest.fixture
def scene(own_project: Project) -> Iterator[Scene]:
    yield from staged(own_project)


def staged(project: Project) -> Iterator[Scene]:
    """A scene, and its end."""
    project.add(QUICK)
    with Network(project.server.path) as network:
        scene = Scene(project, network)
        yield scene
        for undo in scene.undo:
            undo()
        network.heal()
    for server in scene.more:
        server.close()


def troubles(worker: Worker) -> list[str]:
    """The lines in which it speaks of trouble with the broker, or of its end."""
    return [line for line in worker.log.splitlines() if "ERROR" in line or ("WARN" in line and " after " in line)]


# -- the faults -------------------------------------------------------------------------------------------------------


class Fault:
    """One kind of trouble. `said`: what the worker's line has to say; `userinfo`: as whom it connects."""

    said = ""
    userinfo = ""
    short_limits = False
    killed = False  # the server is, so that the first thing to be said may be that it closed the connection

    def prepare(self, scene: Scene) -> None:
        """Before the worker starts."""

    def begin(self, scene: Scene) -> None:
        raise NotImplementedError

    def end(self, scene: Scene) -> None:
        raise NotImplementedError


class Restart(Fault):
    """The server ends, and another one with its data, and with no script loaded, takes its place."""

    said = "the broker"

    def __init__(self, number: int) -> None:
        self.number = number

    def begin(self, scene: Scene) -> None:
        scene.server.kill(self.number)

    def end(self, scene: Scene) -> None:
        scene.server.start()


class Stall(Fault):
    """The server stands still: connections stay, and are accepted, and nobody answers."""

    said = "does not answer in time"
    short_limits = True

    def begin(self, scene: Scene) -> None:
        process: Any = scene.server.process
        process.send_signal(signal.SIGSTOP)
        scene.undo.append(lambda: process.send_signal(signal.SIGCONT))

    def end(self, scene: Scene) -> None:
        scene.undo.pop()()


class Passing(Fault):
    """The network does something to what passes."""

    said = "does not answer in time"
    short_limits = True

    def __init__(self, mode: str, *, replies_only: bool = False) -> None:
        self.mode, self.replies_only = mode, replies_only

    def begin(self, scene: Scene) -> None:
        scene.network.set(self.mode, replies_only=self.replies_only)

    def end(self, scene: Scene) -> None:
        scene.network.heal()


class Refusal(Fault):
    """Whatever answers at that address says only this."""

    def __init__(self, error: bytes, said: str, *, kick: bool) -> None:
        self.error, self.said, self.kick = error, said, kick

    def begin(self, scene: Scene) -> None:
        scene.network.set("refuse", error=self.error + b"\r\n")
        if self.kick:
            scene.network.cut()

    def end(self, scene: Scene) -> None:
        scene.network.heal()


class Corruption(Fault):
    """Replies are damaged on their way."""

    def __init__(self, mangle: Callable[[bytes], bytes]) -> None:
        self.mangle = mangle

    def begin(self, scene: Scene) -> None:
        scene.network.mangle = self.mangle

    def end(self, scene: Scene) -> None:
        scene.network.heal()


class Loading(Fault):
    """The server is killed, and its successor takes some two seconds to read the data."""

    said = "is still loading"
    killed = True

    def begin(self, scene: Scene) -> None:
        for n in range(20):
            scene.client.set(f"ballast{n}", b"x" * 4096)
        scene.client.bgrewriteaof()
        until(lambda: not scene.client.info("persistence")["aof_rewrite_in_progress"])
        scene.server.kill()
        scene.server.path.unlink(missing_ok=True)
        slowly = ["--key-load-delay", "50000", "--loading-process-events-interval-bytes", "1024"]
        scene.server.process = subprocess.Popen(
            [*scene.server._command, *slowly], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def end(self, scene: Scene) -> None:
        until(scene.server.answers)


class Failover(Fault):
    """The primary dies; its address leads to the replica, which some time later becomes the primary."""

    said = "READONLY"
    killed = True

    def prepare(self, scene: Scene) -> None:
        port = str(free_port())
        scene.client.config_set("port", port)
        binary = scene.server._command[0]
        replica = Server(binary, "--replicaof", f"127.0.0.1 {port}", "--repl-diskless-sync-delay", "0")
        scene.more.append(replica)

    def begin(self, scene: Scene) -> None:
        replica = scene.more[0]
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        until(lambda: scene.client.execute_command("WAIT", 1, 1000) == 1)
        scene.server.kill()
        scene.network.target = replica.path

    def end(self, scene: Scene) -> None:
        replica = scene.more[0]
        replica.client.execute_command("REPLICAOF", "NO", "ONE")
        scene.server.start = lambda: None  # type: ignore[method-assign]
        scene.server.path, scene.server.client, scene.server.url = replica.path, replica.client, replica.url


class ReadOnly(Fault):
    """It becomes a replica while connected, and a primary again."""

    said = "READONLY"

    def begin(self, scene: Scene) -> None:
        scene.client.execute_command("REPLICAOF", "127.0.0.1", "1")

    def end(self, scene: Scene) -> None:
        scene.client.execute_command("REPLICAOF", "NO", "ONE")


class NoDisk(Fault):
    """The last snapshot failed, so that the server refuses writes (MISCONF)."""

    said = "MISCONF"

    def prepare(self, scene: Scene) -> None:
        scene.server.kill()
        scene.server._command += ["--enable-protected-configs", "yes"]
        scene.server.start()

    def begin(self, scene: Scene) -> None:
        nowhere = scene.server.folder / "nowhere"
        nowhere.mkdir()
        scene.client.config_set("dir", str(nowhere))
        scene.client.config_set("save", "3600 1")
        nowhere.rmdir()
        scene.client.bgsave()
        until(lambda: scene.client.info("persistence")["rdb_last_bgsave_status"] == "err")

    def end(self, scene: Scene) -> None:
        scene.client.config_set("dir", str(scene.server.folder))
        scene.client.bgsave()
        until(lambda: scene.client.info("persistence")["rdb_last_bgsave_status"] == "ok")


class Busy(Fault):
    """Somebody's script does not end."""

    said = "BUSY"

    def begin(self, scene: Scene) -> None:
        scene.client.config_set("busy-reply-threshold", "50")
        other = redis.Redis(unix_socket_path=str(scene.server.path))

        def run() -> None:
            with pytest.raises(redis.ResponseError):
                other.eval("while true do end", 0)

        threading.Thread(target=run, daemon=True).start()

        def is_busy() -> bool:
            try:
                return not scene.client.ping()
            except redis.ResponseError:
                return True

        until(is_busy)

    def end(self, scene: Scene) -> None:
        until(lambda: scene.client.execute_command("SCRIPT", "KILL"))
        until(scene.server.answers)  # the script ends some time after the OK


class Password(Fault):
    """The password is changed, the connections are ended; then it is changed back."""

    said = "refuses the password"
    userinfo = "bob:old@"

    def prepare(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", "on", ">old", "~*", "&*", "+@all")

    def begin(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", "resetpass", ">new")
        scene.kick()

    def end(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", "resetpass", ">old")


class PasswordWanted(Fault):
    """A password is asked for where there was none."""

    said = "asks for a password"

    def begin(self, scene: Scene) -> None:
        scene.client.config_set("requirepass", "secret")
        scene.kick()

    def end(self, scene: Scene) -> None:
        scene.client.config_set("requirepass", "")


class NoPermission(Fault):
    """What this user may do is changed under the open connection."""

    said = "NOPERM"
    userinfo = "bob:old@"

    def __init__(self, without: str) -> None:
        self.without = without

    def prepare(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", "on", ">old", "~*", "&*", "+@all")

    def begin(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", *self.without.split())

    def end(self, scene: Scene) -> None:
        scene.client.execute_command("ACL", "SETUSER", "bob", "allkeys", "+@all")


class MaxClients(Fault):
    """The connections are ended, and others have taken all places."""

    said = "has no connection left"

    def begin(self, scene: Scene) -> None:
        scene.project.tasks.app.client.close()
        scene.client.config_set("maxclients", "1")
        scene.kick()

    def end(self, scene: Scene) -> None:
        scene.client.config_set("maxclients", "1000")


FAULTS: dict[str, Fault] = {
    "restart": Restart(signal.SIGTERM),
    "SIGKILL": Restart(signal.SIGKILL),
    "stall": Stall(),
    "half_open": Passing("drop"),
    "half_open_replies": Passing("drop", replies_only=True),
    "partition": Passing("hold"),
    "LOADING": Loading(),
    "failover": Failover(),
    "READONLY": ReadOnly(),
    "MISCONF": NoDisk(),
    "CLUSTERDOWN": Refusal(b"-CLUSTERDOWN The cluster is down", "CLUSTERDOWN", kick=False),
    "CLUSTERDOWN_new_connection": Refusal(b"-CLUSTERDOWN The cluster is down", "is a cluster that is down", kick=True),
    "BUSY": Busy(),
    "WRONGPASS": Password(),
    "NOAUTH": PasswordWanted(),
    "NOPERM": NoPermission("-@all"),
    "NOPERM_scripts": NoPermission("-evalsha -eval"),
    "NOPERM_keys": NoPermission("resetkeys"),
    "NOPERM_bzpopmin": NoPermission("-bzpopmin"),
    "MAXCLIENTS": MaxClients(),
    "damaged": Corruption(lambda data: b"!" + data[1:]),
    "other_type": Corruption(lambda data: b":7\r\n" if data[:1] == b"*" else data),
    "other_length": Corruption(lambda data: b"*0\r\n" if data[:1] == b"*" else data),
    "other_content": Corruption(lambda data: b"*2\r\n$1\r\nx\r\n:1\r\n" if data[:1] == b"*" else data),
}


@pytest.mark.parametrize("name", FAULTS)
def test_trouble_costs_nothing_and_ends_with_it(scene: Scene, name: str) -> None:
    fault, project = FAULTS[name], scene.project
    if fault.short_limits:
        project.add(SHORT_LIMITS)
    fault.prepare(scene)
    worker = scene.worker("lease = 30\nconcurrency = 3", userinfo=fault.userinfo)
    quick, nap, app = project.tasks.quick, project.tasks.nap, project.tasks.app
    for n in range(20):
        quick.enqueue(n).wait(timeout=60)  # known as fast
    held = [project.tasks.hold.enqueue(n) for n in range(3)]
    until(lambda: len(project.lines("started")) == 3)
    results = [quick.enqueue(n) for n in range(100, 200)]
    master = psutil.Process(worker.pid)

    fault.begin(scene)
    project.let_go()
    clock, before = Clock(), sum(master.cpu_times()[:2])
    until(lambda: len(project.lines("ended")) == 3, what="what runs goes on")
    until(lambda: clock.s > (LATE_S if fault.short_limits else TROUBLE_S))
    until(lambda: troubles(worker), what="it is noticed")
    used_s, seconds = sum(master.cpu_times()[:2]) - before, clock.s
    assert worker.process.poll() is None, worker.log
    assert used_s < 0.25 * seconds, f"{used_s} s of CPU in {seconds} s of trouble"

    during = len(project.lines("quick"))
    fault.end(scene)
    clock = Clock()
    until(lambda: len(project.lines("quick")) > during or len(project.lines("quick")) == 120, what=worker.log)
    back_s = clock.s
    app.client.close()
    app.client.url = scene.server.url
    assert [result.wait(timeout=60) for result in held] == [0, 1, 2]
    assert [result.wait(timeout=60) for result in results] == list(range(100, 200))
    assert nap.enqueue(9, 0).wait(timeout=60) == 9
    assert back_s < BACK_S + SLACK_S, f"back after {back_s:.2f} s\n{worker.log}"
    assert counts(project, "ended") == {"0": 1, "1": 1, "2": 1, "9": 1}
    assert set(counts(project, "quick").values()) == {1}
    until(lambda: active(project) == 0)
    until(lambda: any(" after " in line for line in troubles(worker)), what=worker.log)
    said = troubles(worker)
    assert " after " in said[-1]
    if len(said) > 2 and " after " in said[0] and trouble.tells_little(said[0]):
        del said[0]  # a connection that was closed, and there again at once, before the server had refused anything
    if len(said) > 1 or not trouble.tells_little(said[0]):  # else it was over before the next attempt told more
        assert len(said) == 2, said
        assert fault.said in said[0] or (fault.killed and trouble.tells_little(said[0])), said
    assert worker.stop() == 0
    assert scene.client.hlen(key("m")) == 0
