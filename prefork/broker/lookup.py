"""Look up a host's addresses without standing still, however long the name servers take.

A forked process does it for the master, whose one thread never waits and which has no second one; a thread for others.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

LONGEST_S = 30


class Found(NamedTuple):
    """One address, as `socket.socket` and `connect` take it."""

    family: int
    kind: int
    protocol: int
    target: Any


def is_address(host: str) -> bool:
    """Whether it is an address itself, so that nobody has to be asked."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def addresses(host: str, port: int) -> list[Found]:
    """The addresses of a host. Raises socket.gaierror."""
    rows = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    return [Found(int(family), int(kind), protocol, target) for family, kind, protocol, _, target in rows]


class Lookup:
    """A lookup in a process of its own. `fd` is readable when it has ended; then `result` tells."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self.fd, write = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _answer(write, host, port)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(write)

    def result(self) -> list[Found]:
        """What was found. Raises socket.gaierror."""
        data = b""
        while part := os.read(self.fd, 1 << 16):
            data += part
        told = orjson.loads(data or b'"the lookup was interrupted"')
        if isinstance(told, str):
            raise socket.gaierror(socket.EAI_AGAIN, told)
        return [Found(family, kind, protocol, tuple(target)) for family, kind, protocol, target in told]

    def close(self) -> None:
        """Forget it, and end the process if it goes on."""
        os.close(self.fd)
        with contextlib.suppress(ChildProcessError):  # reaped with the other children
            if not os.waitpid(self._pid, os.WNOHANG)[0]:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)

    def abandon(self) -> None:
        """In a forked child: it is not ours."""
        os.close(self.fd)


def _answer(write: int, host: str, port: int) -> None:
    try:
        # Nothing of the master's stays open here: the pipes of its children tell them of its death.
        os.closerange(3, write)
        os.closerange(write + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.alarm(LONGEST_S)  # should the master be killed meanwhile
        try:
            data = orjson.dumps([list(found) for found in addresses(host, port)])
        except OSError as error:
            data = orjson.dumps(error.strerror or str(error))
        os.write(write, data)
    finally:
        os._exit(0)


def within(limit_s: float, ask: Callable[[], list[Found]]) -> list[Found]:
    """Call in a thread, and wait for it up to `limit_s`. Raises what it raises, and TimeoutError."""
    ended: list[list[Found] | Exception] = []

    def run() -> None:
        try:
            ended.append(ask())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # an interpreter that ends starts no more of them, nor does a process that has too many
        return ask()
    thread.join(limit_s)
    told = ended[0] if ended else TimeoutError("timed out: name resolution")
    if isinstance(told, Exception):
        raise told
    return told
