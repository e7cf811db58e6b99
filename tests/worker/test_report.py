"""What a worker says of itself, apart from whole workers."""

from __future__ import annotations

import importlib.metadata

import pytest

from prefork.worker.report import Report


def report() -> Report:
    return Report(*[None] * 6)  # type: ignore[arg-type]


def test_a_package_that_is_being_replaced_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a new version is installed where the old one runs, and somebody asks."""

    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    it = report()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", gone)
        assert it._told_version() == "unknown"
    assert it._told_version() == importlib.metadata.version("prefork")
    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert it._told_version() != "unknown"
