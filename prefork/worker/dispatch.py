"""Who gets what, and how much to claim. Pure logic: no input, no output, time is told.

- A child is handed about two milliseconds of work ahead, by what each task name has taken so far (mean and spread); a
  message that is expected to be long, or is of a name not yet known, only when it has nothing else.
- What is claimed is what the children can be handed, and as much again while tasks are short, so that no child waits
  for a round trip; when they are longer, one for each child that has nothing or will be done in two milliseconds.
- A child whose running message takes longer than expected lags: what waits behind it is taken back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

AHEAD_S = 0.002
MAX_DEPTH = 64
LAG_S = 0.003
STALE_S = 0.02
WORTH_A_CLAIM_S = 0.1  # of tasks that take longer, a round trip is less than a hundredth
WORTH_A_WAKE_S = 0.0002  # so much work can wait behind other in a child: to wake another one takes as long
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
        self._known: dict[str, list[float]] = {}  # mean, mean deviation
        self.mix_s = inf  # what the next message of any name will probably take

    def expect_s(self, name: str) -> float:
        """Seconds that a task will hardly exceed; infinite for one never seen."""
        known = self._known.get(name)
        return known[0] + 2 * known[1] if known else inf

    def observe(self, name: str, ran_s: float) -> None:
        """Learn from one run."""
        ran_s += OVERHEAD_S
        if known := self._known.get(name):
            off_s = ran_s - known[0]
            known[0] += off_s / 8
            known[1] += (abs(off_s) - known[1]) / 4
        else:
            self._known[name] = [ran_s, ran_s / 2]
        self.mix_s = ran_s if self.mix_s == inf else self.mix_s + (ran_s - self.mix_s) / 8


@dataclass(slots=True, eq=False)
class Slot:
    """A child, as the dispatcher sees it.

    `left`: how many more it may be given before it is recycled. `head_since_s`: when what it is running began.
    """

    open: bool = False
    left: int = 1 << 62
    outstanding: int = 0
    load_s: float = 0.0
    head_since_s: float = 0.0

    def handed(self, expected_s: float, now_s: float) -> None:
        """It was given one more."""
        if not self.outstanding:
            self.head_since_s = now_s
            self.load_s = 0.0
        self.outstanding += 1
        self.left -= 1
        self.load_s += expected_s

    def answered(self, expected_s: float, now_s: float) -> None:
        """It has answered one: the next one runs from now on."""
        self.outstanding = left = self.outstanding - 1
        load_s = self.load_s - expected_s
        # infinity less infinity is not a number
        self.load_s = load_s if left and load_s > 0 and expected_s < inf else 0.0
        self.head_since_s = now_s

    def taken_back(self, expected_s: float) -> None:
        """One was taken back from it."""
        self.answered(expected_s, self.head_since_s)
        self.left += 1

    def ends_soon(self, now_s: float) -> bool:
        """Whether what it is running will probably be done in a moment: a round trip before it asks for more."""
        return self.outstanding == 1 and 0 < self.head_since_s + self.load_s - now_s <= AHEAD_S

    def lags(self, now_s: float) -> bool:
        """Whether what it is running takes longer than what anything should wait behind."""
        return self.outstanding > 0 and now_s - self.head_since_s > LAG_S


class Dispatcher(Generic[W]):
    """What was claimed and not yet handed out, and to whom it goes."""

    def __init__(self, slots: Collection[Slot] = ()) -> None:
        self.ready: deque[W] = deque()
        self.slots = slots  # as they are at any time

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
        return sum(1 for slot in self.slots if slot.open and not slot.outstanding) - len(self.ready)

    def wanted(self, mix_s: float, now_s: float) -> int:
        """How many messages to claim now."""
        short = self.room()
        if mix_s >= AHEAD_S:
            return max(0, short + sum(1 for slot in self.slots if slot.open and slot.ends_soon(now_s)))
        depth = min(MAX_DEPTH, int(AHEAD_S / mix_s))
        target = held = 0
        for slot in self.slots:
            if slot.open and not slot.lags(now_s):
                target += 2 * depth
                held += slot.outstanding
        missing = target - held - len(self.ready)
        # A few missing ones are worth a round trip only if somebody has nothing to do.
        return missing if missing > 0 and (short > 0 or missing * 4 >= target) else 0

    def ahead_in_s(self, now_s: float) -> float | None:
        """After how many seconds it is time to claim for the child that is done next, if all have something to do."""
        ends_s = [
            slot.head_since_s + slot.load_s
            for slot in self.slots
            if slot.open and slot.outstanding == 1 and AHEAD_S < slot.load_s <= WORTH_A_CLAIM_S
        ]
        left_s = [end_s - now_s - AHEAD_S for end_s in ends_s if end_s - now_s > AHEAD_S]
        return min(left_s) if left_s else None

    def assign(self, now_s: float) -> list[tuple[Slot, list[W]]]:
        """Hand out what is ready: to those who have nothing first, evenly, in order."""
        if not self.ready:
            return []
        open_slots = [slot for slot in self.slots if slot.open]
        if not open_slots:
            return []
        share = -(-len(self.ready) // len(open_slots))
        given = []
        for slot in sorted(open_slots, key=_outstanding):
            if some := self._taken(slot, share, now_s):
                given.append((slot, some))
            if not self.ready:
                break
        return given

    def _taken(self, slot: Slot, share: int, now_s: float) -> list[W]:
        """What this child gets of what is ready: its share, if it has nothing else; more as long as all is short."""
        ready = self.ready
        some: list[W] = []
        most = min(slot.left, MAX_DEPTH - slot.outstanding)
        # One that has half of what it may have needs nothing yet: few large batches wake it less than many small ones.
        if slot.outstanding and (slot.outstanding > MAX_DEPTH // 2 or slot.load_s > AHEAD_S / 2 or slot.lags(now_s)):
            return some
        while ready and len(some) < most:
            expected_s = ready[0].expected_s
            if slot.outstanding and slot.load_s + expected_s > (AHEAD_S if len(some) < share else WORTH_A_WAKE_S):
                break
            slot.handed(expected_s, now_s)
            some.append(ready.popleft())
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
        return bool(self.ready) or any(slot.outstanding > 1 for slot in self.slots)


_serial, _outstanding = attrgetter("serial"), attrgetter("outstanding")  # a call less for each child, or message
