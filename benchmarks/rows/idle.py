"""What a worker does that has nothing to do."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from benchmarks import gauge
from benchmarks.rows.row import PEERS, Figure, Row, Values
from benchmarks.scene import Scene
from benchmarks.sides import PREFORK


def idle(scene: Scene) -> Values:
    """Ten children, watched from outside; the server tells what it is sent (MONITOR)."""
    window_s = scene.scale.pick(20.0, 6.0, 0.5)
    worker = scene.warm(10)
    family = worker.family()
    children = [pid for pid in family if pid != worker.pid]
    with monitor(scene) as spy:
        begun, cpu_s = time.time(), gauge.cpu_s(family)
        master, others = gauge.switches([worker.pid]), gauge.switches(children)
        time.sleep(window_s)
        ended = time.time()
        took_s = ended - begun
        values = {
            "cpu": (gauge.cpu_s(family) - cpu_s) / took_s * 100,
            "master_wakes": (gauge.switches([worker.pid]) - master) / took_s,
            "child_wakes": (gauge.switches(children) - others) / took_s,
            "connections": scene.connections() - 1.0,
        }
        lines = [line for line in heard(spy, ended) if b'"info"' not in line.lower()]
    values["commands"] = sum(b" lua] " not in line for line in lines) / took_s
    return values | {"all_commands": len(lines) / took_s}


@contextlib.contextmanager
def monitor(scene: Scene) -> Iterator[socket.socket]:
    """A connection to which the server tells all commands."""
    with socket.create_connection(("127.0.0.1", scene.port)) as spy:
        spy.sendall(b"MONITOR\r\n")
        assert spy.recv(5) == b"+OK\r\n"
        yield spy


def heard(spy: socket.socket, ended: float) -> list[bytes]:
    """What it has told, each line with the time of day, until then."""
    data = b"\r\n"
    spy.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        while told_at(data[:-2].rpartition(b"\r\n")[2]) < ended and (more := spy.recv(1 << 16)):
            data += more
    return [line for line in data.split(b"\r\n")[:-1] if 0 < told_at(line) < ended]


def told_at(line: bytes) -> float:
    """The time at the beginning of a line of MONITOR; 0 of what is none."""
    return float(line[1:].split(b" ")[0]) if line.startswith(b"+") and line[1:2].isdigit() else 0.0


ROWS = (
    Row(
        "idle",
        idle,
        (
            Figure("cpu", "idle worker of 10 children: CPU", "< 0.1", "%"),
            Figure("connections", "connections", "<= 2"),
            Figure("commands", "commands to the server", "<= 2", "/s"),
            Figure("all_commands", "commands, with those inside of scripts", "", "/s"),
            Figure("master_wakes", "wake-ups of the master", "<= 2", "/s"),
            Figure("child_wakes", "wake-ups of all children", "<= 0.01", "/s"),
        ),
        (PREFORK, PEERS),
        compared=("cpu", "connections", "commands", "all_commands"),
    ),
)
