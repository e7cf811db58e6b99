"""That the ledger keeps each word, whoever is killed in the middle of one."""

from __future__ import annotations

from pathlib import Path

from prefork.torture.ledger import NEVER, Pen, Run, Story, root, stories


def all_stories(folder: Path) -> dict[str, Story]:
    return {tag: story for part in stories(folder) for tag, story in part.items()}


def test_what_producers_and_children_write_comes_together(tmp_path: Path) -> None:
    load, first, second = (Pen(tmp_path, name) for name in ("load-0", "run-1", "run-2"))
    load.write_all("t", [("0-1", "noop"), ("0-2", "parent:1:0")])
    load.write_all("a", [("0-1", "x"), ("0-2", "y")])
    load.write("c", "0-1", "no-running", 5)
    first.write("p", 11, 1)
    first.write("s", "0-1", "x", 1)
    first.write("e", "0-1", "ok")
    first.write("s", "0-2", "y", 1)
    second.write("p", 22, 2)
    second.write("s", "0-2", "y", 2)
    second.write("e", "0-2", "ok")
    second.write("s", "0-2/heir-0", "z", 1)
    second.write("e", "0-2/heir-0", "ok")
    found = all_stories(tmp_path)
    assert set(found) == {"0-1", "0-2", "0-2/heir-0"}
    assert (found["0-1"].answer, found["0-1"].id, found["0-1"].cancel) == ("a", "x", "no-running")
    assert found["0-1"].cancel_asked_us == 5 < found["0-1"].cancelled_us < NEVER
    cut, whole = found["0-2"].runs
    assert (cut.child, cut.master, cut.cut, cut.outcome) == (11, 1, True, "")
    assert (whole.child, whole.attempt, whole.cut, whole.outcome) == (22, 2, False, "ok")
    assert root("0-2/heir-0") == "0-2"


def test_a_line_that_a_kill_has_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "run-1.log").write_text("p 11 1 100\ns 0-1 x 1 200\ne 0-1 o")
    assert all_stories(tmp_path)["0-1"].runs == [Run("x", 1, 11, 1, 200)]
