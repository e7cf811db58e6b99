"""What is dropped when the lease is lost, with a real child."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork import Prefork
from prefork.broker.keys import Keys
from prefork.config import load
from prefork.message import Header, Message, new_id
from prefork.worker.clock import ServerClock
from prefork.worker.frames import Order, Terms
from prefork.worker.handoff import ChildEnd
from prefork.worker.loop import Loop
from prefork.worker.pool import Pool
from prefork.worker.settlement import Settlement
from prefork.worker.shutdown import BECAUSE
from prefork.worker.slate import Slate
from prefork.worker.work import Work
from tests.conftest import until


class Shutdown:
    """One that has not begun."""

    begun = False

    def __init__(self) -> None:
        self.killed: list[Order] = []


@pytest.mark.parametrize("why", ["", "timeout of 1 s", f"{BECAUSE} at once", "cancelled 5 s ago"])
def test_a_child_that_dies_when_the_lease_is_lost_leaves_no_outcome(tmp_path: Path, why: str) -> None:
    """Also one that was being killed: this worker, under its new name, may hold the same message again."""
    app = Prefork("shop")
    app.task(name="job")(lambda: None)
    conf = tmp_path / "shop.conf"
    conf.write_text("[prefork]\napp = shop:app\n")

    def live(number: int, end: ChildEnd, slate: Slate) -> None:
        os.setsid()
        end.next()
        (tmp_path / "runs").touch()
        time.sleep(60)

    loop = Loop()
    later: list[Callable[[], None]] = []
    settlement = Settlement(
        app.tasks, lambda: 0, prefix="p", dead_max=1, dead_ttl_s=1, max_crashes=3, fenced=lambda said: None,
        later=lambda delay_s, call: later.append(call),
    )  # fmt: skip
    settlement.add_queue(Keys("p", "default"))
    pool = Pool(loop, 1, None, live)
    work = pool.owner = Work(app, load(conf), loop, ServerClock(), settlement, pool)
    shutdown = Shutdown()
    work.shutdown = shutdown  # type: ignore[assignment]
    work.on_ready = lambda child: None
    pool.fill()
    (child,) = pool.children
    pool.growing = False
    terms = Terms(Header("job"), 0, 0, 25, 1.0, 0.0, expires=False, result_ttl_ms=86_400_000)
    order = Order(Message(new_id(), "default", terms.header, b"[[],{}]", 0, 0, None), terms, 1, 0, 1.0, 1)
    pool.hand(child, [order])
    until((tmp_path / "runs").exists)
    if why:
        child.killed_order, order.cancelled = order, why.startswith("cancelled")
        pool.kill(child, why)
    work.drop_all()
    until(lambda: (pool.reap(), not pool.children)[1])
    assert settlement.is_empty
    assert not shutdown.killed
