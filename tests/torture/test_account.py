"""That the account finds what must not be, and explains only by what happened to those concerned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefork.torture.account import SECOND_US, Account, World
from prefork.torture.faults import Done
from prefork.torture.fleet import Life
from prefork.torture.ledger import NEVER, Run, Story

S = SECOND_US
OK = Run("id", 1, child=11, master=1, start_us=10 * S, end_us=11 * S, outcome="ok")
CUT = replace(OK, end_us=NEVER, outcome="")
ANOTHER = replace(OK, child=22, master=2, start_us=15 * S, end_us=16 * S)
TOLD = Story("0-1", "noop", asked_us=9 * S, answer="a", answered_us=10 * S, id="id")


def judge(
    *stories: Story, faults: tuple[Done, ...] = (), dead: tuple[str, ...] = (), failed: tuple[str, ...] = (),
    lives: tuple[Life, ...] = (), fences: tuple[tuple[int, int], ...] = (),
) -> Account:  # fmt: skip
    account = Account()
    world = World(faults, lives, fences, set(dead))
    account.take({story.tag: story for story in stories}, world, set(failed))
    return account


def test_what_ran_once_is_done() -> None:
    account = judge(replace(TOLD, runs=[OK]))
    assert (account.ok, account.accepted, account.done, account.runs, account.repeats) == (True, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("story", "dead", "found"),
    [
        (TOLD, (), "lost"),
        (replace(TOLD, runs=[CUT]), (), "lost"),
        (replace(TOLD, cancel="no", cancel_asked_us=9 * S, cancelled_us=10 * S), (), "lost"),
        (replace(TOLD, answer="r", id="", runs=[OK]), (), "refused, but ran"),
        (replace(TOLD, runs=[OK, replace(ANOTHER, id="other")]), (), "one enqueue, two messages"),
        (replace(TOLD, runs=[OK, ANOTHER]), (), "ran again, and nothing explains it"),
        (replace(TOLD, runs=[CUT, ANOTHER]), (), "ran again, and nothing explains it"),
        (replace(TOLD, runs=[replace(OK, outcome="crash")]), ("id",), "dead letter that should not be"),
        (replace(TOLD, kind="hopeless", runs=[OK]), (), "succeeded, but should not"),
        (
            replace(TOLD, kind="hopeless", runs=[replace(OK, outcome="RuntimeError")]), ("id",),
            "dead letter before it had failed so often",
        ),
        (
            replace(TOLD, cancel="yes", cancel_asked_us=9 * S, cancelled_us=9 * S, runs=[OK]), (),
            "ran after it was cancelled",
        ),
        (replace(TOLD, kind="parent:1:0", runs=[OK]), (), "lost follow-up"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_found(story: Story, dead: tuple[str, ...], found: str) -> None:
    account = judge(story, dead=dead)
    assert list(account.broken) == [found]
    assert "0-1" in account.findings[0]


@pytest.mark.parametrize(
    ("faults", "lives", "fences", "why"),
    [
        ((Done("child killed", 11, 11 * S, 11 * S),), (), (), "child killed"),
        ((Done("master killed", 1, 11 * S, 11 * S),), (), (), "master killed"),
        ((Done("master told TERM", 1, 5 * S, 5 * S),), (), (), "master told TERM"),
        ((), (Life(1, 0, 12 * S, -9),), (), "worker ended"),
        ((), (), ((1, 12 * S),), "lease lost"),
        ((), (), ((2, 15 * S),), "lease lost"),  # the second one stood still, and was a moment late to know
        ((), (), ((2, 25 * S),), ""),
        ((Done("child killed", 12, 11 * S, 11 * S),), (), (), ""),  # another one
        ((Done("child killed", 11, 3 * S, 3 * S),), (), (), ""),  # before it began
        ((Done("child killed", 11, 20 * S, 20 * S),), (), (), ""),  # after the second run had begun
        ((Done("master told USR1", 1, 11 * S, 11 * S),), (), (), ""),  # costs nothing
        ((Done("connections cut", 0, 11 * S, 11 * S),), (), (), ""),  # settled later: no reason to run again
    ],
)
def test_a_second_run_is_explained_by_what_met_the_first(
    faults: tuple[Done, ...], lives: tuple[Life, ...], fences: tuple[tuple[int, int], ...], why: str
) -> None:
    account = judge(replace(TOLD, runs=[CUT, ANOTHER]), faults=faults, lives=lives, fences=fences)
    assert dict(account.explained) == ({why: 1} if why else {})
    assert account.ok == bool(why)


def test_what_the_task_asked_for_is_no_repeat() -> None:
    failed = replace(OK, outcome="RuntimeError")
    account = judge(replace(TOLD, kind="flaky", runs=[failed, replace(ANOTHER, attempt=2)]))
    assert (account.ok, account.repeats, account.runs) == (True, 0, 2)
    assert not judge(replace(TOLD, kind="flaky", runs=[failed, ANOTHER])).ok  # the failure was not counted


def test_a_task_without_a_result_may_run_again_if_the_reply_to_its_enqueue_was_lost() -> None:
    cut = Done("connections cut", 0, 10 * S, 10 * S)
    quick = replace(TOLD, asked_us=10 * S, answered_us=10 * S + S // 2, runs=[OK, replace(ANOTHER, start_us=13 * S)])
    assert judge(quick, faults=(cut,)).explained == {"reply to enqueue lost": 1}
    assert not judge(quick).ok
    late = replace(quick, answered_us=14 * S)
    assert judge(late).explained == {"reply to enqueue lost": 1}  # the producer has asked twice
    assert not judge(replace(late, kind="nap"), faults=(cut,)).ok  # its result says that it was accepted


def test_children_that_faults_have_killed_too_often_make_a_dead_letter() -> None:
    runs = [replace(CUT, attempt=n, child=10 + n, start_us=n * 10 * S) for n in (1, 2, 3)]
    kills = tuple(Done("child killed", 10 + n, (n * 10 + 1) * S, (n * 10 + 1) * S) for n in (1, 2, 3))
    account = judge(replace(TOLD, runs=runs), faults=kills, dead=("id",))
    assert (account.ok, account.crash_letters, account.lost) == (True, 1, 0)
    assert not judge(replace(TOLD, runs=runs), faults=kills[:1], dead=("id",)).ok


def test_follow_ups_are_held_against_their_parent() -> None:
    parent = replace(TOLD, kind="parent:1:1", runs=[OK])
    heir, guest = (Story(f"0-1/{name}-0", runs=[replace(ANOTHER, id=name)]) for name in ("heir", "guest"))
    account = judge(parent, heir, guest)
    assert (account.ok, account.follow_ups) == (True, 2)
    assert list(judge(parent, heir).broken) == ["lost follow-up"]
    twice = replace(guest, runs=[*guest.runs, replace(ANOTHER, id="guest again", start_us=20 * S)])
    assert list(judge(parent, heir, twice).broken) == ["follow-up enqueued twice"]
    killed = (Done("master killed", 1, 11 * S, 11 * S),)
    assert judge(parent, heir, twice, faults=killed).ok
    rerun = replace(guest, runs=[*guest.runs, replace(ANOTHER, id="guest", start_us=20 * S)])
    assert judge(parent, heir, rerun, faults=killed).ok  # it keeps no result that would tell
    assert not judge(parent, heir, rerun).ok
    heirs = replace(heir, runs=[*heir.runs, replace(ANOTHER, id="heir again", start_us=20 * S)])
    assert not judge(parent, heirs, guest, faults=killed).ok  # one script settles the parent and enqueues these


def test_a_kept_result_has_to_be_that_of_the_success() -> None:
    story = replace(TOLD, kind="nap", runs=[OK])
    assert judge(story).ok
    assert list(judge(story, failed=("id",)).broken) == ["result of a success is missing or another one"]
