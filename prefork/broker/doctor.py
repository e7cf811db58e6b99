"""What an operator should know before the users do: findings, each with its remedy. Changes nothing by itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefork.broker import keyspace, memory, survey, verbs
from prefork.broker.audit import MOST_MESSAGES, Audit
from prefork.broker.client import Client
from prefork.broker.finding import Finding
from prefork.broker.upkeep import Upkeep

CLOCK_OFF_S = 2.0
SLOW_PING_MS = 20.0
LEAST_PIPE_PAGES = 16_384
GRACE_S = 5.0  # for living workers to come back after an outage in which their leases have ended
NO_DEAD_LETTERS = 1 << 53  # how many deaths make one is known to the workers


def examine(client: Client) -> Iterator[Finding]:
    """Look at the server, then at each queue."""
    info = client.info()
    yield from _server(client, info)
    yield from memory.findings(info)
    yield from _persistence(info)
    yield from _here()
    there = keyspace.look(client)
    yield from there.findings
    if there.broken:
        return  # the scripts fail on such keys
    for queue in sorted(there.listed | there.queues):
        yield from _queue(client, queue, there.holders.get(queue, []))
    yield from _workers(client)


def _server(client: Client, info: dict[str, Any]) -> Iterator[Finding]:
    name, _ = verbs.version_of(info)
    ping_ms = min(client.ping_ms() for _ in range(5))  # a busy host is late now and then, a far one each time
    slow = ping_ms > SLOW_PING_MS
    remedy = "put workers and broker into the same network" if slow else ""
    yield Finding("warning" if slow else "ok", f"{client.shown} is {name}, a round trip takes {ping_ms:.1f} ms", remedy)
    if info.get("role") not in (None, "master"):
        yield Finding("error", "it is a replica, which takes no writes", "name the primary in the broker URL")
    if off_s := _clock_off_s(client):
        yield Finding(
            "warning",
            f"its clock is {off_s:+.1f} s off this host's; prefork goes by the server's, people by both",
            "let both hosts follow a time server",
        )


def _clock_off_s(client: Client) -> float:
    before = time.time()
    seconds, micros = client.time()
    off_s = seconds + micros / 1e6 - (before + time.time()) / 2
    return off_s if abs(off_s) > CLOCK_OFF_S else 0.0


def _persistence(info: dict[str, Any]) -> Iterator[Finding]:
    if not info.get("aof_enabled"):
        yield Finding(
            "warning",
            "the append-only file is off: a restart of the server loses what came after its last snapshot",
            "CONFIG SET appendonly yes",
        )
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield Finding("error", "the append-only file cannot be written", "look at the server's log and its disk")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield Finding("error", "the last snapshot failed", "look at the server's log and its disk")


def _here() -> Iterator[Finding]:
    soft = Path("/proc/sys/fs/pipe-user-pages-soft")
    if sys.platform == "linux" and soft.exists() and 0 < (pages := int(soft.read_text())) < LEAST_PIPE_PAGES:
        yield Finding(
            "warning",
            f"this host gives a user {pages} pages for pipes: with many children they are small, and slower",
            f"sysctl fs.pipe-user-pages-soft={LEAST_PIPE_PAGES}",
        )


def _workers(client: Client) -> Iterator[Finding]:
    for worker in survey.workers(client):
        if loop := worker.get("crash_loop"):
            yield Finding(
                "error",
                f"worker pid {worker['pid']} on {worker['host']}: {survey.crash_loop(loop)}",
                "its log has the traceback; mend on_child_start, or what its children load, and restart it",
                "crash_loop",
            )


def _queue(client: Client, name: str, holders: list[str]) -> Iterator[Finding]:
    counted = survey.census(client, name)
    report, sound = counted.report, True
    audit = Audit(client, name, holders)
    for finding in (*Upkeep(client, name, holders).findings(), *audit.findings()):
        sound = False
        yield finding
    if sound and audit.looked_at:
        yield Finding("ok", f"queue {name}: {audit.looked_at:,} messages, each in exactly one place")
    placed = report.pending + report.scheduled + report.active + report.dead
    if counted.messages > MOST_MESSAGES:
        yield Finding(
            "ok" if placed == counted.messages else "warning",
            f"queue {name}: more than {MOST_MESSAGES:,} messages are not looked at one by one; there are "
            f"{counted.messages:,}, and {placed:,} in the places where they may be",
            "" if placed == counted.messages else "drain the queue, then look again",
        )
    ended = [worker for worker, ends_ms in counted.leases.items() if ends_ms < counted.now_ms]
    if ended:
        sound = False
        k = client.keys(name)
        seen_s = time.monotonic()
        held = sum(client.read("ZCARD", k.active(worker)) for worker in ended)

        def take_over() -> str:
            time.sleep(max(0.0, seen_s + GRACE_S - time.monotonic()))  # once, however many queues there are
            moved = [
                client.call(verbs.restore(k, worker, "unmoved", [str(counted.leases[worker])], NO_DEAD_LETTERS))
                for worker in ended
            ]
            gone = [it for it in moved if it >= 0]
            back = f"; {len(moved) - len(gone)} were back" if len(gone) < len(moved) else ""
            return f"queue {name}: taken over from {len(gone)} workers; {sum(gone)} messages put back{back}"

        host, pid = survey.whose(ended[0])
        yield Finding(
            "error" if held else "warning",
            f"queue {name}: the leases of {len(ended)} workers have ended, first that of pid {pid} on {host}; "
            f"they hold {held} tasks, which wait",
            "start a worker on this queue: it takes over; or prefork doctor --repair does",
            "lease_ended",
            name,
            take_over,
        )
    if report.pending and not counted.leases:
        sound = False
        yield Finding(
            "warning",
            f"queue {name}: {report.pending} tasks wait, and no worker listens",
            "start a worker on this queue",
        )
    if report.paused:
        sound = False
        yield Finding(
            "warning",
            f"queue {name} is paused, {report.pending} tasks wait",
            f"prefork resume {name}, when it may run again",
        )
    if sound:
        yield Finding(
            "ok",
            f"queue {name}: {report.pending} pending, {report.scheduled} scheduled, {report.active} active, "
            f"{report.dead} dead, {len(counted.leases)} workers",
        )
