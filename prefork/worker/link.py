"""What ties a worker to its broker: how that begins, breaks, is mended, and is lost to another worker.

1. The first time that it is connected, take a lease on each queue. When all are held, claim.
2. When the connection breaks, claim no more. What runs goes on, and what is decided waits.
3. When it is back, renew the leases and *reconcile*: put back what came here and got lost on its way. Then claim again,
   and say again what was decided and not answered.
4. When the leases are gone, as another worker has taken over, the broker *fences* this one off: drop all it holds, and
   begin at 1 as a new worker.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from prefork.broker import trouble, verbs
from prefork.broker.channel import Channel, Lost
from prefork.broker.keys import queues_key
from prefork.worker.claims import Claims
from prefork.worker.lease import Lease
from prefork.worker.loop import Loop
from prefork.worker.outage import Outage
from prefork.worker.queues import Queue
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import Phase, Shutdown
from prefork.worker.work import Work

log = logging.getLogger("prefork")


class Link:
    """Two connections, `channel` for commands and `blocker` to sleep on, and what their coming and going means.

    `held`: whether the leases have been taken; `on_held` is called when they are. What stands here without a value is
    given it before it begins.
    """

    claims: Claims
    lease: Lease
    settlement: Settlement
    work: Work
    shutdown: Shutdown

    def __init__(self, loop: Loop, url: str, prefix: str, on_held: Callable[[], None]) -> None:
        self._prefix, self._on_held = prefix, on_held
        self._connected = self.held = False
        self.outage = Outage()
        name = f"prefork-{os.getpid()}"
        self.channel = Channel(loop, url, name, self._up, self._down)
        self.blocker = Channel(loop, url, f"{name}-wait", self._blocker_up, self._blocker_down)

    def connect(self) -> None:
        """Begin to connect."""
        self.blocker.pushed = self.claims.handed_over
        self.channel.connect()
        self.blocker.connect()

    def abandon(self) -> None:
        """In a forked child: close its copies, without a word to the broker."""
        self.channel.abandon()
        self.blocker.abandon()

    # -- connections come and go --------------------------------------------------------------------------------

    def _up(self) -> None:
        self._connected = True
        if not self.held:  # nothing was claimed yet
            self._begin()
        else:
            self.lease.reconnected()
            self.lease.renew(self.reconcile)

    def _down(self, said: str) -> None:
        late = "does not answer in time" in said
        self.outage.begins("connection", said, wait=trouble.tells_little(said), lasts=trouble.lasts(said))
        if late and self._connected:  # the other connection takes the same way, and may stand for half a minute
            self.blocker.restart()
        self._connected = self.claims.open = False
        self.settlement.disconnected()

    def _blocker_up(self) -> None:
        self.outage.ends("second connection")
        self.claims.blocker_up()

    def _blocker_down(self, said: str) -> None:
        if not self.shutdown.begun:
            self.outage.begins("second connection", said, wait=True)

    # -- leases are taken, kept and lost ------------------------------------------------------------------------

    def _begin(self) -> None:
        self.settlement.worker = self.claims.worker = self.lease.worker
        for queue in self.claims.queues:
            queue.unkept = False
            self.outage.ends(f"messages of queue {queue.keys.queue}")
        # So that operators find this worker, also where nothing was enqueued yet.
        names = [queue.keys.queue for queue in self.claims.queues]
        self.channel.send_words(("SADD", queues_key(self._prefix), *names), lambda reply: None)
        self.held = False

        def held() -> None:
            self.held = True
            self._claim()
            self._on_held()

        self.lease.begin(held)

    def _claim(self) -> None:
        self.outage.ends("connection")
        if not self.shutdown.begun:
            self.claims.open = True
            self.claims.wake_all()

    def reconcile(self) -> None:
        """After a broken connection: put back what came here and got lost on its way. Only then claim again."""
        if self.claims.in_flight:  # what it brings is not known yet, and would be put back while it runs
            self.claims.keep_soon()
            return
        self.claims.begin_to_keep()
        known, worker = self.work.known_ids() | self.shutdown.ids(), self.lease.worker
        due = set(self.claims.queues)

        def answered(queue: Queue, reply: object) -> None:
            if worker != self.lease.worker or isinstance(reply, Lost):
                return
            due.discard(queue)
            part = f"messages of queue {queue.keys.queue}"
            queue.unkept = isinstance(reply, Exception)
            if queue.unkept:
                self.outage.begins(part, f"the broker does not take {part} back: {reply}")
            else:
                self.outage.ends(part)
            if due:
                return
            if any(queue.unkept for queue in self.claims.queues):  # the others go on meanwhile
                self.lease.renew_soon(self.reconcile)
            if not all(queue.unkept for queue in self.claims.queues):
                self._claim()
                self.settlement.resend()

        for queue in self.claims.queues:
            kept = known | self.settlement.outboxes[queue.keys.queue].ids()
            self.channel.send(
                verbs.restore(queue.keys, worker, "keep", kept),
                lambda reply, queue=queue: answered(queue, reply),  # type: ignore[misc]
            )

    def known(self, queue: str) -> int:
        """How many messages of a queue are here."""
        return len(self.work.known_ids(queue) | self.settlement.outboxes[queue].ids())

    def fenced(self, said: str) -> None:
        """Another worker has taken over all that this one held: drop it, and begin anew as a new worker."""
        if self.lease.worker not in said or self.shutdown.phase is Phase.LEFT:
            return  # the same said once more, of what this worker was before
        self.claims.open = False
        for queue in self.claims.queues:  # where nobody has taken over yet, this worker does it itself
            self.channel.send(verbs.restore(queue.keys, self.lease.worker, "left"), lambda reply: None)
        self.lease.new_identity()
        dropped = self.settlement.forget_all()
        stopped, unstarted = self.work.drop_all()
        log.error(
            "lost the lease: another worker has taken over. Stopped %d running tasks, dropped %d outcomes and %d "
            "messages that had not started; going on as %s", stopped, dropped, unstarted, self.lease.worker,
        )  # fmt: skip
        self._begin()
