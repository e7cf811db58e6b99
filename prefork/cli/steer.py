"""The commands of `prefork` that change something: enqueue, cancel, retry, delete, purge, pause, resume."""

from __future__ import annotations

import argparse
import difflib
import json
from datetime import timedelta
from typing import Any

import orjson

from prefork import config
from prefork.broker import admin, survey
from prefork.cli.confirm import confirm, counted
from prefork.cli.connect import app_of, client_of
from prefork.cli.load import signer_of
from prefork.cli.output import plain, print_json
from prefork.cli.stop import ASKED, DEFAULT_PATIENCE_S, ENDED, stop, whom
from prefork.errors import (
    TEN_YEARS_S,
    BrokerError,
    InvalidArguments,
    PreforkError,
    ResultUnavailable,
    TaskFailed,
    UnknownTask,
    WaitTimeout,
)

Commands = Any


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add these commands."""
    enqueue = commands.add_parser("enqueue", parents=[common], help="enqueue a task")
    enqueue.add_argument("task", metavar="NAME", help="its name, such as shop.tasks.send_invoice")
    enqueue.add_argument("--args", default="[]", metavar="JSON", help="positional arguments, such as '[7, \"a\"]'")
    enqueue.add_argument("--kwargs", default="{}", metavar="JSON", help="named arguments, such as '{\"copy\": true}'")
    enqueue.add_argument("--queue", metavar="NAME", help="in place of the task's own; without -c: default")
    enqueue.add_argument("--priority", type=int, metavar="N", help="-100 to 100, higher ones first")
    enqueue.add_argument("--delay", type=float, metavar="S", help="seconds until it may run")
    enqueue.add_argument("--wait", type=float, metavar="S", help="wait so long for its end, and print its result")
    enqueue.set_defaults(run=_enqueue)
    cancel = commands.add_parser("cancel", parents=[common], help="cancel tasks: what waits at once, what runs is told")
    cancel.add_argument(
        "--wait", type=float, default=DEFAULT_PATIENCE_S, metavar="S",
        help="how long to wait for the end of what runs (default: %(default)g; 0: only ask)",
    )  # fmt: skip
    cancel.set_defaults(run=_cancel)
    retry = commands.add_parser("retry", parents=[common], help="let dead letters run again")
    retry.add_argument("--dead", metavar="QUEUE", help="all dead letters of that queue")
    retry.set_defaults(run=_retry)
    delete = commands.add_parser("delete", parents=[common], help="delete tasks that do not run, and their results")
    delete.set_defaults(run=_delete)
    for parser, least in ((cancel, "+"), (retry, "*"), (delete, "+")):
        parser.add_argument("ids", nargs=least, metavar="ID", help="the tasks' ids")
    purge = commands.add_parser("purge", parents=[common], help="delete all that waits in a queue")
    purge.add_argument("--state", choices=("pending", "scheduled", "dead"), help="only that; default: what waits, and "
                       "what is scheduled")  # fmt: skip
    purge.set_defaults(run=_purge)
    pause = commands.add_parser("pause", parents=[common], help="let no worker claim from a queue")
    resume = commands.add_parser("resume", parents=[common], help="let workers claim from it again")
    pause.set_defaults(run=lambda options: _pause(options, on=True))
    resume.set_defaults(run=lambda options: _pause(options, on=False))
    for parser in (purge, pause, resume):
        parser.add_argument("queue", metavar="QUEUE", help="the queue's name")
    for parser in (retry, delete, purge):
        parser.add_argument("--yes", action="store_true", help="do not ask whether to do it")


# -- enqueue ----------------------------------------------------------------------------------------------------------


def _enqueue(options: argparse.Namespace) -> int:
    args, kwargs = _json(options.args, "--args", list), _json(options.kwargs, "--kwargs", dict)
    app = app_of(options)
    if app is None:
        client = client_of(options)
        from prefork.app import Prefork

        app = Prefork("prefork", client.url, prefix=client.prefix)
        if options.config:
            app.signer = signer_of(config.load(options.config, {}, require_app=False))
        task = app.task(name=options.task)(lambda *args, **kwargs: None)
    elif options.task in app.tasks:
        task = app.tasks[options.task]
    else:
        by_last = {name.rpartition(".")[2]: name for name in app.tasks}
        near = difflib.get_close_matches(options.task, app.tasks, n=1)
        near += [by_last[last] for last in difflib.get_close_matches(options.task.rpartition(".")[2], by_last, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(app.tasks)[:20])}"
        raise UnknownTask(f"there is no task {options.task!r}; {hint}")
    after = None if options.delay is None else timedelta(seconds=_seconds(options.delay, "--delay"))
    patience_s = None if options.wait is None else _seconds(options.wait, "--wait")
    if patience_s is not None and app.result_ttl_ms(options.task) == 0:
        raise InvalidArguments(f"{options.task} keeps no result to wait for: its result_ttl is 0; leave --wait out")
    given = {"queue_name": options.queue, "priority": options.priority, "run_after": after}
    if chosen := {name: value for name, value in given.items() if value is not None}:
        task = task.using(**chosen)
    result = task.enqueue(*args, **kwargs)
    known: dict[str, Any] = {"id": result.id, "queue": result.queue_name}
    if patience_s is None:
        print_json(known) if options.json else print(result.id)
        return 0
    try:
        value = result.wait(timeout=patience_s)
    except (TaskFailed, WaitTimeout, ResultUnavailable, BrokerError) as error:
        if options.json:
            print_json(known | {"error": str(error)})
        if isinstance(error, BrokerError):  # which doesn't tell what it is about
            raise BrokerError(f"{task.name} {result.id} was accepted, and then: {error}") from None
        raise
    print_json(known | {"value": value}) if options.json else print(orjson.dumps(value).decode())
    return 0


def _seconds(value: float, flag: str) -> float:
    if not 0 <= value <= TEN_YEARS_S:
        raise InvalidArguments(f"{flag} {value:g}: give seconds, from 0 to {TEN_YEARS_S:,}")
    return value


def _json(text: str, flag: str, kind: type) -> Any:
    try:
        orjson.loads(text)
        value = json.loads(text)  # which leaves an integer of more than 64 bits one, to be refused
    except (ValueError, RecursionError) as error:
        raise InvalidArguments(f"{flag} is not JSON ({error}): {text[:60]!r}") from None
    if not isinstance(value, kind):
        raise InvalidArguments(f"{flag} must be a JSON {'list' if kind is list else 'object'}, not {text[:60]!r}")
    return value


# -- messages ---------------------------------------------------------------------------------------------------------


def _cancel(options: argparse.Namespace) -> int:
    client = client_of(options)
    said = stop(client, options.ids, _seconds(options.wait, "--wait"))
    if options.json:
        print_json(said)
    else:
        for it in said:
            verb = "ran" if it["outcome"] in ENDED else "runs"
            where = f" (it {verb} in {whom(it['worker'])})" if "worker" in it else ""
            print(plain(f"{it['id']}  {it['outcome']}{where}"))
    good = ENDED if options.wait else (*ENDED, ASKED)
    return 0 if all(it["outcome"] in good for it in said) else 1


def _retry(options: argparse.Namespace) -> int:
    if bool(options.ids) == bool(options.dead):
        raise PreforkError("give the ids of dead letters, or --dead QUEUE for all of it")
    client = client_of(options)
    if options.dead:
        queue = admin.known_queue(client, options.dead)
        count = survey.census(client, queue).report.dead
        if count:
            confirm(options, f"let {counted(count, 'dead letter')} of queue {queue} run again")
        return _counted(options, "revived", admin.retry_dead(client, queue))
    said = {}
    for id in options.ids:
        queue_name = survey.queue_of(client, id)
        revived = queue_name is not None and admin.retry(client, queue_name, [id])
        said[id] = "pending" if revived else "unknown" if queue_name is None else "not a dead letter"
    return _report(options, said, ("pending",))


def _delete(options: argparse.Namespace) -> int:
    client = client_of(options)
    confirm(options, f"delete {counted(len(options.ids), 'task')} for good")
    said = {}
    for id in options.ids:
        queue = survey.queue_of(client, id)
        answer = admin.delete(client, queue, id) if queue is not None else ""
        said[id] = "running; cancel it first" if answer == "running" else answer or "unknown"
    return _report(options, said, ("deleted",))


def _report(options: argparse.Namespace, said: dict[str, str], good: tuple[str, ...]) -> int:
    if options.json:
        print_json([{"id": id, "outcome": outcome} for id, outcome in said.items()])
    else:
        for id, outcome in said.items():
            print(plain(f"{id}  {outcome}"))
    return 0 if all(outcome in good for outcome in said.values()) else 1


# -- queues -----------------------------------------------------------------------------------------------------------


def _purge(options: argparse.Namespace) -> int:
    client = client_of(options)
    queue = admin.known_queue(client, options.queue)
    places = (options.state,) if options.state else ("pending", "scheduled")
    report = survey.census(client, queue).report
    count = sum(getattr(report, place) for place in places)
    if count:
        confirm(options, f"delete {counted(count, 'task')} ({' and '.join(places)}) of queue {queue} for good")
    return _counted(options, "deleted", admin.purge(client, queue, places))


def _pause(options: argparse.Namespace, *, on: bool) -> int:
    client = client_of(options)
    queue = admin.known_queue(client, options.queue)
    changed = admin.pause(client, queue, on=on)
    if options.json:
        print_json({"queue": queue, "paused": on, "changed": changed})
    else:
        state = "paused: nothing is claimed from it until `prefork resume`" if on else "open"
        print(
            plain(f"queue {queue} is {state}" if changed else f"queue {queue} was {'paused' if on else 'open'} already")
        )
    return 0


def _counted(options: argparse.Namespace, what: str, count: int) -> int:
    print_json({what: count}) if options.json else print(f"{count:,} {what}")
    return 0
