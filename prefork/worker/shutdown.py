"""How a worker stops.

1. DRAINING: claim no more; put back at once what has not started; let what runs finish within `shutdown_timeout`.
2. Kill the rest. Each message of a killed child goes to the front of its queue, not charged.
3. LEAVING: the broker takes the last outcomes; then give up the leases, and end.

INT and TERM begin it; a second INT, or QUIT, goes to 2 at once. Every step is bounded, also when the broker is away.
"""

from __future__ import annotations

import enum
import logging
from typing import Any

from prefork.broker import verbs
from prefork.broker.channel import Channel
from prefork.worker.claims import Claims
from prefork.worker.dispatch import Dispatcher
from prefork.worker.frames import Order
from prefork.worker.lease import Lease
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.settlement import Settlement

log = logging.getLogger("prefork")
UNKILLABLE_S = 0.8  # after a kill: more than a child needs to give its memory back, and to get a core for that
LAST_WORDS_S = 0.6  # after the children have ended: for the broker to take the last outcomes
BECAUSE = "shutdown"  # the reason of a kill begins so


class Phase(enum.Enum):
    """Of a worker's life."""

    RUNNING = enum.auto()
    DRAINING = enum.auto()
    LEAVING = enum.auto()
    LEFT = enum.auto()


class Shutdown:
    """The end of one worker.

    `begun`: whether it is stopping; the same as a phase that is not RUNNING, but asked several times a turn.
    """

    def __init__(
        self,
        loop: Loop,
        pool: Pool,
        dispatcher: Dispatcher[Order],
        settlement: Settlement,
        claims: Claims,
        lease: Lease,
        channel: Channel,
        blocker: Channel,
        limit_s: float,
    ) -> None:
        self._loop, self._pool, self._dispatcher, self._settlement = loop, pool, dispatcher, settlement
        self._claims, self._lease, self._channel, self._blocker = claims, lease, channel, blocker
        self._limit_s = limit_s
        self.unstarted: list[Order] = []  # what goes back to its queue at once
        self.killed: list[Order] = []  # what goes back there when its child has ended
        self.phase, self.begun = Phase.RUNNING, False
        self._awaits_claim = False

    def ids(self) -> set[str]:
        """The messages that are about to go back."""
        return {order.message.id for order in self.unstarted + self.killed}

    def drain(self, why: str) -> None:
        """Claim no more, put back what has not started, let what runs finish within `shutdown_timeout`."""
        if self.begun:
            return
        self.phase, self.begun = Phase.DRAINING, True
        self._claims.close()
        self._pool.growing = False
        self.unstarted += self._dispatcher.ready
        self._dispatcher.ready.clear()
        for child in list(self._pool.children):
            self.unstarted += self._pool.take_back(child)
            self._pool.finish(child)
        busy = sum(1 for child in self._pool.children if child.end.unanswered)
        back = f", {len(self.unstarted)} that had not started go back to their queues" if self.unstarted else ""
        log.info("stopping (%s): %d tasks are running%s", why, busy, back)
        over = f"{BECAUSE}_timeout of {self._limit_s:g} s is over"
        self._loop.call_later(self._limit_s, lambda: self._kill_all(over))

    def interrupt(self) -> None:
        """A first INT drains, a second one stops at once."""
        if self.begun:
            self.now("INT")
        else:
            self.drain("INT; once more to stop at once")

    def now(self, why: str) -> None:
        """Kill what runs and put it back; do not wait."""
        self.drain(why)
        self._kill_all(f"{BECAUSE} at once ({why})")

    def _kill_all(self, why: str) -> None:
        if self.phase is Phase.DRAINING:
            for child in list(self._pool.children):
                self._pool.kill(child, why)
            self._loop.call_later(UNKILLABLE_S, self._begin_to_leave)

    def _begin_to_leave(self) -> None:
        if self.phase is not Phase.DRAINING:
            return
        self.phase = Phase.LEAVING
        for child in self._pool.children:
            log.error("child %d (pid %d) does not die, the kernel holds it; it is left behind", child.number, child.pid)
            self.killed += child.end.unanswered.values()
        # Those that ran were claimed before those that had not started, and are to be first in line again.
        self._settlement.put_back(self.unstarted)
        self._settlement.put_back(self.killed, begun=True)
        self._loop.call_later(LAST_WORDS_S + self._settlement.wait_s, self._give_up)

    def turn(self) -> None:
        """Once a turn of the loop: go on to the next step when this one is done."""
        if self.unstarted and not self._claims.in_flight:  # else more of them are on their way, to go behind these
            self._settlement.put_back(self.unstarted)
        if self.phase is Phase.DRAINING and not self._pool.children:
            if not self._claims.in_flight:
                self._begin_to_leave()
            elif not self._awaits_claim:
                self._awaits_claim = True
                self._loop.call_later(UNKILLABLE_S, self._begin_to_leave)
        if self.phase is Phase.LEAVING and self._channel.ready and self._settlement.is_empty:
            self.phase = Phase.LEFT
            self._blocker.close()
            self._give_up_leases()

    def _give_up_leases(self) -> None:
        """What a claim has taken whose reply is still on its way goes back with them."""
        self._lease.stop()
        due = [queue.keys for queue in self._claims.queues]

        def gone(_: Any) -> None:
            due.pop()
            if not due:
                self._loop.stop()

        for keys in tuple(due):
            self._channel.send(verbs.restore(keys, self._lease.worker, "left"), gone)
        self._channel.flush()

    def _give_up(self) -> None:
        if kept := self._settlement.unsettled():
            log.error("the broker did not take %d outcomes in time: these tasks may run again", kept)
        if self.phase is not Phase.LEFT and self._channel.ready:
            # A broker that is only slow does both, in this order, behind what it was sent before; unless it still has
            # a reply for this worker: when that finds nobody, it drops what it has not read. Then the lease runs out.
            self._settlement.send_rest(self._channel)
            self._give_up_leases()
        self._loop.stop()
