"""Outcomes on their way to the broker, sent in batches.

1. Once a turn of the loop, a queue's outbox is sent as one `settle`; the next one goes when its reply has come.
2. A batch takes so much only. As long as one has left something behind, nothing is claimed: claims are larger than
   batches, and a master that is killed must not have thousands of outcomes with it, each of which is a task run again.
3. A batch whose reply was lost is sent again first of all: settle passes over what is settled already.
4. A batch that the broker refuses (no memory, read only …) is kept, and sent again a little later. When there is much
   of it, no more is to be claimed, or what comes of it would pile up here.
5. With `durability`, a batch whose outcomes have not got to the disk, or to the replicas, counts as refused.
6. A batch that the fence refuses (the lease is gone) is dropped: another worker has taken over its messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import hiredis

from prefork.broker import verbs
from prefork.broker.channel import Channel, Lost
from prefork.broker.durability import Durability
from prefork.broker.keys import Keys, queues_key
from prefork.worker.outage import Outage

BATCH = 1000  # ids without a record in one script, and …
MOST_RECORDS, MOST_BYTES = 200, 3 << 18  # … records: the server does nothing else meanwhile
BATCHES_A_WAIT = 10  # for a disk that is synced every second
REFUSED_PAUSE_S = 0.5
MOST_REFUSED = 1000  # outcomes kept of messages that were claimed although the broker refuses outcomes
Record = tuple[verbs.Argument, ...]


@dataclass
class Outbox:
    """What is to be settled in one queue."""

    keys: Keys
    plain: list[str] = field(default_factory=list)  # done, no result kept: the usual and the cheapest
    records: list[tuple[str | bytes, Record]] = field(default_factory=list)  # (id, record)
    sent_plain: list[str] = field(default_factory=list)
    sent_records: list[tuple[str | bytes, Record]] = field(default_factory=list)
    progress: dict[str, Record] = field(default_factory=dict)  # of what runs: the latest, however long it has to wait
    sent_progress: dict[str, Record] = field(default_factory=dict)
    held_back: set[str] = field(default_factory=set)  # ids whose follow-ups are on their way to another queue
    in_flight: bool = False
    left_behind: bool = False  # by the latest batch: what did not fit into it
    backs_wait: bool = False  # messages on their way back, which a claim sent now would overtake
    refused: bool = False  # its outcomes, until they are taken
    pauses: bool = False  # sends nothing for a moment

    def ids(self) -> set[str | bytes]:
        """The messages that are decided, and not known to be settled."""
        decided = {id for id, _ in self.records + self.sent_records}
        return decided.union(self.plain, self.sent_plain, self.held_back)

    def is_due(self) -> bool:
        """Whether there is something to send, and the reply to what was sent before has come."""
        return not (self.in_flight or self.pauses) and bool(self.plain or self.records or self.progress)

    def progress_words(self) -> list[verbs.Argument]:
        """What the next script says of what runs, which goes first; no more of it than it has room for."""
        self.sent_progress = dict(islice(self.progress.items(), MOST_RECORDS))
        for id in self.sent_progress:
            del self.progress[id]
        return [word for record in self.sent_progress.values() for word in record]

    def __bool__(self) -> bool:
        return bool(self.plain or self.records or self.progress or self.in_flight or self.held_back)


class Outboxes:
    """One outbox for each queue of this worker."""

    def __init__(
        self,
        prefix: str,
        dead_max: int,
        dead_ttl_ms: int,
        fenced: Callable[[str], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._fenced, self._later = fenced, later
        self._dead_max, self._dead_ttl_ms = dead_max, dead_ttl_ms
        self.outboxes: dict[str, Outbox] = {}
        self.worker = ""
        self._prefix, self._announced = prefix, set[str]()
        self._unsent_follow_ups: list[Callable[[], None]] = []
        self._elsewhere: dict[str | bytes, Callable[[], None]] = {}  # sends what a task has put into other queues
        self._asks_again = False  # will ask in a moment for what was refused
        self.durability: Durability | None = None
        self.wait_s = 0.0  # for it, at most
        self._refusals: set[str] = set()  # what is refused, until it is taken or forgotten
        self.outage = Outage()

    def add_queue(self, keys: Keys) -> None:
        """Let a queue have an outbox."""
        self.outboxes[keys.queue] = Outbox(keys)

    def flush(self, channel: Channel) -> None:
        """Send what has gathered, one batch for each queue at a time."""
        due = [outbox for outbox in self.outboxes.values() if outbox.is_due()]
        if self.durability is None:
            for outbox in due:
                (call,) = self._batches(outbox, 1)
                channel.send(call, lambda reply, outbox=outbox: self._settled(outbox, reply))  # type: ignore[misc]
        elif due and not any(outbox.in_flight for outbox in self.outboxes.values()):
            self._send_to_last(self.durability, due, channel)

    def send_rest(self, channel: Channel) -> None:
        """Send all that was not sent yet, when nobody will be there to read the replies."""
        for outbox in self.outboxes.values():
            while outbox.plain or outbox.records:
                channel.send(self._batch(outbox, []), lambda reply: None)

    def _batches(self, outbox: Outbox, most: int) -> list[verbs.Call]:
        """Take out what fits into so many scripts."""
        outbox.sent_plain, outbox.sent_records, outbox.sent_progress = [], [], {}
        calls = [self._batch(outbox, outbox.progress_words() if outbox.progress else [])]
        while len(calls) < most and (outbox.plain or outbox.records):
            calls.append(self._batch(outbox, []))
        outbox.in_flight, outbox.left_behind = True, bool(outbox.plain or outbox.records)
        outbox.backs_wait = outbox.refused or (outbox.backs_wait and bool(outbox.records))
        return calls

    def _batch(self, outbox: Outbox, words: list[verbs.Argument]) -> verbs.Call:
        """What fits into one script, behind these words."""
        size = taken = 0
        for _, record in outbox.records:
            words += record
            taken += 1
            size += sum(len(word) for word in record if isinstance(word, bytes))
            if size > MOST_BYTES or taken >= MOST_RECORDS:
                break
        outbox.sent_records += outbox.records[:taken]
        plain, outbox.plain, outbox.records = outbox.plain[:BATCH], outbox.plain[BATCH:], outbox.records[taken:]
        outbox.sent_plain += plain
        return verbs.settle(outbox.keys, self.worker, self._dead_max, self._dead_ttl_ms, plain, words)

    def _send_to_last(self, durability: Durability, due: list[Outbox], channel: Channel) -> None:
        """Settled is what has got to the disk, or to the replicas, behind everything that this connection wrote.

        One wait for all: the connection stands still meanwhile, and with it the lease.
        """
        sent: list[tuple[Outbox, int, list[Any]]] = []
        for outbox in due:
            calls, replies = self._batches(outbox, BATCHES_A_WAIT), list[Any]()
            for call in calls:
                channel.send(call, replies.append)
            sent.append((outbox, len(calls), replies))

        words = durability.words(round(self.wait_s * 1000))

        def waited(reply: Any) -> None:
            failed = reply if isinstance(reply, Exception) else None
            damaged = failed is None and not durability.is_answer(reply)
            if damaged:
                failed = Lost("no answer to the wait")
            elif failed is None and any(len(replies) < count for _, count, replies in sent):
                return channel.send_words(words, waited)  # a script had to be sent in full, behind that wait
            elif failed is None and (missing := durability.missing(reply)):
                failed = hiredis.ReplyError(f"what was written {missing}")
            for outbox, _, replies in sent:
                refused = next((it for it in replies if isinstance(it, Exception)), failed)
                self._settled(outbox, refused or replies[0])
            if damaged:
                channel.restart()
            return None

        channel.send_words(words, waited)

    def _settled(self, outbox: Outbox, reply: Any) -> None:
        if self.outboxes[outbox.keys.queue] is not outbox:  # all of it was forgotten meanwhile
            return
        outbox.in_flight = False
        if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("FENCED"):
            self._fenced(str(reply))
            return
        if isinstance(reply, Exception):
            outbox.plain = outbox.sent_plain + outbox.plain
            outbox.records = outbox.sent_records + outbox.records
            outbox.progress = outbox.sent_progress | outbox.progress
            outbox.backs_wait = bool(outbox.records)
            if not isinstance(reply, Lost):
                outbox.refused = outbox.pauses = True
                self._refused(f"outcomes of queue {outbox.keys.queue}", reply)
        else:
            outbox.refused = False
            outbox.backs_wait = outbox.backs_wait and bool(outbox.records)
            self._taken(f"outcomes of queue {outbox.keys.queue}")
            if self._elsewhere:
                for id, _ in outbox.sent_records:
                    self._elsewhere.pop(id, None)
        outbox.sent_plain, outbox.sent_records, outbox.sent_progress = [], [], {}

    @property
    def is_empty(self) -> bool:
        """Whether the broker has everything."""
        return not any(self.outboxes.values())

    @property
    def backs_wait(self) -> bool:
        """Whether a claim sent now would overtake messages that are on their way back; but see `barred`."""
        return any(outbox.backs_wait and not outbox.refused for outbox in self.outboxes.values())

    @property
    def is_full(self) -> bool:
        """Whether so much waits for the broker to take it that nothing more should be claimed; but see `barred`."""
        return any(box.left_behind and not box.refused and (box.records or box.plain) for box in self.outboxes.values())

    @property
    def barred(self) -> set[str]:
        """The queues from which nothing is to be claimed, because of what is refused. The others go on."""
        if not self._refusals:
            return set()
        return {
            queue for queue, box in self.outboxes.items()
            if (box.refused and (box.backs_wait or box.left_behind or len(box.ids()) >= MOST_REFUSED))
            or len(box.held_back) >= MOST_REFUSED
        }  # fmt: skip

    @property
    def refuses(self) -> bool:
        """Whether the broker does not take something."""
        return bool(self._refusals)

    def came_back(self, queue: str, ids: list[bytes]) -> None:
        """Messages that were claimed. A script that the broker broke off may have put them into their queue: what was
        said of them then must not be said again, of this run."""
        outbox, again = self.outboxes[queue], {id.decode("utf-8", "replace") for id in ids}
        outbox.records = [record for record in outbox.records if record[0] not in again]
        for id in again:
            outbox.progress.pop(id, None)
            self._elsewhere.pop(id, None)
        outbox.backs_wait = outbox.backs_wait and bool(outbox.records)
        if not outbox:  # nothing is sent any more that could be taken
            outbox.refused = False
            self._taken(f"outcomes of queue {queue}")

    def unsettled(self) -> int:
        """How many messages are decided here, and not known to be settled there."""
        return sum(len(outbox.ids()) for outbox in self.outboxes.values())

    def forget_all(self) -> int:
        """Drop what is decided and not settled: another worker has it now. -> how many"""
        count = self.unsettled()
        for queue, outbox in self.outboxes.items():
            outbox.held_back.clear()  # replies that are still due look there
            self.outboxes[queue] = Outbox(outbox.keys)
        self._unsent_follow_ups.clear()
        self._elsewhere.clear()
        for what in tuple(self._refusals):
            self._taken(what)
        return count

    def _refused(self, what: str, reply: Exception) -> None:
        """The broker answers but does not take it (no memory, read only …): keep it, ask again a little later."""
        self._refusals.add(what)
        self.outage.begins(what, f"the broker does not take {what}: {reply}")
        if self._asks_again:
            return
        self._asks_again = True

        def go_on() -> None:
            self._asks_again = False
            for outbox in self.outboxes.values():
                outbox.pauses = False
            self.resend()

        self._later(REFUSED_PAUSE_S, go_on)

    def _taken(self, what: str) -> None:
        """It is taken, perhaps again; or nobody is left to whom it matters."""
        self._refusals.discard(what)
        self.outage.ends(what)

    def disconnected(self) -> None:
        """Whoever is the broker next may be another one, which lacks what the last one has taken in and not kept.

        With `durability` the follow-ups of what is not settled go first once more, or they would be lost for good.
        """
        self._announced.clear()
        for outbox in self.outboxes.values():
            for record in [record for record in outbox.records if record[0] in self._elsewhere]:
                outbox.records.remove(record)
                outbox.held_back.add(str(record[0]))
                self._unsent_follow_ups.append(self._elsewhere[record[0]])
            outbox.backs_wait = outbox.backs_wait and bool(outbox.records)

    def resend(self) -> None:
        """Send the follow-ups again that did not get through."""
        unsent, self._unsent_follow_ups = self._unsent_follow_ups, []
        for send in unsent:
            send()

    def _after_follow_ups(
        self, entries: list[verbs.Entry], outbox: Outbox, done: tuple[str, Record], channel: Channel
    ) -> None:
        """Follow-ups in other slots go first; with ids of their own parent, so that a repeat adds none."""
        outbox.held_back.add(done[0])
        waiting = {entry.queue for entry in entries}

        def send(queue: str) -> None:
            if queue not in self._announced:  # so that it is found by `prefork queues` and `app.result`
                channel.send_words(("SADD", queues_key(self._prefix), queue), lambda reply: announced(queue, reply))
                self._announced.add(queue)
            some = [entry for entry in entries if entry.queue == queue]
            channel.send(
                verbs.enqueue(Keys(self._prefix, queue), some, again=True), lambda reply: arrived(queue, reply)
            )

        def announced(queue: str, reply: Any) -> None:
            if isinstance(reply, Exception):
                self._announced.discard(queue)

        def arrived(queue: str, reply: Any) -> None:
            if done[0] not in outbox.held_back:
                return  # this worker was fenced meanwhile
            if isinstance(reply, Exception):
                self._unsent_follow_ups.append(lambda: send(queue))
                if not isinstance(reply, Lost):
                    self._refused(f"follow-ups to queue {queue}", reply)
                return
            self._taken(f"follow-ups to queue {queue}")
            waiting.discard(queue)
            if not waiting:
                outbox.held_back.discard(done[0])
                outbox.records.append(done)

        def send_all() -> None:
            waiting.update(entry.queue for entry in entries)
            for queue in sorted(waiting):
                send(queue)

        if self.durability:
            self._elsewhere[done[0]] = send_all
        send_all()
