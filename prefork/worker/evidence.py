"""What is kept of a child's death, beside exit status and stack: where, how large, and whether the kernel did it."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path
from typing import Any

from prefork.worker.slate import STACK_SIGNAL

CGROUP = Path("/proc/self/cgroup")
OOM_KILLS = re.compile(r"^oom_kill ([0-9]+)$", re.MULTILINE)


class OutOfMemory:
    """The kernel's own count of what it has killed in this worker's cgroup, where that can be read."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup")) -> None:
        self._events = _events(root)
        self._before = self._count()

    def has_struck(self) -> bool:
        """Whether it has killed anything that this was not said of yet. To be asked of what died by SIGKILL alone."""
        if self._count() <= self._before:
            return False
        self._before += 1
        return True

    def _count(self) -> int:
        try:
            found = OOM_KILLS.search(self._events.read_text()) if self._events else None
        except OSError:
            return 0
        return int(found[1]) if found else 0


def _events(root: Path) -> Path | None:
    """The file with the count: of version 2, or of version 1."""
    try:
        lines = [line.split(":", 2) for line in CGROUP.read_text().splitlines()]
    except OSError:
        return None
    for _, kind, at in lines:
        if kind == "" or "memory" in kind.split(","):
            mount, name = (root, "memory.events") if kind == "" else (root / "memory", "memory.oom_control")
            own = mount / at.lstrip("/")
            file = (own if own.is_dir() else mount) / name  # a container may see its own as the root
            if file.exists():
                return file
    return None


def without_stack(pid: int) -> str:
    """Why a child does not tell its Python stack, and what the kernel says that it does."""
    facts = _facts(pid)
    try:
        why = _not_heard(facts)
    except (KeyError, ValueError):
        return ""
    held = _wchan(pid)
    return f"no Python stack: {why}{facts['Name']} is in state {facts['State']}{held and f', in the kernel at {held}'}"


def awaits_core(pid: int) -> bool:
    """Whether a child that was asked for its stack will tell it as soon as it gets a core to run on."""
    facts = _facts(pid)
    try:
        return facts["State"].startswith("R") and not _not_heard(facts)
    except (KeyError, ValueError):
        return False


def ran_ns(pid: int) -> int:
    """For how long a process has had a core; -1 where the kernel does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return -1


def _facts(pid: int) -> dict[str, str]:
    """What the kernel says of a process, where it can be asked."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines()  # a name may be cut short
    except OSError:
        return {}
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def _not_heard(facts: dict[str, str]) -> str:
    """Why a child does not hear that it is asked for its stack, if so."""
    bit = 1 << (STACK_SIGNAL - 1)
    names = "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"
    blocked, ignored, caught, *pending = (int(facts[name], 16) & bit for name in names)
    if blocked and any(pending):  # else it is being handled, and blocked for as long
        return "its task blocks the signal that asks for one; "
    if ignored:
        return "its task ignores the signal that asks for one; "
    return "" if caught else "its task has taken the handler away, or is another program now; "


def _wchan(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text().strip("0")
    return ""


def of_death(pid: int, how: str, peak_kib: int, cpu_s: float, stack: str) -> dict[str, Any]:
    """What goes into the message's record of this attempt, for `prefork show`."""
    known: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "exit": how, "peak_bytes": peak_kib << 10}
    known["child_cpu_s"] = round(cpu_s, 3)
    return known | {"stack": stack} if stack else known


def of_failure(pid: int, cpu_s: float, peak_kib: int) -> dict[str, Any]:
    """The same of an attempt that its child has outlived: what an exception left behind."""
    return {"host": socket.gethostname(), "pid": pid, "cpu_s": round(cpu_s, 3), "peak_bytes": peak_kib << 10}
