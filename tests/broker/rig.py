"""A channel on a loop of its own, for a test to turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefork.broker import verbs
from prefork.broker.channel import Channel
from prefork.worker.loop import Loop, Timer
from tests.conftest import PATIENCE_S


class QuickLoop(Loop):
    """A loop that notes the delays it is asked for, and waits a hundredth of those that are pauses before a retry."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses_s: list[float] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        if getattr(callback, "__name__", "") == "begin":
            self.pauses_s.append(delay_s)
            delay_s /= 100
        return super().call_later(delay_s, callback)


class Rig:
    """A channel on a loop of its own, turned by the test until something is so."""

    def __init__(self, url: str, loop: Loop | None = None) -> None:
        self.loop = loop or Loop()
        self.ups = 0
        self.downs: list[str] = []
        self.channel = Channel(self.loop, url, "rig", self._up, self.downs.append)

    def _up(self) -> None:
        self.ups += 1

    def turn_until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
        """Turn the loop until the condition is true, and return it."""
        end = time.monotonic() + seconds
        found: list[Any] = []
        timers: list[Timer] = []

        def look() -> None:
            if value := condition():
                found.append(value)
                self.loop.stop()
            elif time.monotonic() > end:
                self.loop.stop()

        def tick() -> None:  # what has to come true may not be an event of the loop
            timers.append(self.loop.call_later(0.005, tick))

        tick()
        self.loop.after = look
        self.loop.run()
        timers[-1].cancel()
        assert found, f"not within {seconds:g} s; downs: {self.downs}"
        return found[0]

    def connect(self) -> Rig:
        self.channel.connect()
        self.turn_until(lambda: self.channel.ready)
        return self

    def send(self, *words: Any, limit_s: float = 20.0) -> list[Any]:
        """Send a plain command. -> a list to which its reply will be appended"""
        replies: list[Any] = []
        self.channel.send_words(words, replies.append, limit_s)
        self.channel.flush()
        return replies

    def ask(self, *words: Any) -> Any:
        replies = self.send(*words)
        self.turn_until(lambda: replies)
        assert len(replies) == 1
        return replies[0]

    def call(self, call: verbs.Call) -> Any:
        replies: list[Any] = []
        self.channel.send(call, replies.append)
        self.channel.flush()
        self.turn_until(lambda: replies)
        return replies[0]

    def close(self) -> None:
        self.channel.close()
        self.loop._selector.close()


Rigs = Callable[..., Rig]
