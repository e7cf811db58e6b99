"""The commands of `prefork` that only look: queues, workers, list, show."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import orjson

from prefork.broker import admin, listing, survey
from prefork.broker.client import Client
from prefork.cli.connect import client_of
from prefork.cli.output import ago, megabytes, plain, print_json, print_table, shortened, span

Commands = Any  # argparse names the type of `add_subparsers` privately


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add these commands."""
    queues = commands.add_parser("queues", parents=[common], help="what each queue holds")
    queues.set_defaults(run=_queues)
    workers = commands.add_parser("workers", parents=[common], help="who works, on what, and since when")
    workers.set_defaults(run=_workers)
    listed = commands.add_parser("list", parents=[common], help="the tasks in a queue")
    listed.add_argument("queue", help="the queue's name")
    listed.add_argument("--state", choices=("pending", "scheduled", "active", "dead"), default="pending")
    listed.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default: 20, at most 10,000)")
    listed.add_argument("--offset", type=int, default=0, metavar="N", help="after how many (default: 0)")
    listed.set_defaults(run=_list)
    show = commands.add_parser("show", parents=[common], help="everything that is known of one task")
    show.add_argument("id", help="the task's id")
    show.set_defaults(run=_show)


def _queues(options: argparse.Namespace) -> int:
    client = client_of(options)
    reports = survey.queues(client)
    if options.json:
        print_json(reports)
    elif not reports:
        print(f"no queue was ever used under the prefix {client.prefix!r}; see `prefix` in the configuration")
    else:
        print_table(list(reports[0]), (list(report.values()) for report in reports))
    return 0


def _workers(options: argparse.Namespace) -> int:
    client = client_of(options)
    told = survey.workers(client)
    if options.json:
        print_json(told)
    elif not told:
        print("no worker holds a lease on any queue")
    else:
        head = ("host", "pid", "child", "state", "up", "memory", "runs", "id", "for")
        print_table(head, (row for worker in told for row in _worker_rows(worker)), elastic=("host", "runs"))
    return 0


def _worker_rows(worker: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    host, pid = worker["host"], str(worker["pid"])
    if not worker["answered"]:
        left_s = worker["lease_s"]
        ends = f"its lease ends in {span(left_s)}" if left_s > 0 else f"its lease ended {span(-left_s)} ago"
        yield host, pid, "-", "NO ANSWER", "-", "-", f"holds {worker['holds']}; {ends}", "-", "-"
        return
    state = "paused" if worker["paused"] else worker["phase"]
    children = f"{len(worker['children'])} of {worker['concurrency']}"
    up, memory = span(worker["uptime_s"]), megabytes(worker["rss_bytes"])
    yield host, pid, children, state, up, memory, ", ".join(worker["queues"]), "-", "-"
    if loop := worker["crash_loop"]:
        yield "", "-", "-", "CRASH LOOP", "", "", survey.crash_loop(loop), "-", "-"
    for child in worker["children"]:
        ran = span(child["running_s"]) if child["running_s"] is not None else "-"
        yield (
            "", str(child["pid"]), str(child["number"]), child["state"], "", megabytes(child["rss_bytes"]),
            child["task"], child["id"], ran,
        )  # fmt: skip


def _list(options: argparse.Namespace) -> int:
    client = client_of(options)
    queue = admin.known_queue(client, options.queue)
    limit, offset = min(max(options.limit, 1), 10_000), max(options.offset, 0)
    rows = listing.page(client, queue, options.state, offset, limit)
    if options.json:
        print_json(rows)
    elif not rows:
        print(f"nothing is {options.state} in queue {queue}" + (f" after {offset}" if offset else ""))
    else:
        _print_page(rows, options.state)
        _print_rest(client, queue, options.state, offset + len(rows))
    return 0


def _print_page(rows: list[dict[str, Any]], state: str) -> None:
    when = survey.MOMENTS[state]
    ranked = any(row.get("priority") for row in rows)
    middle = ("priority", "attempts") if ranked else ("attempts",)
    note = "worker" if state == "active" else "error"
    head = ("id", "task", *middle, when.removesuffix("_at"), note)
    print_table(head, (_row(row, when, ranked=ranked) for row in rows), elastic=("task", note))


def _row(row: dict[str, Any], when: str, *, ranked: bool) -> tuple[Any, ...]:
    call = f"{row['task']}({_arguments(row)})" if "task" in row else row.get("unreadable", "")
    errors = row.get("errors", [])
    note = f"{errors[-1].get('class', '')}: {errors[-1].get('message', '')}" if errors else ""
    if "worker" in row:
        host, pid = survey.whose(row["worker"])
        note = f"{host} pid {pid}"
    middle = (row.get("priority", 0),) if ranked else ()
    return row["id"], shortened(call, 48), *middle, row.get("attempts", 0), ago(row.get(when)), shortened(note, 40)


def _print_rest(client: Client, queue: str, state: str, shown: int) -> None:
    """How many there are beyond this page, if any."""
    there: int = getattr(survey.census(client, queue).report, state)
    if there > shown:
        print(f"… {there - shown:,} more; go on with --offset {shown}")


def _arguments(row: dict[str, Any]) -> str:
    words = [orjson.dumps(value).decode() for value in row["args"]]
    return ", ".join(words + [f"{name}={orjson.dumps(value).decode()}" for name, value in row["kwargs"].items()])


def _show(options: argparse.Namespace) -> int:
    known = survey.task(client_of(options), options.id)
    if options.json:
        print_json(known)
        return 0
    errors = known.pop("errors", [])
    width = max(map(len, known))
    for name, value in known.items():
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
        since = f"  ({ago(value)})" if name.endswith("_at") and value else ""
        print(plain(f"{name:{width}}  {text}{since}"))
    for error in errors:
        attempt = f"attempt {error['attempt']}: " if "attempt" in error else ""
        print(plain(f"\n{attempt}{error.get('class', '')}: {error.get('message', '')}"))
        if error.get("traceback"):
            print(plain(error["traceback"].rstrip()))
        if told := _of_its_child(error):
            print(plain(told))
        if error.get("stack"):
            print(plain(f"what it was doing:\n{error['stack'].rstrip()}"))
    return 0


def _of_its_child(error: dict[str, Any]) -> str:
    """What is known of the child that ran this attempt, in a line or two."""
    if "pid" not in error:
        return ""
    ended = f", {error['exit']}" if "exit" in error else ""
    seconds = {"ran": "ran_s", "CPU": "cpu_s", "CPU of its whole life": "child_cpu_s"}
    said = [f"{name} {error[key]:.3f} s" for name, key in seconds.items() if isinstance(error.get(key), int | float)]
    if isinstance(error.get("peak_bytes"), int):
        said.append(f"peak memory {megabytes(error['peak_bytes'])}")
    return f"its child, pid {error['pid']} on {error.get('host')}{ended}\n{', '.join(said)}"
