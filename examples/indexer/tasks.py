"""The app: what the indexer does in the background. A worker runs it with `prefork-worker -c indexer.conf`."""

from __future__ import annotations

import itertools

from analysis import FileIndex, analyse

from prefork import Context, Prefork

app = Prefork("indexer")  # the broker is the one that $PREFORK_BROKER names


@app.task(timeout=60, max_retries=3)
def index_file(path: str) -> FileIndex:
    """The task of this app. Its result travels as JSON, so it is made of what JSON has."""
    return analyse(path)


@app.task(takes_context=True, max_retries=3, retry_delay=0.2, retry_on=(ConnectionError,))
def fails_at_first(context: Context) -> int:
    """Fails once, as the network does; is tried again after a fifth of a second, and returns which attempt it was."""
    if context.attempt == 1:
        raise ConnectionError("the network is down, for once")
    return context.attempt


@app.task(timeout=1, max_retries=0)
def never_ends() -> int:
    """Gets stuck in C, where no Python code, no signal handler and no thread can stop it. The worker can."""
    return sum(itertools.repeat(0))
