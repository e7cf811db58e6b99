"""What a row of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.scene import Scene
from benchmarks.sides import PREFORK

Values = dict[str, float]
PEERS = "peers"  # whoever of them was asked for


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value of prefork's, or its ratio to somebody else's of the same round.

    `target`: such as `>= 0.5`; nothing: it is only shown. `against`: a side, or `most` or `least` of all peers.
    """

    key: str
    what: str
    target: str = ""
    unit: str = ""
    against: str = ""


@dataclass(frozen=True)
class Row:
    """What is measured in one go. `sides`: who takes part."""

    name: str
    measure: Callable[[Scene], Values]
    figures: tuple[Figure, ...]
    sides: tuple[str, ...] = (PREFORK,)
    rounds: tuple[int, int, int] = (3, 1, 1)  # full, quick, tiny
    compared: tuple[str, ...] = ()  # keys that stand in the table of peers
