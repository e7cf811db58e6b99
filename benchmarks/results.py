"""What the rounds have given: medians, spread, and ratios that are taken within a round."""

from __future__ import annotations

import math
import operator
import statistics
from dataclasses import dataclass, field

from benchmarks.rows.row import Figure, Row, Values
from benchmarks.sides import LIMIT, PREFORK

COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass
class Results:
    """The values of one row: for each side one entry for each round, None for a round that failed."""

    row: Row
    rounds: dict[str, list[Values | None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def values(self, side: str, key: str) -> list[float]:
        """A side's value in each round; NaN where there is none."""
        return [(values or {}).get(key, math.nan) for values in self.rounds.get(side, [])]

    def ratios(self, key: str, against: str, side: str = PREFORK) -> list[float]:
        """The same by somebody else's of the same round."""
        others = self._best_peers(key, against) if against in ("most", "least") else self.values(against, key)
        mine = self.values(side, key)
        return [value / other if other else math.nan for value, other in zip(mine, others, strict=False)]

    def _best_peers(self, key: str, which: str) -> list[float]:
        best = max if which == "most" else min
        names = [name for name in self.rounds if name != LIMIT and not name.startswith(PREFORK)]
        at_once = zip(*(self.values(name, key) for name in names), strict=False)
        return [best((value for value in values if not math.isnan(value)), default=math.nan) for values in at_once]

    def of(self, figure: Figure, side: str = PREFORK) -> Summary | None:
        """What the table says of a figure; None where nothing was measured."""
        key, against = figure.key, figure.against
        values = self.ratios(key, against, side) if against else self.values(side, key)
        values = [value for value in values if not math.isnan(value)]
        return Summary(values, figure.target) if values else None


@dataclass(frozen=True)
class Summary:
    """Median and spread of some rounds, and whether that is what was wanted."""

    values: list[float]
    target: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def good(self) -> bool | None:
        """Whether the median is as the target says; None without one."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return bool(COMPARE[sign](self.median, float(bound)))
