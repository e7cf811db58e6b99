"""Who gets what, and how much to claim. Pure logic: no input, no output, time is told.

- A child is handed about two milliseconds of work ahead, by what each task name has taken so far (mean and spread); a
  message that is expected to be long, or is of a name not yet known, only when it has nothing else.
- Or, when all have something to do, a *spare*: one message behind a longer one that is expected to end in a moment, so
  that the child needn't ask. It is taken back when that takes longer, or another child has nothing to do.
- What is short stays in few children, however many there are: the master can't keep more of them busy.
- While tasks are short, as much is claimed as the children can be handed, beyond what they hold, so that none waits for
  a round trip; when they are longer, one for each child that has nothing or will be done in a moment.
- A child whose running message takes longer than expected lags: what waits behind it is taken back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from prefork.worker.slots import AHEAD_S, MAX_DEPTH, Slot, Slots

STALE_S = 0.02
WORTH_A_WAKE_S = 0.0002  # so much work can wait behind other in a child: to wake another one takes as long
FEW = 8  # children that work off tasks as short as that as fast as a master can hand them out
MOST_READY = 10 * MAX_DEPTH  # claimed ahead: what the master hands out in less than STALE_S
OVERHEAD_S = 10e-6  # of the hand-off, beside the time that a task itself takes


class Expected(Protocol):
    """What is dispatched."""

    expected_s: float
    serial: int  # in the order in which it was claimed
    ready_since_s: float


W = TypeVar("W", bound=Expected)


class RunTimes:
    """How long tasks take, by name: a decayed mean and mean deviation, as TCP keeps its round trip times.

    Source: V. Jacobson, "Congestion Avoidance and Control", 1988, appendix A.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[float]] = {}  # mean, mean deviation
        self.mix_s = inf  # what the next message of any name will probably take

    def expect_s(self, name: str) -> float:
        """Seconds that a task will hardly exceed; infinite for one never seen."""
        known = self.known.get(name)
        return known[0] + 2 * known[1] if known else inf

    def observe(self, name: str, ran_s: float) -> None:
        """Learn from one run."""
        ran_s += OVERHEAD_S
        if known := self.known.get(name):
            off_s = ran_s - known[0]
            known[0] += off_s / 8
            known[1] += (abs(off_s) - known[1]) / 4
        else:
            self.known[name] = [ran_s, ran_s / 2]
        self.mix_s = ran_s if self.mix_s == inf else self.mix_s + (ran_s - self.mix_s) / 8


class Dispatcher(Generic[W]):
    """What was claimed and not yet handed out, and to whom it goes."""

    def __init__(self, slots: Slots) -> None:
        self.ready: deque[W] = deque()
        self.slots = slots

    def add(self, work: list[W], now_s: float) -> None:
        """What was claimed, or taken back from a child: in the order in which it was claimed."""
        for one in work:
            one.ready_since_s = now_s
        behind = not self.ready or not work or self.ready[-1].serial < work[0].serial
        self.ready.extend(work)
        if not behind:
            self.ready = deque(sorted(self.ready, key=_serial))

    def room(self) -> int:
        """How many children have nothing to do, beyond those for whom something is ready."""
        return len(self.slots.idle) - len(self.ready)

    def wanted(self, mix_s: float, now_s: float) -> int:
        """How many messages to claim now."""
        slots, ready = self.slots, len(self.ready)
        needed = max(0, len(slots.idle) + len(slots.soon(now_s)) - ready)
        if mix_s >= AHEAD_S:
            return needed
        slots.sift(now_s)
        target = min(MOST_READY, min(MAX_DEPTH, int(AHEAD_S / mix_s)) * (len(slots.idle) + slots.awake))
        missing = target - ready
        # A few missing ones are worth a round trip only if somebody has nothing to do.
        return max(missing, needed) if needed or 0 < target <= 2 * missing else 0

    def ahead_in_s(self, now_s: float) -> float | None:
        """After how many seconds it is time to claim, or to hand out, for the child that is done next."""
        at_s = self.slots.next_s(now_s)
        return None if at_s is None else max(0.0, at_s - now_s)

    def hoarding(self) -> Iterator[Slot]:
        """Children whose spares others could begin with, as long as there are such others.

        Which spares have been begun meanwhile shows only when they are to be taken back.
        """
        for slot in reversed(tuple(self.slots.spared)):
            if self.room() <= 0:
                return
            yield slot

    def alone(self) -> tuple[Slot, W] | None:
        """What `assign` would give to a child that has nothing, when it is all that is ready; else None.

        So comes what wakes a worker that has slept, with caches that are cold: `Slot.handed` can wait until it is
        written.
        """
        ready, slots = self.ready, self.slots
        if len(ready) != 1 or not slots.idle or slots.spared:
            return None
        if ready[0].expected_s <= WORTH_A_WAKE_S and slots.awake >= FEW:
            return None
        return next(reversed(slots.idle)), ready.popleft()

    def assign(self, now_s: float) -> list[tuple[Slot, list[W]]]:
        """Hand out what is ready, in order: to those who have nothing first, evenly; but what is short to few."""
        ready, slots = self.ready, self.slots
        given: list[tuple[Slot, list[W]]] = []
        if not ready:
            return given
        short = ready[0].expected_s <= WORTH_A_WAKE_S
        few = FEW - slots.awake if short else len(slots.idle)
        if few > 0 and slots.idle:
            self._wake(few, given, now_s)
        if ready and ready[0].expected_s < AHEAD_S:
            self._top_up(given, now_s)
        while ready and slots.idle:
            self._wake(FEW, given, now_s)
        if ready:
            self._give_spares(given, now_s)
        return given

    def _wake(self, most: int, given: list[tuple[Slot, list[W]]], now_s: float) -> None:
        """Those that have nothing: who had something last comes first, since its memory is in the cache."""
        idle = self.slots.idle
        share = self._share(min(most, len(idle)))
        while self.ready and idle and most > 0:
            slot = next(reversed(idle))
            given.append((slot, self._taken(slot, share, now_s)))
            most -= 1

    def _top_up(self, given: list[tuple[Slot, list[W]]], now_s: float) -> None:
        """Those that have little: few large batches wake a child less than many small ones."""
        slots, fresh = self.slots, {slot for slot, _ in given}
        slots.sift(now_s)
        light = sorted((slot for slot in slots.light if slot not in fresh), key=_outstanding)
        share = self._share(len(light))
        for slot in light:
            if not self.ready:
                break
            if some := self._taken(slot, share, now_s):
                given.append((slot, some))

    def _give_spares(self, given: list[tuple[Slot, list[W]]], now_s: float) -> None:
        """Those that will be done in a moment: one each."""
        fresh = {slot for slot, _ in given}
        for slot in self.slots.soon(now_s):
            if not self.ready:
                break
            if slot not in fresh:
                work = self.ready.popleft()
                slot.handed_spare(work.expected_s, now_s)
                given.append((slot, [work]))

    def _share(self, among: int) -> int:
        return -(-len(self.ready) // among) if among else 0

    def _taken(self, slot: Slot, share: int, now_s: float) -> list[W]:
        """What this child gets of what is ready: its share, if it has nothing else; more as long as all is short."""
        ready = self.ready
        some: list[W] = []
        held, load_s, given_s = slot.outstanding, slot.load_s, 0.0
        most = min(slot.left, MAX_DEPTH - held)
        while ready and len(some) < most:
            expected_s = ready[0].expected_s
            most_s = AHEAD_S if len(some) < share else WORTH_A_WAKE_S
            if (held or some) and load_s + given_s + expected_s > most_s:
                break
            given_s += expected_s
            some.append(ready.popleft())
        if some:
            slot.handed(given_s, now_s, len(some))
        return some

    def stale(self, now_s: float) -> list[W]:
        """What was claimed and can't be handed out soon: it goes back to its queue, for other workers."""
        if not any(now_s - work.ready_since_s >= STALE_S for work in self.ready):
            return []
        stale = list(self.ready)  # all of it: what came later must not be started before what goes back
        self.ready.clear()
        return stale

    def waits(self) -> bool:
        """Whether anything is waiting, here or behind another in a child."""
        return bool(self.ready or self.slots.deep)


_serial, _outstanding = attrgetter("serial"), attrgetter("outstanding")  # a call less for each child, or message
