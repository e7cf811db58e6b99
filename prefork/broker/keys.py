"""The names of keys. All keys of one queue carry its hash tag, so that each script touches one slot."""

from __future__ import annotations

CLAIMED_PER_MS = 2048


class Keys:
    """The keys of one queue. `prefix` sets apart several deployments on one server."""

    def __init__(self, prefix: str, queue: str) -> None:
        base = f"{prefix}:{{{queue}}}:"
        self.queue = queue
        self.messages = base + "m"  # hash: id -> message, from enqueue to settlement
        self.state = base + "state"  # hash: id -> what has happened to it, for those it happened to
        self.pending = base + "pending"  # list: ids of priority 0, first in first out
        self.ranked = base + "ranked"  # zset: ids of other priorities; score = -priority
        self.scheduled = base + "scheduled"  # zset: id -> due ms
        self.dead = base + "dead"  # zset: id -> died ms
        self.leases = base + "leases"  # zset: worker -> when its lease ends, ms
        self.stats = base + "stats"  # hash: counters
        self.takeovers = base + "takeovers"  # hash: id -> how often a worker that held it has died
        self.wake = base + "wake"  # zset of one member: what idle masters block on
        self.idle = base + "idle"  # zset: worker that waits for work -> the number of its claim that found too little
        self.paused = base + "paused"  # set while nothing may be claimed
        self.active_prefix = base + "active:"  # zset per worker: id -> when claimed, in 1/2048 ms
        self.requests_prefix = base + "requests:"  # zset per worker: what operators ask it for
        self.inbox_prefix = base + "to:"  # channel per worker: messages that are handed to it as they are enqueued
        self.stop_prefix = base + "stop:"  # string per running task that is to be cancelled, whoever runs it
        self.result_prefix = base + "r:"  # string per finished task that keeps a result
        self.aside_prefix = base + "aside:"  # what `doctor --repair` has put aside; it expires
        self.done_prefix = base + "done:"  # channel per task: says that it has finished

    def active(self, worker: str) -> str:
        """The key of what one worker holds."""
        return self.active_prefix + worker

    def inbox(self, worker: str) -> str:
        """The channel on which an idle worker is handed messages."""
        return self.inbox_prefix + worker

    def requests(self, worker: str) -> str:
        """The key of what operators ask of one worker: `report`, or `cancel <id>`."""
        return self.requests_prefix + worker


def queues_key(prefix: str) -> str:
    """The key of the set of all queue names."""
    return f"{prefix}:queues"


def worker_key(prefix: str, worker: str) -> str:
    """The key of what a worker has reported of itself; it expires soon."""
    return f"{prefix}:worker:{worker}"
