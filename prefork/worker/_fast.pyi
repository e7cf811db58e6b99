from collections.abc import Callable
from threading import Lock
from typing import Any

FORMAT: int

def run(
    child: Any, end: Any, token_r: int, answer_w: int, lock: Lock, log: Any, stopper: Any,
    tasks: tuple[tuple[Any, str, bool] | None, ...], prints: tuple[Any, ...],
    loads: Callable[[bytes], Any], clock: Callable[[], float], look: Callable[[float], float],
) -> tuple[int, float | None, Any, BaseException | None] | None: ...  # fmt: skip
