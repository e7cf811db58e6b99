"""The account: what became of each task, by the ledger and by the broker, and what a fault explains.

1. `World` knows what happened to each process: the faults that met it, its ends, the leases that it lost.
2. `Account.take` judges the tasks of one part of the ledger: each has ended as it should, and what ran more often than
   it should is explained by something that happened to the child or the worker which ran it first.
3. What nothing explains is a *finding*. One is enough to fail.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from prefork.broker.caller import TRY
from prefork.torture.app import KINDS, LIMIT_S, MAX_CRASHES
from prefork.torture.faults import Done
from prefork.torture.fleet import LEASE_S, SHUTDOWN_S, Life
from prefork.torture.ledger import NEVER, Run, Story, root

SECOND_US = 1_000_000
TRY_US = round(LIMIT_S * TRY * SECOND_US)  # a producer that was told later has asked twice
SLACK_US = SECOND_US  # between what happens and the first sign of it
BEYOND_LEASE_US = round(2.5 * LEASE_S * SECOND_US)  # how long before it notices may a worker have lost its lease
LEAVING_US = round((SHUTDOWN_S + 10) * SECOND_US)  # a reload: check, drain, exec
MOST_FINDINGS = 50
ZOMBIES = ("master stopped beyond its lease", "lease lost")
TELLING = ("TERM", "INT", "QUIT", "HUP")
OF_CONNECTION = ("connections cut", "no more clients", "server ", "scripts", "snapshot", "memory")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a process, and may have cost it what it had not settled."""

    what: str
    begin_us: int
    end_us: int


class World:
    """What happened to whom. `dead`: the ids of the dead letters; `results`: id -> status of those that are kept."""

    def __init__(
        self, faults: Iterable[Done], lives: Iterable[Life], fences: Iterable[tuple[int, int]], dead: set[str]
    ) -> None:
        self.dead = dead
        self.disturbances: list[Event] = []
        self._events: dict[int, list[Event]] = defaultdict(list)
        for fault in faults:
            if fault.name.startswith(OF_CONNECTION):
                self.disturbances.append(Event(fault.name, fault.begin_us, fault.end_us + SLACK_US))
            elif event := _event(fault):
                self._events[fault.pid].append(event)
        for life in lives:
            if life.ended_us:
                self._events[life.pid].append(Event("worker ended", life.ended_us - SLACK_US, life.ended_us))
        for pid, at_us in fences:
            self._events[pid].append(Event("lease lost", at_us - BEYOND_LEASE_US, at_us + SLACK_US))

    def why(self, run: Run, until_us: int) -> str:
        """What may have kept this run from being settled before then; "" if nothing did."""
        for event in self._events.get(run.child, []) + self._events.get(run.master, []):
            if event.begin_us <= until_us and event.end_us >= run.start_us:
                return event.what
        return ""

    def was_cut_off(self, run: Run) -> str:
        """What may have kept the worker of this run from knowing that another one had taken over; "" if nothing did."""
        for event in self._events.get(run.master, []):
            if event.what in ZOMBIES and event.begin_us <= run.start_us <= event.end_us:
                return event.what
        return ""

    def child_died(self, run: Run) -> bool:
        """Whether a fault killed or froze the child in this run."""
        return any(it.begin_us <= run.end_us and it.end_us >= run.start_us for it in self._events.get(run.child, []))

    def disturbed(self, begin_us: int, end_us: int) -> str:
        """What stood between a producer and the broker then; "" if nothing did."""
        return next((it.what for it in self.disturbances if it.begin_us <= end_us and it.end_us >= begin_us), "")


def _event(fault: Done) -> Event | None:
    kind, _, rest = fault.name.partition(" ")
    if kind == "child" or fault.name == "master killed":
        return Event(fault.name, fault.begin_us - SLACK_US, min(fault.end_us, NEVER - 1) + SLACK_US)
    if fault.name == "master stopped beyond its lease":
        return Event(fault.name, fault.begin_us, fault.end_us + SLACK_US)
    if rest.startswith("told ") and rest.removeprefix("told ") in TELLING:
        return Event(fault.name, fault.begin_us, fault.begin_us + LEAVING_US)
    return None


@dataclass(slots=True)
class Account:
    """Sums. `unsure`: producers were told that they may have been accepted; `came`: those of them that were."""

    accepted: int = 0
    unsure: int = 0
    came: int = 0
    refused: int = 0
    follow_ups: int = 0
    done: int = 0
    dead: int = 0
    cancelled: int = 0
    lost: int = 0
    runs: int = 0
    repeats: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    crash_letters: int = 0  # dead letters because faults killed the child of the same task too often
    broken: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is nothing to complain of."""
        return not self.broken

    def find(self, what: str, about: str) -> None:
        """Something that must not be."""
        self.broken[what] += 1
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(f"{what}: {about}")

    def take(self, stories: dict[str, Story], world: World, failed: set[str]) -> None:
        """Judge a part of the ledger. `failed`: the ids whose kept result is not that of a success."""
        for tag, story in stories.items():
            if root(tag) == tag:
                self._judge_root(story, world)
            else:
                self.follow_ups += 1
                self._judge_follow_up(story, stories[root(tag)], world)
            self._judge_runs(story, stories[root(tag)], world)
            self.runs += len(story.runs)
            if story.id in failed and _succeeded(story) and story.id not in world.dead and not story.cancel:
                self.find("result of a success is missing or another one", _told(story))
        for story in list(stories.values()):
            self._judge_heirs(story, stories, world)

    # -- one task -----------------------------------------------------------------------------------------------

    def _judge_root(self, story: Story, world: World) -> None:
        if story.answer == "r":
            self.refused += 1
            if story.runs:
                self.find("refused, but ran", _told(story))
            return
        if story.answer != "a":
            self.unsure += 1
            if not story.runs:
                return
            self.came += 1
        else:
            self.accepted += 1
        ids = {run.id for run in story.runs} | ({story.id} if story.id else set())
        if len(ids) > 1:
            self.find("one enqueue, two messages", _told(story))
        self._judge_end(story, ids, world)

    def _judge_end(self, story: Story, ids: set[str], world: World) -> None:
        kind = KINDS[story.kind.partition(":")[0]]
        is_dead = bool(ids & world.dead)
        if is_dead and kind.dead:
            self.dead += 1
            if sum(not run.cut or bool(kind.timeout_s) for run in story.runs) < kind.fails:
                self.find("dead letter before it had failed so often", _told(story))
        elif is_dead:
            crashes = sum(run.outcome == "crash" or world.child_died(run) for run in story.runs)
            self.crash_letters += 1
            if crashes < MAX_CRASHES:
                self.find("dead letter that should not be", _told(story))
        elif _succeeded(story):
            self.done += 1
            if kind.dead:
                self.find("succeeded, but should not", _told(story))
        elif story.cancel and self._may_be_cancelled(story, world):
            self.cancelled += 1
        else:
            self.lost += 1
            self.find("lost", _told(story))
        if story.cancel == "yes" and any(run.start_us > story.cancelled_us for run in story.runs):
            self.find("ran after it was cancelled", _told(story))

    def _may_be_cancelled(self, story: Story, world: World) -> bool:
        said = story.cancel.removesuffix("-running")
        return said in ("yes", "unknown") or bool(world.disturbed(story.cancel_asked_us, story.cancelled_us))

    def _judge_follow_up(self, story: Story, parent: Story, world: World) -> None:
        if not _succeeded(story) and not {run.id for run in story.runs} & world.dead:
            self.lost += 1
            self.find("lost follow-up", _told(story))
        ids = {run.id for run in story.runs}
        if len(ids) > 1:
            until_us = story.runs[-1].start_us
            why = next((why for run in parent.runs if (why := world.why(run, until_us))), "")
            if "/heir-" in story.tag or not why:
                self.find("follow-up enqueued twice", _told(story))
            else:
                self.repeats += len(ids) - 1
                self.explained[why] += len(ids) - 1

    def _judge_heirs(self, story: Story, stories: dict[str, Story], world: World) -> None:
        kind, *numbers = story.kind.split(":")
        if kind != "parent" or not _succeeded(story) or {run.id for run in story.runs} & world.dead:
            return
        for name, number in zip(("heir", "guest"), map(int, numbers), strict=True):
            for n in range(number):
                if f"{story.tag}/{name}-{n}" not in stories:
                    self.lost += 1
                    self.find("lost follow-up", f"{name} {n} of {_told(story)}")

    # -- one run and the next -----------------------------------------------------------------------------------

    def _judge_runs(self, story: Story, parent: Story, world: World) -> None:
        kind = KINDS[story.kind.partition(":")[0]] if story.kind else KINDS["noop"]
        by_id: dict[str, list[Run]] = defaultdict(list)
        for run in story.runs:
            by_id[run.id].append(run)
        for runs in by_id.values():
            for before, after in itertools.pairwise(runs):
                if _asked_for(before, after, kind.timeout_s):
                    continue
                self.repeats += 1
                why = world.why(before, after.start_us) or world.was_cut_off(after)
                if not why and "/guest-" in story.tag:  # its parent enqueues it anew; no script reaches both queues
                    why = next((why for run in parent.runs if (why := world.why(run, after.start_us))), "")
                if not why and not kind.kept and before.start_us < story.answered_us != NEVER:
                    late = story.answered_us - story.asked_us >= TRY_US
                    why = "reply to enqueue lost" if late or world.disturbed(story.asked_us, story.answered_us) else ""
                if why:
                    self.explained[why] += 1
                else:
                    self.find("ran again, and nothing explains it", _told(story))


def _asked_for(before: Run, after: Run, timeout_s: float) -> bool:
    """Whether the task itself asked for the second run: it failed, crashed or was over its time, and that was noted."""
    if after.attempt <= before.attempt:
        return False
    if before.outcome == "" and timeout_s:
        return after.start_us - before.start_us >= timeout_s * SECOND_US
    return before.outcome not in ("", "ok")


def _succeeded(story: Story) -> bool:
    return any(run.outcome == "ok" for run in story.runs)


def _told(story: Story) -> str:
    """A story on one line; times in seconds from its first word."""
    zero = story.asked_us or (story.runs[0].start_us if story.runs else 0)

    def at(us: int) -> str:
        return "never" if us == NEVER else f"{(us - zero) / SECOND_US:.3f}"

    said = [f"{story.tag} {story.kind} answer={story.answer or '-'}@{at(story.answered_us)} id={story.id or '-'}"]
    said += [f"asked@{zero}us"]
    if story.cancel:
        said.append(f"cancel={story.cancel}@{at(story.cancel_asked_us)}-{at(story.cancelled_us)}")
    for run in story.runs:
        end = "cut" if run.cut else f"{run.outcome}@{at(run.end_us)}"
        said.append(
            f"[{run.id[-6:]} attempt {run.attempt} child {run.child} of {run.master} @{at(run.start_us)} {end}]"
        )
    return " ".join(said)
