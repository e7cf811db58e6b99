"""When to try again."""

from __future__ import annotations

import random
from collections.abc import Callable

RetryDelay = float | Callable[[int], float]

# A message for a task name that no worker here knows: the new release is probably on its way to this host.
UNKNOWN_TASK_DELAYS_S = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def default_retry_delay(retried: int) -> float:
    """Seconds to wait before retry number `retried + 1` (retried >= 0).

    Sidekiq's formula, by which asynq retries too: fourth-power growth (15 s, 16 s, 31 s, 96 s … about 20 days over 25
    retries), with jitter growing alike so that tasks which failed together don't come back together.
    Source: sidekiq, wiki page "Error Handling".
    """
    return retried**4 + 15.0 + random.randint(0, 29) * (retried + 1)


def retry_delay_s(policy: RetryDelay | None, retried: int) -> float:
    """Seconds to wait before retry number `retried + 1` by a task's own policy: None, seconds, or a function.

    Raises whatever a task's function raises, and TypeError or ValueError if it does not return a number of seconds.
    """
    if policy is None:
        return default_retry_delay(retried)
    delay_s = float(policy(retried) if callable(policy) else policy)
    if not 0 <= delay_s < 10 * 365 * 86400:
        raise ValueError(f"retry_delay gave {delay_s} seconds for retry {retried + 1}; it must be 0 to 10 years")
    return delay_s


def unknown_task_delay_s(seen: int) -> float | None:
    """Seconds until a message of an unknown task name is tried again after `seen` tries; None when that's enough."""
    return UNKNOWN_TASK_DELAYS_S[seen] if seen < len(UNKNOWN_TASK_DELAYS_S) else None
