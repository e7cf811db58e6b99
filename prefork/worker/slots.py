"""The children as the dispatcher sees them, sorted by what they may be given. Pure logic: time is told.

They are sorted with each change, so that a turn of the master looks only at those with whom there is something to do,
and takes no longer with 200 children than with two.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from math import inf

AHEAD_S = 0.002
MAX_DEPTH = 64
LAG_S = 0.003
SOON_S = LAG_S  # so long a spare waits, if it waits no longer than it should
WORTH_A_CLAIM_S = 0.1  # of tasks that take longer, a round trip is less than a hundredth


class Slots:
    """All children of a worker. Each that may be given more is in one of the first four sets, in the order of entry."""

    def __init__(self) -> None:
        self.idle: dict[Slot, None] = {}
        self.light: dict[Slot, None] = {}  # at work, and with at most half of what it may have
        self.full: dict[Slot, None] = {}
        self.long: dict[Slot, None] = {}  # what it runs takes longer than what anything should wait behind
        self.deep: dict[Slot, None] = {}  # something waits behind what it runs
        self.spared: dict[Slot, None] = {}  # what waits is a spare
        self._ends: list[tuple[float, int, Slot]] = []  # when something ends; not true any more if its slot says else
        self._soon: dict[Slot, float] = {}
        self._order = count()

    @property
    def awake(self) -> int:
        """How many run short tasks."""
        return len(self.light) + len(self.full)

    def will_end(self, slot: Slot) -> None:
        """It has begun what is expected to end at its `end_s`."""
        heappush(self._ends, (slot.end_s, next(self._order), slot))

    def soon(self, now_s: float) -> list[Slot]:
        """Those that will probably be done in a moment and have nothing else: a round trip before they ask for more."""
        ends, soon = self._ends, self._soon
        while ends and ends[0][0] <= now_s + SOON_S:
            end_s, _, slot = heappop(ends)
            soon[slot] = end_s
        for slot, end_s in tuple(soon.items()):
            if slot.end_s != end_s or end_s <= now_s:  # the latter takes longer than expected: who knows how long
                del soon[slot]
        return [slot for slot in soon if slot.outstanding == 1 and slot in self.long]

    def next_s(self, now_s: float) -> float | None:
        """When the first of the others will have become one of those."""
        self.soon(now_s)
        ends = self._ends
        while ends and ends[0][2].end_s != ends[0][0]:
            heappop(ends)
        return ends[0][0] - SOON_S if ends else None

    def sift(self, now_s: float) -> None:
        """See which of those that were to be short take long."""
        for short in (self.light, self.full):
            for slot in [slot for slot in short if slot.lags(now_s)]:
                slot.move(self.long)

    def lagging(self, now_s: float) -> list[Slot]:
        """Those in which something should wait no longer."""
        return [slot for slot in self.deep if slot.lags(now_s)]


class Slot:
    """A child, as the dispatcher sees it.

    `left`: how many more it may be given before it is recycled. `head_since_s`: when what it is running began; `end_s`:
    when that is expected to end, 0 if nobody waits for it. `spare`: whether it has one.
    """

    __slots__ = ("_among", "_open", "_where", "end_s", "head_since_s", "left", "load_s", "outstanding", "spare")

    def __init__(self, among: Slots | None = None, *, open: bool = False, left: int = 1 << 62) -> None:
        self._among = Slots() if among is None else among
        self._open, self.left = open, left
        self._where: dict[Slot, None] | None = None
        self.outstanding = 0
        self.load_s = self.head_since_s = self.end_s = 0.0
        self.spare = False
        self._place()

    @property
    def open(self) -> bool:
        """Whether it may be given anything."""
        return self._open

    @open.setter
    def open(self, value: bool) -> None:
        self._open = value
        self._place()

    def leave(self) -> None:
        """Its child is gone."""
        self.open = self.spare = False
        self.end_s = 0.0
        self._among.deep.pop(self, None)
        self._among.spared.pop(self, None)

    def handed(self, expected_s: float, now_s: float, n: int = 1) -> None:
        """It was given n more, which are expected to take so long together."""
        first = not self.outstanding
        if first:
            self.head_since_s = now_s
            self.load_s = 0.0
        self.outstanding += n
        self.left -= n
        self.load_s += expected_s
        if self.outstanding > 1:
            self._among.deep[self] = None
        if first:
            self._begin()
        self._place()

    def handed_spare(self, expected_s: float, now_s: float) -> None:
        """It was given one more, to begin with as soon as what it is running ends."""
        self.spare = True
        self._among.spared[self] = None
        self.handed(expected_s, now_s)

    def answered(self, expected_s: float, now_s: float, n: int = 1) -> None:
        """It has answered n, which were expected to take so long together: the next one runs from now on."""
        self.outstanding = left = self.outstanding - n
        load_s = self.load_s - expected_s
        # infinity less infinity is not a number
        self.load_s = load_s if left and load_s > 0 and expected_s < inf else 0.0
        self.head_since_s = now_s
        if left <= 1:
            self._nothing_waits()
            self._begin()
        if not left or self._where is not self._among.light:
            self._place()

    def taken_back(self, expected_s: float) -> None:
        """One was taken back from it."""
        self.outstanding = left = self.outstanding - 1
        self.left += 1
        if self.spare:
            self.load_s = self.end_s - self.head_since_s
        else:
            load_s = self.load_s - expected_s
            self.load_s = load_s if left and load_s > 0 and expected_s < inf else 0.0
        if left <= 1:
            self._nothing_waits()
        if not left:
            self.load_s = self.end_s = 0.0
        if not left or self._where is None:  # else it may be known to take long
            self._place()

    def lags(self, now_s: float) -> bool:
        """Whether what it is running takes longer than what anything should wait behind."""
        if self.spare:
            return now_s > self.end_s
        return self.outstanding > 0 and now_s - self.head_since_s > LAG_S

    def move(self, where: dict[Slot, None] | None) -> None:
        """It belongs into this set now."""
        if where is not self._where:
            if self._where is not None:
                del self._where[self]
            if where is not None:
                where[self] = None
            self._where = where

    def _begin(self) -> None:
        """What it holds alone begins now."""
        self.end_s = 0.0
        if self.outstanding == 1 and AHEAD_S < self.load_s <= WORTH_A_CLAIM_S:
            self.end_s = self.head_since_s + self.load_s
            self._among.will_end(self)

    def _nothing_waits(self) -> None:
        self._among.deep.pop(self, None)
        if self.spare:
            self.spare = False
            self._among.spared.pop(self, None)

    def _place(self) -> None:
        among = self._among
        if not self._open or self.left <= 0:
            self.move(None)
        elif not self.outstanding:
            self.move(among.idle)
        elif self.load_s > AHEAD_S:
            self.move(among.long)
        elif self.load_s <= AHEAD_S / 2 and self.outstanding <= MAX_DEPTH // 2:
            self.move(among.light)
        else:
            self.move(among.full)
