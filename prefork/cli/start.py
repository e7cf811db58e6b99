"""From settings to a running worker.

1. Become `user`, take the pidfile, begin the log.
2. Import the app, connect to the broker once: what is wrong with either is said here, in one line.
3. Be the master. When it ends for a new version's sake, become that.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from prefork import config
from prefork.app import Prefork
from prefork.broker import durability, memory, verbs
from prefork.cli import privileges
from prefork.cli.load import left_behind, load_app
from prefork.config import Settings
from prefork.errors import BrokerError, PreforkError
from prefork.worker import logs, reload
from prefork.worker.descriptors import make_room
from prefork.worker.master import Master
from prefork.worker.pidfile import Pidfile, handed_on
from prefork.worker.status import path_of

log = logging.getLogger("prefork")


def check(settings: Settings) -> int:
    """`--check`: say in one line that all is well. Raises PreforkError for what is not."""
    if settings.user:
        privileges.become(settings.user)
    if settings.pidfile:
        Pidfile(settings.pidfile).check()
    app = load_app(settings)
    info = _ask_broker(app, settings)
    names = ", ".join(settings.queues.names)
    server = verbs.version_of(info)[0] if info else "a server that does not tell its version"
    elsewhere = {t.options.queue_name for t in app.tasks.values()} - set(settings.queues.names)
    note = f"; nobody here listens to {', '.join(sorted(elsewhere))}" if elsewhere else ""
    print(f"ok: {settings.app} has {len(app.tasks)} tasks, {app.client.shown} is {server}, queues {names}{note}")
    for warning in _warnings(app, info):
        print(f"prefork-worker: warning: {warning}", file=sys.stderr)
    return 0


def run(settings: Settings, conf: Path, *, burst: bool) -> int:
    """Run a worker until it is told to stop. -> 0. Raises PreforkError for what keeps it from starting."""
    reload.hold_signals()
    handed = handed_on()
    folder = reload.starting_folder()
    if settings.user:
        privileges.become(settings.user)
    origin = reload.Origin(folder, dict(os.environ))
    status = path_of(conf, settings.pidfile, os.getpid())
    pidfile = Pidfile(settings.pidfile) if settings.pidfile else None
    if pidfile:
        pidfile.take(handed)
    again = False
    try:
        handler = logs.set_up(settings.log_level, settings.log_format)
        if warning := make_room(settings.concurrency):
            log.warning("%s", warning)
        app = load_app(settings)
        if any(task.is_async for task in app.tasks.values()):
            import asyncio  # noqa: F401  # once, and not in each child
        if left := left_behind():
            log.warning("the import of %s leaves %s behind, which its children can't use; open them in "
                        "@app.on_child_start", settings.app, ", ".join(left[:5]))  # fmt: skip
        if app.signer:
            log.info("runs only what is signed; the ids of the keys: %s (the first one signs)",
                     ", ".join(app.signer.ids))  # fmt: skip
        for warning in _warnings(app, _ask_broker(app, settings)):
            log.warning("%s", warning)
        if not settings.user and os.geteuid() == 0:
            log.warning("the tasks run as root; set `user` to somebody who may do less, or to root if that is meant")
        app.client.close()
        again = Master(app, settings, handler, status=status, pidfile=pidfile, origin=origin, burst=burst).run()
    finally:
        if again:
            origin.restore()
        if pidfile and again and _stays(settings, conf):
            pidfile.hand_on()
        elif pidfile:
            pidfile.release()
    if again:
        handler.flush()
        reload.become_anew()
    return 0


def _stays(settings: Settings, conf: Path) -> bool:
    """Whether the new version has the same pidfile, which then stays for it: it has the same pid."""
    try:
        return config.load(conf, require_app=False).pidfile == settings.pidfile
    except PreforkError:  # the new version will say it
        return True


def _ask_broker(app: Prefork, settings: Settings) -> dict[str, Any]:
    """What the broker says of itself, once it is known to do what a worker asks of it. Raises BrokerError."""
    app.client.rehearse(settings.queues.names, durability.parse(settings.durability))
    try:
        return app.client.info()
    except BrokerError:  # a user who may work need not be one who may ask
        return {}


def _warnings(app: Prefork, info: dict[str, Any]) -> list[str]:
    """Of what will hurt later."""
    return [f"the broker {app.client.shown}: {it.what}; remedy: {it.remedy}" for it in memory.findings(info)]
