"""What each kind of user may do in the broker, and no more: read from the scripts that it runs, so that neither drifts.

Source of the rules: https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prefork.broker import verbs

_WORD = re.compile(r"'([A-Z]{3,})'")  # also where a command's name is chosen first
_ALWAYS = ("CLIENT|SETNAME", "EVAL", "EVALSHA", "INFO", "PING", "SCRIPT|LOAD", "SELECT", "TIME")
_READING = frozenset((
    "EXISTS", "GET", "HEXISTS", "HGET", "HGETALL", "HLEN", "HMGET", "HSCAN", "HSTRLEN", "LINDEX", "LLEN", "LPOS",
    "LRANGE", "MGET", "PTTL", "SCAN", "SMEMBERS", "TIME", "TYPE", "ZCARD", "ZCOUNT", "ZMSCORE", "ZRANGE",
    "ZRANGEBYSCORE", "ZREVRANGE", "ZSCAN", "ZSCORE",
))  # fmt: skip
_WRITING = frozenset((
    "BZPOPMIN", "DEL", "HDEL", "HINCRBY", "HSET", "HSETNX", "LPOP", "LPUSH", "LREM", "LTRIM", "PEXPIRE", "PUBLISH",
    "RENAME", "RPUSH", "SADD", "SET", "SETNX", "SUBSCRIBE", "UNLINK", "UNSUBSCRIBE", "WAIT", "ZADD", "ZPOPMIN", "ZREM",
))  # fmt: skip
_NO_COMMANDS = {"COUNT", "FAILED", "LIMIT", "MATCH", "SUCCESSFUL", "WITHSCORES"}
# Where it waits, and how it ends a wait of its own that is for too little.
_WAITING = {"BZPOPMIN", "SET", "CLIENT|ID", "CLIENT|UNBLOCK"}
_PRODUCING = ("enqueue", "cancel", "inspect")
_PRODUCING_ALSO = ("SADD", "SMEMBERS", "SUBSCRIBE", "UNSUBSCRIBE", "WAIT")


@dataclass(frozen=True, slots=True)
class Role:
    """One of them. `commands`: as ACL SETUSER names them, sorted."""

    name: str
    doc: str
    commands: tuple[str, ...]

    def line(self, user: str, prefix: str, *, fsync: bool = False) -> str:
        """The command that makes such a user; PASSWORD is to be replaced. `fsync`: it may use WAITAOF."""
        pattern = "".join(f"\\{c}" if c in "*?[]\\^" else c for c in prefix)
        commands = (*self.commands, "waitaof") if fsync and "wait" in self.commands else self.commands
        allowed = " ".join(f"+{command}" for command in commands)
        return (
            f"ACL SETUSER {user} reset on >PASSWORD resetkeys ~{pattern}:* resetchannels &{pattern}:* -@all {allowed}"
        )


NAMES = ("worker", "producer", "admin", "dashboard")


def roles() -> dict[str, Role]:
    """Each of NAMES."""
    every = _said_in(it.stem for it in verbs.SCRIPTS.glob("*.lua"))
    producing = {*_said_in(_PRODUCING), *_PRODUCING_ALSO}
    working = _said_in(("beat", "claim", "settle", "restore"))
    told = {
        "worker": ("prefork-worker, and tasks that enqueue", producing | working | _WAITING),
        "producer": ("whoever enqueues, cancels, or waits for results", producing),
        "admin": (
            "every command of prefork, also those that change something",
            producing | every | _READING | {"BZPOPMIN", "SET", "ZADD"},
        ),
        "dashboard": ("queues, workers, list, show, and doctor without --repair", _said_in(("ask",)) | _READING),
    }
    return {
        name: Role(name, doc, tuple(sorted(it.lower() for it in commands.union(_ALWAYS))))
        for name, (doc, commands) in told.items()
    }


def _said_in(scripts: Iterable[str]) -> set[str]:
    """The commands of these scripts. Raises ValueError for a word in capitals that is not known."""
    words = {word for name in scripts for word in _WORD.findall(verbs.script(name).text.decode())}
    if odd := words - _READING - _WRITING - _NO_COMMANDS:
        raise ValueError(f"which of these are commands, and do they only read? {', '.join(sorted(odd))}")
    return words - _NO_COMMANDS
