"""Some tests of whole workers run twice: once more without the compiled part, where it is built."""

from __future__ import annotations

import pytest

from prefork.worker import fast

BOTH = {
    "test_a_message_goes_its_whole_way",
    "test_a_child_that_dies_charges_only_what_it_was_running",
    "test_a_child_killed_from_outside_is_replaced_at_once_and_its_message_runs_again",
    "test_deaths_of_one_child_leave_the_tasks_of_others_alone",
    "test_a_soft_timeout_is_an_exception_in_the_task",
    "test_a_soft_timeout_is_over_with_its_task",
    "test_a_task_within_its_deadline_is_left_alone_also_after_many",
    "test_children_are_recycled_after_their_share_and_nothing_is_lost",
    "test_titles_tell_who_is_who",
    "test_burst_drains_several_queues_and_follow_ups_too",
    "test_a_child_that_has_grown_is_replaced_after_its_task",
    "test_short_tasks_end_and_those_not_started_go_back_in_order",
    "test_a_running_task_that_is_cancelled_is_told_and_ends",
    "test_what_waits_in_a_child_is_cancelled_without_harm_to_what_runs",
    "test_what_keeps_no_result_is_done_once_whatever_happens_beside_it",
    "test_what_keeps_no_result_can_be_cancelled_amid_its_run",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ in BOTH:
        metafunc.parametrize("part", ["pure", "compiled"], indirect=True)


@pytest.fixture(autouse=True)
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the workers that a test starts: as it is, or for one of the two."""
    name = getattr(request, "param", "")
    if name == "compiled" and fast.built is None:
        pytest.skip("the compiled part is not built here")
    if name:
        monkeypatch.setenv("PREFORK_PURE", "1" if name == "pure" else "0")
