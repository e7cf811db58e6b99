"""Become the `user` of the configuration, for good, before anything of the app is touched."""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import sys

from prefork.errors import NoPrivilege

PR_SET_DUMPABLE = 4


def become(user: str) -> None:
    """Take on a user, `name` or `name:group`, with all of its groups. Raises NoPrivilege.

    HOME, USER and LOGNAME become that user's. One who is that user already stays so.
    """
    name, _, group = user.partition(":")
    entry = pwd.getpwnam(name)
    gid = grp.getgrnam(group).gr_gid if group else entry.pw_gid
    is_user = os.getuid() == os.geteuid() == entry.pw_uid
    if is_user and (not group or os.getgid() == os.getegid() == gid):
        return
    if os.geteuid():
        kind = "take on another group" if is_user else "become another user"
        raise NoPrivilege(f"user = {user}: only root may {kind}, this is {_me()}; start it as root or {user}")
    try:
        os.initgroups(name, gid)
        os.setgid(gid)
        os.setuid(entry.pw_uid)
    except OSError as error:
        raise NoPrivilege(f"user = {user}: the system refuses it ({error.strerror})") from None
    if entry.pw_uid and _is_root_again():
        raise NoPrivilege(f"user = {user}: this process could become root again; take CAP_SETUID from it")
    _own_what_is_ours()
    os.environ |= {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name}


def _me() -> str:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container may be given any number
        name = f"uid {os.geteuid()}"
    return name


def _is_root_again() -> bool:
    try:
        os.setuid(0)
    except OSError:
        return False
    return True


def _own_what_is_ours() -> None:
    """Own this process's files in /proc again, which the kernel gives to root when a process changes its user.

    Else no child could make itself the one to be killed when memory is short (child.py), and nobody but root could see
    its share of the memory, or look into it with a debugger. An exec, as at a reload, does the same.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
