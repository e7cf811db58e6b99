"""Whether the server keeps what it is given: what it says of its memory, and of what it does when that is short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefork.broker.finding import Finding


def findings(info: dict[str, Any]) -> Iterator[Finding]:
    """Whether the server may throw tasks away, or run out of memory."""
    policy, limit, used = (
        info.get("maxmemory_policy", "noeviction"),
        info.get("maxmemory", 0),
        info.get("used_memory", 0),
    )
    if policy != "noeviction":
        # Only results, reports and requests have a time to live.
        lost = "results are thrown away before their time" if policy.startswith("volatile") else "tasks are thrown away"
        when = "when memory is short" if limit else "as soon as there is a maxmemory and it is reached"
        level = "error" if limit and not policy.startswith("volatile") else "warning"
        yield Finding(level, f"maxmemory-policy is {policy}: {when}, {lost}", "CONFIG SET maxmemory-policy noeviction")
    if limit and used > 0.8 * limit:
        yield Finding("warning", f"{used / limit:.0%} of maxmemory is used", "raise maxmemory, or drain the queues")
