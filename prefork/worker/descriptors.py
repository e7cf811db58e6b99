"""The limit of open files. Most systems begin with 1024, and a master needs some for each of its children."""

from __future__ import annotations

import contextlib
import resource

FOR_EACH_CHILD = 5  # the master's ends of its pipes, and the slate
FOR_THE_REST = 256  # connections, the loop, a fork that is under way, what the app's import has opened


def make_room(children: int) -> str:
    """Raise this process's limit as far as so many children need it. -> a warning, empty if there is room for all"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = children * FOR_EACH_CHILD + FOR_THE_REST
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    room = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        soft = room
    if soft >= needed:
        return ""
    return (
        f"{children} children need up to {needed} open files, the limit is {soft}; raise it (ulimit -n, LimitNOFILE=)"
    )
