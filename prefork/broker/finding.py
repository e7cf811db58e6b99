"""What is found out about a deployment, and what was done about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefork.broker import facts

MOST_NAMED = 3
FAULTS = {
    "nowhere": ("error", "{n} messages are in no place, so that nobody runs them: {ids}"),
    "twice": ("error", "{n} messages are in two places, and may run twice: {ids}"),
    "bare": ("warning", "{n} ids have no message, and are passed over: {ids}"),
    "cancelled": ("warning", "{n} marks of cancelled messages are left over: {ids}"),
    "unreadable": ("warning", "{n} messages that wait can't be read: {ids}"),
    "stray_state": ("warning", "{n} histories are of messages that are gone: {ids}"),
    "bad_state": ("warning", "{n} histories can't be read: {ids}"),
    "bad_counter": ("error", "{n} counters are no numbers, so that nothing can be settled: {ids}"),
    "bad_takeovers": ("error", "{n} counts of takeovers are no numbers, so that nobody can take over: {ids}"),
}
DONE = {
    "nowhere": "put back into the queue",
    "twice": "left in one of their places",
    "bare": "struck out, for there is nothing to run",
    "cancelled": "forgotten",
    "unreadable": "made dead letters",
    "stray_state": "forgotten",
    "bad_state": "begun anew",
    "bad_counter": "begin at 0 again",
    "bad_takeovers": "begin at 0 again",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """`level`: ok, warning or error. `remedy`: what to do about it; empty for ok.

    `code`: what kind of fault in the data it is, `queue`: where; "" for all else. `mend`: does what can be done about
    it, and says in a line what that was; None: people have to.
    """

    level: str
    what: str
    remedy: str = ""
    code: str = ""
    queue: str = ""
    mend: Callable[[], str] | None = None

    def told(self, repaired: str = "") -> dict[str, Any]:
        """As `prefork doctor --json` prints it. `repaired`: what was done about it."""
        return {
            "level": self.level, "what": self.what, "remedy": self.remedy, "code": self.code, "queue": self.queue,
            "repaired": repaired,
        }  # fmt: skip


def named(ids: Sequence[bytes]) -> str:
    """Some names, as a sentence takes them."""
    shown = ", ".join(facts.name(id) for id in ids[:MOST_NAMED])
    return shown + (", …" if len(ids) > MOST_NAMED else "")


def fault(queue: str, kind: str, ids: list[bytes], mend: Callable[[bytes], bool], *, more: bool = False) -> Finding:
    """A fault of some ids. `mend`: of one; -> whether it had to be."""
    level, what = FAULTS[kind]

    def mend_all() -> str:
        mended = [id for id in ids if mend(id)]
        rest = f", {len(ids) - len(mended)} had gone on by themselves" if len(mended) < len(ids) else ""
        return f"queue {queue}: {len(mended)} {DONE[kind]} ({kind}): {named(mended)}{rest}"

    many = f"{len(ids)} or more" if more else str(len(ids))
    return Finding(
        level, f"queue {queue}: " + what.format(n=many, ids=named(ids)),
        f"prefork doctor --repair: they are {DONE[kind]}", kind, queue, mend_all,
    )  # fmt: skip
