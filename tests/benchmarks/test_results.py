"""What is made of the values of many rounds: ratios, verdicts, the chart."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from benchmarks.__main__ import verdict
from benchmarks.chart import svg
from benchmarks.results import Results, Summary
from benchmarks.rows import ROWS
from benchmarks.rows.row import Figure
from benchmarks.table import shown


def rounds(**sides: list[float | None]) -> Results:
    values = {name: [None if one is None else {"rate": one} for one in several] for name, several in sides.items()}
    return Results(ROWS["throughput-2"], values)


def test_ratios_are_taken_within_a_round() -> None:
    results = rounds(limit=[100.0, 10.0, 50.0], prefork=[50.0, 6.0, 20.0])
    assert results.ratios("rate", "limit") == [0.5, 0.6, 0.4]


def test_a_round_that_failed_on_one_side_is_in_no_ratio() -> None:
    results = rounds(limit=[100.0, None], prefork=[50.0, 6.0])
    summary = results.of(Figure("rate", "of the limit", ">= 0.5", "", "limit"))
    assert summary == Summary([0.5], ">= 0.5")
    assert summary.good


def test_the_best_peer_of_each_round_counts_and_the_limit_is_none() -> None:
    results = rounds(limit=[900.0, 900.0], prefork=[10.0, 10.0], celery=[1.0, 5.0], huey=[2.0, None])
    assert results.ratios("rate", "most") == [5.0, 2.0]
    assert results.ratios("rate", "least") == [10.0, 2.0]


def test_a_figure_against_nobody_who_was_there_is_left_out() -> None:
    results = rounds(limit=[100.0], prefork=[50.0])
    assert results.of(Figure("rate", "of Celery's", ">= 60", "", "celery")) is None
    assert results.of(Figure("rate", "of the fastest peer's", ">= 5", "", "most")) is None


@pytest.mark.parametrize(
    ("target", "good"), [(">= 2", True), ("> 2", False), ("<= 2", True), ("< 2", False), ("", None)]
)
def test_the_median_decides(target: str, good: bool | None) -> None:
    assert Summary([1.0, 9.0, 2.0], target).good is good


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (99.96, "100.0"), (123456.0, "123,456"), (math.nan, "-")],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert shown(value) == text


def test_the_chart_is_xml_with_a_bar_for_each_side() -> None:
    root = ElementTree.fromstring(svg([rounds(limit=[100.0], prefork=[50.0, 60.0], huey=[None])]))
    bars = [rect.get("class") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars == ["limit", "prefork"]


def test_what_was_measured_for_one_side_only_has_no_chart() -> None:
    assert svg([rounds(prefork=[50.0])]) == ""


def test_each_figure_has_a_target_that_can_be_judged() -> None:
    for row in ROWS.values():
        for figure in row.figures:
            Summary([1.0], figure.target).good  # noqa: B018


@pytest.mark.parametrize(
    ("rate", "cpu_us", "others", "good", "word"),
    [
        (50.0, 20.0, 2.0, True, "so time counts"),
        (30.0, 20.0, 2.0, False, "so time counts"),
        (30.0, 20.0, 40.0, True, "so CPU counts"),
        (90.0, 40.0, 40.0, False, "so CPU counts"),
        (10.0, 90.0, 80.0, True, "too much to judge"),
    ],
)
def test_the_guard_goes_by_time_or_by_cpu(rate: float, cpu_us: float, others: float, good: bool, word: str) -> None:
    mine = {"rate": rate, "cpu_us": cpu_us, "others": others}
    limit = {"rate": 100.0, "cpu_us": 10.0, "others": 0.0}
    judged, said = verdict(Results(ROWS["throughput-2"], {"limit": [limit], "prefork": [mine]}))
    assert judged is good
    assert word in said
