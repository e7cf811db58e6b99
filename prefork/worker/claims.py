"""When to claim, from which queue, and how to sleep until there is something: without polling.

- A queue is *drained* when a claim has found less than was asked for. Masters block on the wake markers of their
  drained queues, and ask the others as soon as a child has room.
- Whoever pops a marker owes a claim, be it for nothing: the script sets the marker again for the next master if
  anything is left. So no wake-up is lost with a master that has no room.
- Each reply tells when the next delayed message is due; a timer claims then, to the millisecond.
- A worker that has found too little waits in `idle`, until its next claim, for the one message that `enqueue` may hand
  it directly: it comes on the second connection, and is active here already. When that connection breaks, messages on
  their way are lost with it: `void` says that none of them counts, and `keep` puts them back.
- On the same connection a master hears what operators ask of it: a marker of its own for each queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import hiredis

from prefork.broker import verbs
from prefork.broker.channel import Channel, Lost
from prefork.worker.clock import ServerClock
from prefork.worker.loop import Loop, Timer
from prefork.worker.outage import Outage
from prefork.worker.queues import Queue, shares

BLOCK_S = 30
REFUSED_PAUSE_S = 0.5
LARGEST_CLAIM = 500  # takes the server a millisecond and a half
Claimed = Callable[[str, list[bytes], list[bytes], list[bytes | None], int], None]
# Of the claims by number, so that what `enqueue` hands over has its place between them: it takes another way, and may
# come here before what was claimed before it.
SERIALS_PER_CLAIM = 2048


class Claims:
    """The claims of one worker. `claimed` gets queue, ids, messages, states and first serial of what has come."""

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        blocker: Channel,
        clock: ServerClock,
        queues: list[Queue],
        *,
        strict: bool,
        claimed: Claimed,
        fenced: Callable[[str], None],
        requested: Callable[[str], None],
        keep: Callable[[], None],
    ) -> None:
        self._loop, self.channel, self._blocker, self._clock = loop, channel, blocker, clock
        self._strict, self._claimed, self._fenced, self._requested = strict, claimed, fenced, requested
        self._keep = keep  # put back what the broker says is held here, and is not
        self.outage = Outage()
        self.queues = queues
        self._by_marker = {queue.keys.wake.encode(): queue for queue in queues}
        self._by_inbox: dict[bytes, Queue] = {}  # of the worker that is `_heard_as`
        self._heard_as = self._asked_as = ""
        self._number = 0  # of the latest claim
        self._valid_from = 1  # what was handed over for claims before this one is put back
        self._keep_due = False
        self._idled = False  # whether anything may have been handed over since
        self.worker = ""
        self.open = False
        self.paused = False
        self._blocked_on: tuple[str, set[Queue]] | None = None  # as which worker, on which drained queues
        self._blocker_id = 0
        self._unblocking = False
        self._deaf = False  # the broker refuses to tell of wake-ups
        self._pause: Timer | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a reply is due."""
        return any(queue.in_flight for queue in self.queues)

    @property
    def next_serial(self) -> int:
        """What has been claimed until now is below it."""
        return (self._number + 1) * SERIALS_PER_CLAIM

    @property
    def all_drained(self) -> bool:
        """Whether nothing is left to claim, as far as is known."""
        return all(queue.drained and not queue.in_flight and not queue.owes_claim for queue in self.queues)

    def void(self) -> None:
        """Take no message any more that `enqueue` has handed over to this worker until now: `keep` puts them back."""
        self._valid_from = self._number + 1
        self._keep_due = self._keep_due or self._idled

    def begin_to_keep(self) -> None:
        """What is held here is being told to the broker: nothing may be claimed until it has answered."""
        self.void()
        self._keep_due = self._idled = self.open = False

    def keep_soon(self) -> None:
        """Put back what the broker says is held here, and is not, when nothing is on its way any more."""
        self._keep_due = True

    def keep_if_due(self) -> None:
        """Once a turn of the loop: put back what was voided, when nothing is on its way that is not known yet."""
        if self._keep_due and not self.in_flight:
            self._keep()

    def turn(self, n: int, room: int) -> None:
        """Once a turn of the loop: ask for n messages, or sleep on the markers of what is drained.

        `room`: how many children have nothing to do.
        """
        if not self.open or not self.channel.ready or self._pauses():
            return
        if n and not self.in_flight and not self.paused:
            for queue, some in shares(self.queues, min(n, LARGEST_CLAIM), strict=self._strict):
                self._ask(queue, some, room)
        for queue in self.queues:
            # What is handed over now would find no child, a message of another queue has taken the last one; or is not
            # to come here. Such a claim takes nothing, and sets a marker again that this worker has popped.
            declines = queue.waits and (room <= 0 or queue.unsettled)
            if (queue.owes_claim or declines) and not (queue.in_flight or queue.refused or queue.unkept):
                self._ask(queue, 0, 0)
        self._block()

    def bar(self, queues: set[str]) -> None:
        """Claim nothing from these, whose outcomes are refused; from the others again."""
        for queue in self.queues:
            queue.unsettled = queue.keys.queue in queues

    def listen(self) -> None:
        """While nothing is claimed: hear what is asked of this worker."""
        if not self._pauses():
            self._block(wakes=False)

    def wake(self, queue: Queue) -> None:
        """There may be something in it."""
        queue.drained = False
        queue.owes_claim = True
        queue.woken = queue.in_flight

    def wake_all(self) -> None:
        """After a time in which a wake-up may have been lost."""
        for queue in self.queues:
            self.wake(queue)

    def due(self, queue: Queue, next_due_ms: int) -> None:
        """When the first of its delayed messages is due; -1 for none."""
        if queue.due and queue.due_ms == next_due_ms:
            return
        if queue.due:
            queue.due.cancel()
            queue.due = None
        if next_due_ms >= 0:
            delay_s = max(0.0, (next_due_ms - self._clock.now_ms()) / 1000) + 0.001
            queue.due, queue.due_ms = self._loop.call_later(delay_s, lambda: self._fall_due(queue)), next_due_ms

    def _fall_due(self, queue: Queue) -> None:
        queue.due = None
        self.wake(queue)

    def _ask(self, queue: Queue, n: int, room: int) -> None:
        queue.in_flight, queue.owes_claim, queue.woken, queue.waits = True, False, False, 0
        worker = self.worker
        self._number += 1
        room = max(0, room) if self._heard_as == worker else 0
        self._idled = self._idled or room > 0
        number = self._number
        call, asked_s = verbs.claim(queue.keys, worker, n, number, room), time.monotonic()
        self.channel.send(call, lambda reply: self._reply(queue, n, number, room, worker, asked_s, reply))

    def _reply(self, queue: Queue, n: int, number: int, room: int, worker: str, asked_s: float, reply: Any) -> None:
        queue.in_flight = False
        if isinstance(reply, Exception):
            queue.drained = False
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("FENCED"):
                self._fenced(str(reply))
            elif not isinstance(reply, Lost):  # what a lost claim took is put back after the reconnect
                queue.owes_claim = True  # the marker that it may have popped is gone
                if "user_script" in str(reply):  # it may have been broken off in the middle, with messages taken
                    self.keep_soon()
                queue.refused = True
                self._loop.call_later(REFUSED_PAUSE_S, lambda: self._permit(queue))
                self._refused(f"claims of queue {queue.keys.queue}", reply)
            return
        self.outage.ends(f"claims of queue {queue.keys.queue}")
        now_ms, next_due_ms, left, ids, messages, states = reply
        self._clock.told(now_ms, asked_s)
        queue.waits = number if len(ids) < room and queue.ended_wait != number else 0
        if not queue.woken:
            queue.drained = left == 0 and (n == 0 or len(ids) < n)
        self.due(queue, next_due_ms)
        if ids and worker == self.worker:  # else this worker was fenced meanwhile, and has put them back
            self._claimed(queue.keys.queue, ids, messages, states or [None] * len(ids), number * SERIALS_PER_CLAIM)

    def _refused(self, part: str, reply: Exception) -> None:
        self.outage.begins(part, f"the broker refuses to hand out messages: {reply}")

    def _permit(self, queue: Queue) -> None:
        queue.refused = False

    def _pauses(self) -> bool:
        return self._pause is not None or all(queue.refused or queue.unkept for queue in self.queues)

    def _go_on(self) -> None:
        self._pause = None

    # -- sleep --------------------------------------------------------------------------------------------------

    def blocker_up(self) -> None:
        """The blocking connection is there (again); what came meanwhile may have gone unheard."""
        self._blocked_on, self._unblocking = None, False
        self._heard_as = self._asked_as = ""
        self.void()
        self._blocker.send_words(("CLIENT", "ID"), self._know_blocker)
        self.wake_all()

    def _know_blocker(self, reply: Any) -> None:
        self._blocker_id = reply if isinstance(reply, int) else 0

    def _hear(self) -> None:
        """Let `enqueue` hand messages over to this worker."""
        worker = self.worker
        self._by_inbox = {queue.keys.inbox(worker).encode(): queue for queue in self.queues}
        due = set(self._by_inbox)

        def heard(reply: Any) -> None:
            if isinstance(reply, list) and len(reply) == 3:
                due.discard(reply[1])
                if not due and worker == self.worker:
                    self._heard_as = worker
                    for queue in self.queues:
                        queue.drained = False  # the next claim tells that this worker waits

        for inbox in self._by_inbox:
            self._blocker.send_words(("SUBSCRIBE", inbox), heard)

    def handed_over(self, push: list[Any]) -> None:
        """`enqueue` has given this worker a message; it is active here already."""
        queue = self._by_inbox.get(push[1])
        number, size, rest = push[2].split(b" ", 2)
        if queue is None or self._heard_as != self.worker or int(number) < self._valid_from:
            return
        queue.drained, queue.woken, queue.ended_wait = False, queue.in_flight, int(number)
        if queue.waits == queue.ended_wait:
            queue.waits = 0
        serial = (int(number) + 1) * SERIALS_PER_CLAIM - 1
        self._claimed(queue.keys.queue, [rest[: int(size)]], [rest[int(size) :]], [None], serial)

    def _block(self, *, wakes: bool = True) -> None:
        wakes = wakes and self.open
        drained = {queue for queue in self.queues if queue.drained and not (queue.in_flight or queue.barred)}
        drained = drained if wakes else set()
        if not self._blocker.ready or not self.worker:
            return
        if self._blocked_on is None:
            if self.in_flight and not drained:
                return  # its reply will tell on what to sleep
            if self._blocker.hears_pushes and self._asked_as != self.worker:
                self._asked_as = self.worker
                self._hear()
            self._blocked_on = self.worker, drained
            markers = [queue.keys.wake for queue in self.queues if queue in drained]
            requests = [queue.keys.requests(self.worker) for queue in self.queues]
            # After a refusal a short time, whose end tells that it is permitted again.
            seconds = 1 if self._deaf else BLOCK_S
            self._blocker.send_words(("BZPOPMIN", *requests, *markers, seconds), self._woken, seconds + 5)
            self._blocker.flush()
            return
        worker, queues = self._blocked_on
        if (drained - queues or worker != self.worker) and self._blocker_id and not self._unblocking:
            self._unblocking = True
            self.channel.send_words(("CLIENT", "UNBLOCK", self._blocker_id), self._unblocked)

    def _unblocked(self, reply: Any) -> None:
        # 0: it sleeps not yet, or not any more. The server may read this connection before the other one, on which the
        # command to sleep was written first.
        if reply == 0:
            self._unblocking = False

    def _woken(self, reply: Any) -> None:
        self._blocked_on, self._unblocking = None, False
        if isinstance(reply, list) and len(reply) == 3 and isinstance(reply[1], bytes):
            if queue := self._by_marker.get(reply[0]):
                self.wake(queue)
            else:
                self._requested(reply[1].decode("utf-8", "replace"))
        elif isinstance(reply, hiredis.ReplyError):
            self.wake_all()  # what is not heard has to be looked for
            if not str(reply).startswith("UNBLOCKED"):  # as a server says that turns into a replica
                self._deaf = True
                self._refused("wake-ups", reply)
                self._pause = self._pause or self._loop.call_later(REFUSED_PAUSE_S, self._go_on)
                return
        elif not (reply is None or isinstance(reply, Lost)):  # damaged on its way, or an answer to something else
            self._blocker.restart()
            return
        if not isinstance(reply, Lost):
            self._deaf = False
            self.outage.ends("wake-ups")

    def close(self) -> None:
        """Claim no more. What the blocking connection pops from now on, nobody would claim: begin it anew."""
        self.open = False
        self.void()
        self._blocker.restart()
        for queue in self.queues:
            if queue.due:
                queue.due.cancel()
