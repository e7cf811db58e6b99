"""What processes and the server have used: read from /proc and INFO, not from their own words."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import redis

TICKS = os.sysconf("SC_CLK_TCK")
GONE = (OSError, ValueError, psutil.NoSuchProcess)
RUN_SCRIPTS = {"evalsha", "eval", "evalsha_ro", "eval_ro", "fcall", "fcall_ro"}
# What no script may call, or has no use for: with scripts around, these alone are known to have come from clients.
FROM_CLIENTS = {"bzpopmin", "bzmpop", "blpop", "brpop", "blmove", "blmpop", "xread", "multi", "exec", "hello", "ping"}


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of CPU of these processes, to the nanosecond, and of the children that they have reaped, to the tick."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(*GONE):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(*GONE):
                    total += int((thread / "schedstat").read_text().split()[0]) / 1e9
            reaped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]
            total += sum(map(int, reaped)) / TICKS
    return total


def busy_s() -> float:
    """Seconds of CPU that this machine has spent on anything, and has been denied by its host."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def switches(pids: Iterable[int]) -> int:
    """How often these have gone to sleep of their own will: each is a wake-up."""
    total = 0
    for pid in pids:
        with contextlib.suppress(*GONE):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                status = (thread / "status").read_text()
                total += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


def pss_bytes(pids: Iterable[int]) -> int:
    """Memory of these, each shared page by its share."""
    total = 0
    for pid in pids:
        with contextlib.suppress(*GONE):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
    return total


class Load:
    """What a server has done until now; the difference of two says what it did in between."""

    def __init__(self, client: redis.Redis) -> None:
        cpu: Any = client.info("cpu")
        calls: Any = client.info("commandstats")
        self.cpu_s = float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])
        self.calls = {name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in calls.items()}

    def since(self, before: Load) -> tuple[float, int, int]:
        """-> seconds of CPU, commands that clients have sent, and all, with those that scripts have called"""
        calls = {name: count - before.calls.get(name, 0) for name, count in self.calls.items()}
        calls["info"] = 0  # ours
        top = all_of_them = sum(calls.values())
        if any(calls.get(name) for name in RUN_SCRIPTS):
            top = sum(count for name, count in calls.items() if name in RUN_SCRIPTS | FROM_CLIENTS)
        return self.cpu_s - before.cpu_s, top, all_of_them


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
