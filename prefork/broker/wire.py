"""A producer's connections: each carries one request at a time, and is kept for the next one.

redis-py makes, secures and reads the connections. What it does around a command (a pool with a lock and a look for the
connection's health, hooks for traces, retries of its own) takes longer than the command: here a request is one write
and one read.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Any

import hiredis
import redis

from prefork.broker import verbs

Words = tuple[verbs.Argument, ...]


class Wire:
    """The connections of one process, taken out of a pool. Safe from many threads: each request has one to itself."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        self._idle: list[Any] = []
        self._looks: dict[int, select.poll] = {}  # by descriptor

    def ask(self, *commands: Words) -> list[Any]:
        """Send commands in one write. -> their replies; an error among them is in its place, not raised

        Raises what redis-py raises when the connection breaks, or a reply is late.
        """
        connection = self.send(*commands)
        return self.replies(connection, commands)

    def send(self, *commands: Words) -> Any:
        """Send commands. -> the connection on which `replies` will find the answers"""
        connection = self._taken()
        packed = b"".join(hiredis.pack_command(words) for words in commands)  # type: ignore[arg-type]  # of any length
        try:
            connection.send_packed_command([packed], check_health=False)
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def replies(self, connection: Any, commands: Sequence[Words]) -> list[Any]:
        """The replies to what was sent there."""
        found: list[Any] = []
        try:
            for _ in commands:
                try:
                    found.append(connection.read_response())
                except redis.ResponseError as error:
                    found.append(error)
        except BaseException:
            self._drop(connection)
            raise
        self._idle.append(connection)
        return found

    def _taken(self) -> Any:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._pool.get_connection()
            if not self._has_ended(connection):
                return connection
            self._drop(connection)

    def close_idle(self) -> None:
        """End the connections that carry nothing now; the next request makes a new one."""
        while self._idle:
            self._drop(self._idle.pop())

    def _drop(self, connection: Any) -> None:
        connection.disconnect()
        self._pool.release(connection)

    def _has_ended(self, connection: Any) -> bool:
        """Whether its server has closed it meanwhile: nobody owes it anything that could be read."""
        sock = connection._sock
        if sock is None:
            return True
        fd = sock.fileno()
        if fd not in self._looks:
            self._looks[fd] = select.poll()
            self._looks[fd].register(fd, select.POLLIN)
        return bool(self._looks[fd].poll(0))
