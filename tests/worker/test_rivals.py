"""Which leases of others have ended: two clocks, and patience after what all suffered together."""

from __future__ import annotations

from prefork.worker.rivals import Rivals

T = 1_764_000_000_000
HOURS = 3 * 3_600_000


def beats(rivals: Rivals, *told: tuple[float, int, int]) -> list[list[tuple[str, int, bool]]]:
    """(our clock, server's clock, end of the other's lease), each: what is to be taken over."""
    return [rivals.judge("q", T + now_ms, at_s, [("other", T + end_ms)]) for at_s, now_ms, end_ms in told]


def test_one_that_has_ended_is_found_at_the_first_beat() -> None:
    assert beats(Rivals(9), (5, 0, -1)) == [[("other", T - 1, False)]]
    assert beats(Rivals(9), (5, 0, 1)) == [[]]


def test_one_that_ends_between_two_beats_is_found_at_the_second() -> None:
    assert beats(Rivals(9), (5, 0, 2000), (8, 3000, 2000)) == [[], [("other", T + 2000, False)]]


def test_after_a_gap_in_our_own_beats_the_others_have_a_lease_to_come_back() -> None:
    seen = beats(Rivals(9), (5, 0, 9000), (25, 20_000, 9000), (28, 23_000, 9000), (33.9, 28_900, 9000))
    assert seen == [[], [], [], []]
    rivals = Rivals(9)
    seen = beats(rivals, (5, 0, 9000), (25, 20_000, 9000), (28, 23_000, 9000), (31, 26_000, 9000), (34, 29_000, 9000))
    assert seen[-1] == [("other", T + 9000, False)]


def test_after_a_leap_of_the_servers_clock_too() -> None:
    ahead = beats(Rivals(9), (5, 0, 9000), (8, HOURS, 9000), (11, HOURS + 3000, HOURS + 10_000))
    assert ahead == [[], [], []], "it has renewed"
    dead = beats(Rivals(9), *[(5, 0, 9000)], *[(8 + n * 3, HOURS + n * 3000, 9000) for n in range(4)])
    assert dead == [[], [], [], [], [("other", T + 9000, False)]]


def test_one_that_stands_unmoved_has_ended_though_the_servers_clock_went_back() -> None:
    seen = beats(Rivals(9), (5, 0, 9000), *[(8 + n * 3, n * 3000 - HOURS, 9000) for n in range(4)])
    assert seen == [[], [], [], [], [("other", T + 9000, True)]]


def test_one_that_renews_after_the_clock_went_back_has_not() -> None:
    told = [(8 + n * 3, n * 3000 - HOURS, n * 3000 + 9000 - HOURS) for n in range(20)]
    assert beats(Rivals(9), (5, 0, 9000), *told) == [[]] * 21


def test_one_that_was_first_seen_after_the_clock_went_back_waits_for_an_hour_at_most() -> None:
    told = [(5 + n * 3, n * 3000, HOURS) for n in range(1300)]
    seen = beats(Rivals(9), *told)
    assert seen.index([("other", T + HOURS, True)]) == 1201


def test_each_queue_counts_for_itself() -> None:
    rivals = Rivals(9)
    assert rivals.judge("a", T, 5, [("other", T + 1000)]) == []
    assert rivals.judge("b", T, 5, [("other", T + 5000)]) == []
    assert rivals.judge("a", T + 3000, 8, [("other", T + 1000)]) == [("other", T + 1000, False)]
    assert rivals.judge("b", T + 3000, 8, [("other", T + 5000)]) == []
