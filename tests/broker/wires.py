"""What tests put in the place of a server, or in front of one: listeners that misbehave in a certain way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis

Reply = Callable[[list[bytes]], bytes | None]
FIRST_PORT, PORTS = 20_000, 10_000


def free_port() -> int:
    """A port on which nobody listens, outside of those that the kernel gives away; no two tests get the same."""
    with Path(tempfile.gettempdir(), f"prefork-tests-{os.getuid()}.port").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or FIRST_PORT)
        while True:
            port = FIRST_PORT + (port + 1 - FIRST_PORT) % PORTS
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                break
        file.truncate(0)
        file.write(str(port))
    return port


class Listener:
    """Listens on a port of this host, and lets `talk` deal with each connection, in a thread of its own."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.open: list[socket.socket] = []
        self.accepted = 0
        self._changing = threading.Lock()
        self._listening = socket.create_server((host, port))
        self.port = int(self._listening.getsockname()[1])
        self.url = f"redis://{host}:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            with self._changing:
                self.open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            self.talk(connection)
        with self._changing:
            self.open[:] = [other for other in self.open if other.fileno() != -1]

    def talk(self, connection: socket.socket) -> None:
        """Say nothing, until the other side closes."""
        while connection.recv(1 << 16):
            continue

    def cut(self) -> None:
        """Close all connections."""
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def close(self) -> None:
        self.refuse()
        self.cut()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Says(Listener):
    """Answers whatever comes with the same bytes, and closes if told so."""

    def __init__(self, said: bytes, *, then_close: bool = False) -> None:
        self._said, self._then_close = said, then_close
        super().__init__()

    def talk(self, connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(self._said)
            if self._then_close:
                return


def info(version: str = "7.2.4") -> bytes:
    """What a Redis of that version says to INFO."""
    text = f"# Server\r\nredis_version:{version}\r\nredis_mode:standalone\r\n".encode()
    return b"$%d\r\n%s\r\n" % (len(text), text)


class Redislike(Listener):
    """Speaks the protocol. `reply`: what to say to a command; b"" says nothing, None closes the connection."""

    def __init__(self, reply: Reply | None = None, *, version: str = "7.2.4", delay_s: float = 0.0) -> None:
        self._reply, self._version, self._delay_s = reply, version, delay_s
        self.heard: list[list[bytes]] = []
        super().__init__()

    def talk(self, connection: socket.socket) -> None:
        reader = hiredis.Reader()
        while data := connection.recv(1 << 16):
            reader.feed(data)
            while words := reader.gets():
                self.heard.append(words)
                time.sleep(self._delay_s)
                said = self._reply(words) if self._reply else self.usual(words)
                if said is None:
                    return
                connection.sendall(said)

    def usual(self, words: list[bytes]) -> bytes:
        """What a server says that has nothing against it."""
        verb = words[0].upper()
        if verb == b"INFO":
            return info(self._version)
        if verb == b"SCRIPT":
            return b"$40\r\n" + b"0" * 40 + b"\r\n"
        if verb == b"SADD":
            return b":1\r\n"
        if verb in (b"EVALSHA", b"EVAL"):
            return b"*2\r\n:1\r\n:1\r\n"
        return b"+PONG\r\n" if verb == b"PING" else b"+OK\r\n"


class Proxy(Listener):
    """In front of a server on a unix socket: passes everything on, but for what it is told to lose.

    `lose(mark, times)`: when a command has the mark in it, let the server carry it out, and cut the connection in place
    of the reply, or after the reply's first `keep` bytes. `then` is called in between.
    """

    def __init__(
        self, path: Path, *, chunk: int = 1 << 16, pause_s: float = 0.0, tls: ssl.SSLContext | None = None
    ) -> None:
        self._path, self._chunk, self._pause_s, self._tls = path, chunk, pause_s, tls
        self._mark, self._times, self._keep = b"", 0, 0
        self._then: Callable[[], None] = lambda: None
        self.lost = 0
        super().__init__()

    def lose(self, mark: bytes, times: int = 1, *, keep: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self._mark, self._times, self._keep, self._then = mark, times, keep, then

    def talk(self, connection: socket.socket) -> None:
        doomed = threading.Event()
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True)  # which owns the descriptor now
            with self._changing:
                self.open.append(connection)
        with connection, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._path))
            threading.Thread(target=self._back, args=(server, connection, doomed), daemon=True).start()
            with contextlib.suppress(OSError):
                while data := connection.recv(self._chunk):
                    if self._times and not doomed.is_set() and self._mark in data:
                        self._times -= 1
                        doomed.set()
                    server.sendall(data)
                    time.sleep(self._pause_s)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    def _back(self, server: socket.socket, connection: socket.socket, doomed: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(self._chunk):
                if doomed.is_set():
                    self.lost += 1
                    self._then()
                    connection.sendall(data[: self._keep])
                    break
                connection.sendall(data)
                time.sleep(self._pause_s)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
