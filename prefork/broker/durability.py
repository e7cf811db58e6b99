"""What "accepted" means: in the primary's memory, on its disk, or on replicas too, before `enqueue` returns.

A worker may ask for the same of outcomes: until they have got there it keeps them, to settle them again by whoever is
the primary then. Else a settlement that is lost with its server costs a second run.

Source of WAIT and WAITAOF: the documentation of Redis (7.2 for the latter) and Valkey.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefork import values
from prefork.broker import verbs

FSYNC_SINCE = (7, 2)


@dataclass(frozen=True, slots=True)
class Durability:
    """`replicas`: how many have to have it; `fsync`: the primary's own append-only file has to have it on disk."""

    replicas: int = 0
    fsync: bool = False

    def words(self, timeout_ms: int) -> tuple[verbs.Argument, ...]:
        """The command that waits for all that this connection has written before."""
        if self.fsync:
            return "WAITAOF", 1, 0, timeout_ms
        return "WAIT", self.replicas, timeout_ms

    def is_answer(self, reply: object) -> bool:
        """Whether a reply is one to that command: what stands between may damage replies."""
        if self.fsync:
            return isinstance(reply, list) and len(reply) == 2 and all(isinstance(it, int) for it in reply)
        return isinstance(reply, int)

    def missing(self, reply: Any) -> str:
        """What is not reached, in words; "" if all is."""
        if self.fsync:
            return "" if reply[0] >= 1 else "is not on the broker's disk yet"
        return "" if reply >= self.replicas else f"has reached {reply} of {self.replicas} replicas"

    def refused_by(self, info: dict[str, Any]) -> str:
        """Why a server with this INFO can't do it, with the remedy; "" if it can."""
        if not self.fsync:
            return ""
        name, version = verbs.version_of(info)
        if version < FSYNC_SINCE:
            return f"is {name}, which cannot say what is on its disk (WAITAOF, Redis 7.2); use durability='replicas:N'"
        if not info.get("aof_enabled"):
            return "has no append-only file, which durability='fsync' needs; CONFIG SET appendonly yes"
        return ""


def parse(text: str | None) -> Durability | None:
    """`fsync` or `replicas:N`; None for None. Raises ValueError that says what is wrong."""
    if text is None:
        return None
    kind, _, replicas = values.durability(text).partition(":")
    return Durability(fsync=True) if kind == "fsync" else Durability(replicas=int(replicas))
