"""Which trouble may pass by itself, so that a producer tries again; and whether a try may have been carried out."""

from __future__ import annotations

import redis

TRANSIENT = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError, OSError)
LASTING = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
# A failover that is under way, a cluster that heals, a script that ends.
FOR_NOW = (
    redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError, redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)  # fmt: skip
FOR_NOW_MARKS = ("READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY")


def refused_for_now(error: BaseException) -> bool:
    """Whether the server has refused, so that nothing was carried out, and may not the next time."""
    if isinstance(error, FOR_NOW):
        return True
    return isinstance(error, redis.ResponseError) and str(error).startswith(FOR_NOW_MARKS)


def may_pass(error: BaseException, *, known: bool) -> bool:
    """Whether it was the connection. `known`: who answers there has spoken Redis's protocol before, so that a reply
    that is none was damaged on its way."""
    if isinstance(error, redis.exceptions.InvalidResponse):
        return known
    return isinstance(error, TRANSIENT) and not isinstance(error, LASTING)


def never_carried_out(error: BaseException) -> bool:
    """Whether the connection was never made, or the server refused: nothing can have been accepted."""
    said = str(error)
    marks = ("Connection refused", "No such file", "max number of clients")
    loading = isinstance(error, redis.exceptions.BusyLoadingError)
    return loading or "connecting to" in said.lower() or any(mark in said for mark in marks)
