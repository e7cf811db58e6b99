"""Become the `user` of the configuration, for good, before anything of the app is touched."""

from __future__ import annotations

import grp
import os
import pwd

from prefork.errors import NoPrivilege


def become(user: str) -> None:
    """Take on a user, `name` or `name:group`, with all of its groups. Raises NoPrivilege.

    HOME, USER and LOGNAME become that user's. One who is that user already stays so.
    """
    name, _, group = user.partition(":")
    entry = pwd.getpwnam(name)
    gid = grp.getgrnam(group).gr_gid if group else entry.pw_gid
    if os.getuid() == os.geteuid() == entry.pw_uid and (os.getgid() == gid or entry.pw_uid):
        return
    if os.geteuid():
        mine = pwd.getpwuid(os.geteuid()).pw_name
        raise NoPrivilege(
            f"user = {user}: only root may become another user, this is {mine}; start it as root or {name}"
        )
    try:
        os.initgroups(name, gid)
        os.setgid(gid)
        os.setuid(entry.pw_uid)
    except OSError as error:
        raise NoPrivilege(f"user = {user}: the system refuses it ({error.strerror})") from None
    os.environ |= {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name}
