from collections.abc import Callable
from threading import Lock
from typing import Any

from prefork.message import Header
from prefork.worker.frames import Order, Terms
from prefork.worker.outbox import Outbox

FORMAT: int

def frames(orders: list[Order], first: int) -> bytes | None: ...
def done(
    data: bytes,
    unanswered: dict[int, Order],
    outboxes: dict[str, Outbox],
    known: dict[str, list[float]],
    mix_s: float,
    now_ms: int,
) -> tuple[int, int, float, int, float]: ...
def orders(
    ids: list[bytes], messages: list[bytes], states: list[bytes | None], queue: str, serial: int,
    usual: dict[bytes, tuple[Header, Terms]], known: dict[str, list[float]], long_s: float,
) -> tuple[list[Any], int]: ...  # fmt: skip
def run(
    child: Any, end: Any, task_r: int, token_r: int, answer_w: int, lock: Lock, log: Any, stopper: Any,
    tasks: tuple[tuple[Any, str, bool] | None, ...], prints: tuple[Any, ...],
    loads: Callable[[bytes], Any], dumps: Callable[[Any], bytes],
    clock: Callable[[], float], look: Callable[[float], float],
) -> tuple[int, float | None, Any, BaseException | None] | None: ...  # fmt: skip
