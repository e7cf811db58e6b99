"""Which trouble may pass by itself, so that a producer tries again; and whether a try may have been carried out."""

from __future__ import annotations

import socket

import hiredis

# A failover that is under way, a cluster that heals, a script that ends.
FOR_NOW = ("READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS")
# A server that starts, or has too many to serve. What is sent to another meanwhile is no better.
SOON = ("LOADING", "ERR max number of clients")


def refused_for_now(error: BaseException) -> bool:
    """Whether the server has refused, so that nothing was carried out, and may not the next time."""
    return isinstance(error, hiredis.ReplyError) and _code(error).startswith(FOR_NOW)


def is_replica(reply: object) -> bool:
    """Whether this is what a server says that is a primary no more."""
    return isinstance(reply, hiredis.ReplyError) and _code(reply).startswith("READONLY")


def _code(error: hiredis.ReplyError) -> str:
    """What it begins with; Redis 6.2 wraps what a command in a script has said."""
    said = str(error)
    return said.partition(": -")[2] or said if said.startswith("ERR Error running script") else said


def broken_off(reply: object) -> bool:
    """Whether a server that is a primary no more has ended a WAIT."""
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("UNBLOCKED")


def may_pass(error: BaseException, *, known: bool) -> bool:
    """Whether it was the connection, or is a refusal for now.

    `known`: who answers there has spoken Redis's protocol before, so that a reply that is none was damaged on its way,
    and a name that is not known was.
    """
    if isinstance(error, hiredis.ReplyError):
        return _code(error).startswith(FOR_NOW + SOON)
    if isinstance(error, hiredis.ProtocolError | socket.gaierror):
        return known
    # A certificate that is not trusted is a ValueError too.
    return isinstance(error, OSError) and not isinstance(error, ValueError)
