"""The queues of a worker as its claims see them, and how they share what is to be claimed."""

from __future__ import annotations

from dataclasses import dataclass

from prefork.broker.keys import Keys
from prefork.worker.loop import Timer


@dataclass(eq=False)
class Queue:
    """One queue of this worker."""

    keys: Keys
    weight: int
    credit: float = 0.0
    drained: bool = False
    in_flight: bool = False
    owes_claim: bool = False
    waits: int = 0  # this worker, for what `enqueue` may hand it: by the claim of this number
    ended_wait: int = 0  # the claim by which it waited for what it was handed last
    woken: bool = False  # while a claim was in flight: what that one found is old
    refused: bool = False  # a claim was, a moment ago
    unkept: bool = False  # the broker may hold messages for this worker that are not here; no claim before it is told
    unsettled: bool = False  # what becomes of its messages is refused
    due: Timer | None = None
    due_ms: int = -1

    @property
    def barred(self) -> bool:
        """Whether nothing is to be claimed from it now; the others have their turn meanwhile."""
        return self.refused or self.unkept or self.unsettled


def shares(queues: list[Queue], n: int, *, strict: bool) -> list[tuple[Queue, int]]:
    """From which queues to claim how many of n. Strict: the first that has any. Else by smooth weighted round robin.

    Source of the latter: nginx, commit 52327e0627f4 ("Upstream: smooth weighted round-robin balancing").
    """
    filled = [queue for queue in queues if not (queue.drained or queue.barred)]
    if strict or len(filled) < 2:
        return [(filled[0], n)] if filled else []
    total = sum(queue.weight for queue in filled)
    given = [n // total * queue.weight for queue in filled]  # whole rounds change no credit
    for _ in range(n % total):
        for queue in filled:
            queue.credit += queue.weight
        best = max(range(len(filled)), key=lambda at: filled[at].credit)
        filled[best].credit -= total
        given[best] += 1
    return [(queue, some) for queue, some in zip(filled, given, strict=True) if some]
