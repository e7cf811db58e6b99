"""`prefork acl`: the least that each kind of user needs in the broker, as lines for redis-cli or a users.acl file."""

from __future__ import annotations

import argparse
from typing import Any

from prefork import config
from prefork.broker.roles import NAMES, roles
from prefork.cli.connect import app_of
from prefork.cli.output import print_json
from prefork.errors import PreforkError

EXPLAIN = """\
Prints the ACL SETUSER command of a user who can do what the role needs under this prefix, and nothing else. Replace
PASSWORD, and give the command to redis-cli; the URL is then redis://USER:PASSWORD@host/0. It asks no broker.
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add this command."""
    parser = commands.add_parser(
        "acl", parents=[common], help="the least rights in the broker for a worker, producer, admin or dashboard",
        description=EXPLAIN, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("role", choices=NAMES)
    parser.add_argument("--user", metavar="NAME", help="how the user is called (default: prefork-ROLE)")
    parser.add_argument(
        "--fsync", action="store_true", help='also WAITAOF, for durability="fsync" (Redis 7.2 or later)'
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """-> 0. Raises PreforkError."""
    role = roles()[options.role]
    user = options.user or f"prefork-{role.name}"
    if not user.isprintable() or " " in user:
        raise PreforkError(f"a user's name has no spaces, as in --user shop-worker, not {user!r}")
    line = role.line(user, _prefix(options), fsync=options.fsync)
    if options.json:
        print_json({"role": role.name, "for": role.doc, "user": user, "commands": list(role.commands), "line": line})
    else:
        print(line)
    return 0


def _prefix(options: argparse.Namespace) -> str:
    if options.prefix or not options.config:
        return str(options.prefix or "prefork")
    settings = config.load(options.config, {}, require_app=False)
    app = None if settings.prefix else app_of(options)
    return settings.prefix or (app.prefix if app else "prefork")
