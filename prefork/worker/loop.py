"""The event loop of the master: file descriptors, timers, signals. It knows nothing of tasks.

1. Wait until a descriptor is ready, a timer is due or a signal has come.
2. Call what was registered for each.
3. Call `after`, once for all that has happened, so that batches form by themselves.
"""

from __future__ import annotations

import heapq
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable
from itertools import count

Callback = Callable[[], None]
LONGEST_WAIT_S = 3600.0  # the kernel counts milliseconds in 31 bits
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Timer:
    """A call that is due at a time of the monotonic clock, unless it is cancelled."""

    __slots__ = ("_loop", "callback", "due_s")

    def __init__(self, loop: Loop, due_s: float, callback: Callback) -> None:
        self._loop, self.due_s = loop, due_s
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget the call."""
        if self.callback:
            self.callback = None
            self._loop.one_cancelled()


class Loop:
    """One thread, no polling: it sleeps in the kernel until there is something to do."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # What the selector has too, behind four calls: they would be a tenth of what a turn takes.
        self._callbacks: dict[int, dict[int, Callback]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._cancelled = 0  # since the last sweep
        self._running = False
        self._signals: dict[int, Callback] = {}
        self._wake_r = self._wake_w = -1
        self.after: Callback = lambda: None
        self.turned_s = time.monotonic()

    def on_read(self, fd: int, callback: Callback) -> None:
        """Call whenever there is something to read."""
        self._change(fd, READ, callback)

    def on_write(self, fd: int, callback: Callback | None) -> None:
        """Call whenever there is room to write; None to stop it."""
        self._change(fd, WRITE, callback)

    def _change(self, fd: int, event: int, callback: Callback | None) -> None:
        before = self._callbacks.get(fd)
        callbacks = dict(before) if before else {}
        if callback:
            callbacks[event] = callback
        else:
            callbacks.pop(event, None)
        events = sum(callbacks)
        if not events:
            self.forget(fd)
            return
        (self._selector.modify if before else self._selector.register)(fd, events, callbacks)
        self._callbacks[fd] = callbacks

    def forget(self, fd: int) -> None:
        """Take a descriptor out, before it is closed."""
        if self._callbacks.pop(fd, None):
            self._selector.unregister(fd)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call once, `delay_s` seconds from now."""
        timer = Timer(self, time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, (timer.due_s, next(self._order), timer))
        return timer

    def one_cancelled(self) -> None:
        """Sweep cancelled timers out before they are many: one that is due next week would stay until then."""
        self._cancelled += 1
        if self._cancelled > 100 and self._cancelled > len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if entry[2].callback]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def on_signals(self, handlers: dict[signal.Signals, Callback]) -> None:
        """Call, from the loop, when a signal has come. Replaces the process's handlers of these signals."""
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number, callback in handlers.items():
            self._signals[number] = callback
            signal.signal(number, lambda *_: None)
        self.on_read(self._wake_r, self._read_signals)

    def _read_signals(self) -> None:
        for number in self.come_signals():
            if callback := self._signals.get(number):
                callback()

    def come_signals(self) -> bytes:
        """The numbers of those that have come since this was last asked."""
        try:
            return os.read(self._wake_r, 4096)
        except BlockingIOError:
            return b""

    def descriptors(self) -> Iterable[int]:
        """The loop's own descriptors, which a forked child has to close."""
        yield from (fd for fd in (self._wake_r, self._wake_w) if fd >= 0)
        if fileno := getattr(self._selector, "fileno", None):
            yield fileno()

    def run(self) -> None:
        """Turn until `stop`."""
        self._running = True
        registered = self._callbacks
        while self._running:
            for key, events in self._selector.select(self._wait_s()):
                for event, callback in tuple(key.data.items()):
                    # An earlier callback of this turn may have closed this descriptor, or given its number away.
                    if events & event and registered.get(key.fd) is key.data:
                        callback()
            self._call_due()
            self.after()

    def stop(self) -> None:
        """Let `run` return after this turn."""
        self._running = False

    def _wait_s(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return min(LONGEST_WAIT_S, max(0.0, self._timers[0][0] - time.monotonic())) if self._timers else None

    def _call_due(self) -> None:
        now_s = self.turned_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)[2]
            if callback := timer.callback:
                timer.callback = None
                callback()
