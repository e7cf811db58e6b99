"""What a queue promises, in plain Python: no Redis, no scripts. Each verb takes the server's time and says its answer.

`dump` is all that has to be in Redis, key by key, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from prefork.broker.keys import Keys
from tests.broker.bench import DAY_MS

CANCELLED = b"0 cancelled"
FAR = 10_000  # a pending list longer than that is not searched
FORGIVEN = {"retried": 0, "crashes": 0, "unknown": 0, "due_ms": 0, "progress": None}
WEEK_MS, MINUTE_MS = 7 * DAY_MS, 60_000
Record = tuple[Any, ...]


class Fenced(Exception):
    """The lease of this worker is gone; nothing was done."""


class Model:
    """One queue."""

    def __init__(self, dead_max: int, dead_ttl_ms: int, max_takeovers: int, far: int = FAR) -> None:
        self.dead_max, self.dead_ttl_ms, self.max_takeovers, self.far = dead_max, dead_ttl_ms, max_takeovers, far
        self.flush()

    def flush(self) -> None:
        """Everything is gone."""
        self.bodies: dict[str, bytes] = {}  # or CANCELLED: what stands too far in the list to be looked for
        self.states: dict[str, bytes | dict[str, Any]] = {}
        self.pending: list[str] = []  # what has no body was cancelled
        self.ranked: dict[str, int] = {}
        self.scheduled: dict[str, int] = {}
        self.dead: dict[str, int] = {}
        self.active: dict[str, list[str]] = {}  # in the order in which they were claimed
        self.leases: dict[str, int] = {}
        self.takeovers: dict[str, int] = {}
        self.stops: dict[str, bytes] = {}
        self.requests: dict[str, set[str]] = {}
        self.results: dict[str, bytes] = {}
        self.stats: dict[str, int] = {}
        self.expires: dict[tuple[str, str], int] = {}  # (kind, of whom) -> ms
        self.wake = self.paused = False

    # -- what can be asked of it --------------------------------------------------------------------------------

    def waits(self, id: str) -> bool:
        """Whether it is a message, and no trace of one."""
        return self.bodies.get(id, CANCELLED) != CANCELLED

    def messages(self) -> list[str]:
        return [id for id in self.bodies if self.waits(id)]

    def holder(self, id: str) -> str | None:
        """The worker that holds it."""
        return next((worker for worker, ids in self.active.items() if id in ids), None)

    def line(self) -> list[str]:
        """What would be claimed, in its order."""
        ranked = sorted(self.ranked, key=lambda id: (self.ranked[id], id))
        pending = filter(self.waits, self.pending)
        return [*(r for r in ranked if self.ranked[r] < 0), *pending, *(r for r in ranked if self.ranked[r] > 0)]

    def next_due(self) -> int:
        return min(self.scheduled.values(), default=-1)

    def by_due(self) -> list[str]:
        return sorted(self.scheduled, key=lambda id: (self.scheduled[id], id))

    def by_death(self) -> list[str]:
        return sorted(self.dead, key=lambda id: (self.dead[id], id))

    # -- producers ----------------------------------------------------------------------------------------------

    def enqueue(self, entries: Iterable[Record], now: int, *, again: bool) -> int:
        """Entries: id, priority, at, payload. -> how many were new"""
        new = 0
        for id, priority, at, payload in entries:
            if id not in self.bodies and not (again and id in self.results):
                new += 1
                self._accept(id, priority, at, payload, now)
        return new

    def cancel(self, id: str, ttl_ms: int, record: bytes, stopped: bytes | None, now: int) -> str:
        if not self.waits(id) or id in self.dead:
            return "finished"
        if holder := self.holder(id):
            if stopped is not None:
                self._request(holder, f"cancel {id}", now)
                self.stops[id] = b"%d %s" % (ttl_ms, stopped)
                self.expires["stop", id] = now + DAY_MS
            return "running" if stopped is None else "asked"
        self._take_out(id)
        self._count("cancelled")
        self._keep_result(id, ttl_ms, record, now)
        return "cancelled"

    # -- workers ------------------------------------------------------------------------------------------------

    def beat(self, worker: str, lease_ms: int, now: int, *, first: bool) -> list[Any]:
        if not first:
            self._fence(worker)
        self.leases[worker] = now + lease_ms
        waiting = 0 if self.paused else bool(self.pending) + bool(self.ranked)
        leases = sorted(self.leases.items(), key=lambda item: (item[1], item[0]))
        holds = len(self.active.get(worker, ()))
        return [now, self.next_due(), waiting, holds, *(part for name, end in leases for part in (name.encode(), end))]

    def claim(self, worker: str, n: int, now: int) -> tuple[int, int, list[str]]:
        """-> next due, how many are left, ids"""
        self._fence(worker)
        woken = self.wake
        for id in self.by_due():
            if self.scheduled[id] <= now:
                del self.scheduled[id]
                self._push(id)
        if self.paused:
            self.wake = woken  # `pause` wakes when it goes on
            return self.next_due(), 0, []
        line = self.line()
        ids = line[:n]
        # Cancelled ones go when they are passed over: all of them if the list did not hold enough.
        listed = [id for id in ids if id in self.pending]
        wants_more = len(ids) < n or (bool(ids) and self.ranked.get(ids[-1], 0) > 0)
        passed = self.pending.index(listed[-1]) + 1 if listed else 0
        for id in self.pending[: len(self.pending) if wants_more else passed]:
            if not self.waits(id):
                self.bodies.pop(id, None)
        del self.pending[: len(self.pending) if wants_more else passed]
        for id in ids:
            self.ranked.pop(id, None)
        if ids:
            self.active.setdefault(worker, []).extend(ids)
        left = len(self.pending) + len(self.ranked)
        self.wake = left > 0
        return self.next_due(), left, ids

    def settle(self, worker: str, plain: Sequence[str], records: Iterable[Record], now: int) -> int:
        """-> how many left the active set"""
        self._fence(worker)
        settled = 0
        for verb, id, *rest in [("done", id, 0, b"") for id in plain] + list(records):
            if id not in self.active.get(worker, ()):
                continue
            if verb == "state":
                self.states[id] = rest[0]
            elif verb == "follow":
                child, priority, at, payload = rest
                if child not in self.bodies:
                    self._accept(child, priority, at, payload, now)
            else:
                self._release(worker, id)
                settled += 1
                getattr(self, f"_{verb}")(id, *rest, now)
        return settled

    def restore(self, worker: str, mode: str, kept: Iterable[str], now: int) -> int | list[int]:
        if mode == "expired" and self.leases.get(worker, 0) > now:
            return -1
        if mode != "keep":
            self.leases.pop(worker, None)
        kept = set(kept) if mode == "keep" else set()
        moved = buried = 0
        for id in reversed([id for id in self.active.get(worker, ()) if id not in kept]):
            self._release(worker, id)
            if self._is_stopped(id, now):
                continue
            moved += 1
            if mode in ("gone", "expired") and self._is_poison(id, now):
                self._bury_poison(id, worker, now)
                buried += 1
            else:
                self._push(id, front=True)
        return [moved, buried] if buried else moved

    def ask(self, worker: str, request: str, now: int) -> int:
        if worker not in self.leases:
            return 0
        self._request(worker, request, now)
        return 1

    # -- operators ----------------------------------------------------------------------------------------------

    def pause(self, on: bool) -> int:
        changed, self.paused = self.paused != on, on
        self.wake = self.wake or not on
        return int(changed)

    def revive(self, ids: Iterable[str]) -> list[int]:
        """-> how many it has looked at, how many of these were dead"""
        looked = revived = 0
        for id in ids:
            looked += 1
            if id in self.dead:
                del self.dead[id]
                if id in self.states:
                    self.states[id] = self._forgiven(self.states[id])
                self.results.pop(id, None)
                self.stops.pop(id, None)
                self.takeovers.pop(id, None)
                self._push(id)
                revived += 1
        return [looked, revived]

    def delete(self, id: str) -> str:
        if self.holder(id):
            return "running"
        kept_result = self.results.pop(id, None) is not None
        if not self.waits(id):
            return "deleted" if kept_result else ""
        self._take_out(id)
        self._count("deleted")
        return "deleted"

    def purge(self, place: str, n: int) -> int:
        """-> how many ids were taken out; what had been cancelled before is not counted as deleted"""
        order = {
            "pending": list(self.pending), "scheduled": self.by_due(), "dead": self.by_death(),
            "ranked": sorted(self.ranked, key=lambda id: (self.ranked[id], id)),
        }[place][:n]  # fmt: skip
        self._count("deleted", sum(map(self.waits, order)))
        for id in order:
            self._forget(id)
            self.results.pop(id, None)
        return len(order)

    # -- moves --------------------------------------------------------------------------------------------------

    def _fence(self, worker: str) -> None:
        if worker not in self.leases:
            raise Fenced

    def _accept(self, id: str, priority: int, at: str, payload: bytes, now: int) -> None:
        self.bodies[id] = b"1 %d %d " % (now, priority) + payload
        due = now + int(at[1:]) if at.startswith("+") else int(at or 0)
        if due > now:
            self._schedule(id, due)
        else:
            self._push(id)

    def _schedule(self, id: str, due: int) -> None:
        self.wake = self.wake or not self.scheduled or due < self.next_due()
        self.scheduled[id] = due

    def _push(self, id: str, *, front: bool = False) -> None:
        self.wake = True
        if priority := int(self.bodies[id].split(b" ", 3)[2]):
            self.ranked[id] = -priority
        else:
            self.pending.insert(0 if front else len(self.pending), id)

    def _release(self, worker: str, id: str) -> None:
        self.active[worker].remove(id)
        if not self.active[worker]:
            del self.active[worker]

    def _forget(self, id: str) -> None:
        for place in (self.bodies, self.states, self.ranked, self.scheduled, self.dead):
            place.pop(id, None)  # type: ignore[attr-defined]
        if id in self.pending:
            self.pending.remove(id)

    def _take_out(self, id: str) -> None:
        """Of one that nobody holds."""
        if id in self.pending and len(self.pending) > self.far:
            self.states.pop(id, None)
            self.bodies[id] = CANCELLED
        else:
            self._forget(id)

    def _count(self, name: str, n: int = 1) -> None:
        if n:
            self.stats[name] = self.stats.get(name, 0) + n

    def _request(self, worker: str, request: str, now: int) -> None:
        self.requests.setdefault(worker, set()).add(request)
        self.expires["requests", worker] = now + MINUTE_MS

    def _keep_result(self, id: str, ttl_ms: int, record: bytes, now: int) -> None:
        if ttl_ms:
            self.results[id] = record
            self.expires["result", id] = now + ttl_ms

    def _done(self, id: str, ttl_ms: int, record: bytes, now: int) -> None:
        self._count("processed")
        self._forget(id)
        self._keep_result(id, ttl_ms, record, now)

    def _retry(self, id: str, delay_ms: int, state: bytes, failed: int, now: int) -> None:
        self._count("processed", failed)
        self._count("failed", failed)
        if self._is_stopped(id, now):
            return
        self.states[id] = state
        if delay_ms > 0:
            self._schedule(id, now + delay_ms)
        else:
            self._push(id)

    def _back(self, id: str, state: bytes, now: int) -> None:
        if self._is_stopped(id, now):
            return
        if state:
            self.states[id] = state
        self._push(id, front=True)

    def _dead(self, id: str, state: bytes, ttl_ms: int, record: bytes, now: int) -> None:
        self._count("processed")
        self._count("failed")
        self.states[id] = state
        self.dead[id] = now
        old = [id for id in self.by_death() if self.dead[id] <= now - self.dead_ttl_ms]
        for gone in max(old, self.by_death()[: max(0, len(self.dead) - self.dead_max)], key=len):
            self._forget(gone)
        self._keep_result(id, ttl_ms, record, now)

    def _drop(self, id: str, ttl_ms: int, record: bytes, counter: str, now: int) -> None:
        self._count(counter)
        self._forget(id)
        self._keep_result(id, ttl_ms, record, now)

    def _is_stopped(self, id: str, now: int) -> bool:
        """Whether it was to be cancelled: then it is over."""
        if id not in self.stops:
            return False
        ttl_ms, record = self.stops.pop(id).split(b" ", 1)
        self._drop(id, int(ttl_ms), record, "cancelled", now)
        return True

    def _is_poison(self, id: str, now: int) -> bool:
        self.takeovers[id] = self.takeovers.get(id, 0) + 1
        self.expires["takeovers", ""] = now + WEEK_MS
        return self.takeovers[id] >= self.max_takeovers

    @staticmethod
    def _forgiven(state: bytes | dict[str, Any]) -> bytes | dict[str, Any]:
        told = state if isinstance(state, dict) else json.loads(state)
        return told | FORGIVEN if told else state

    def _bury_poison(self, id: str, worker: str, now: int) -> None:
        before = self.states.get(id, b"{}")
        try:
            state = before if isinstance(before, dict) else json.loads(before)
        except ValueError:
            state = {}
        state = dict(state) if isinstance(state, dict) else {}
        said = f"held by a worker that died, {self.max_takeovers} times; the last one was {worker}"
        error = {"class": "prefork.WorkerDied", "traceback": "", "message": said}
        self.states[id] = state | {"errors": [*state.get("errors", []), error]}
        self.dead[id] = now
        del self.takeovers[id]

    # -- time, and what has to be there -------------------------------------------------------------------------

    def expire(self, now: int) -> None:
        """Let go what has expired by then."""
        kinds: dict[str, dict[str, Any]] = {"result": self.results, "requests": self.requests, "stop": self.stops}
        for (kind, whose), end in list(self.expires.items()):
            if end <= now:
                del self.expires[kind, whose]
                if kind == "takeovers":
                    self.takeovers.clear()
                else:
                    kinds[kind].pop(whose, None)

    def shift(self, ms: int) -> None:
        """Move all that is kept with its time by so much."""
        for times in (self.scheduled, self.dead, self.leases):
            for name in times:
                times[name] += ms

    def ends(self, k: Keys) -> dict[str, int]:
        """Key -> when it expires."""
        names = {
            "result": k.result_prefix, "requests": k.requests_prefix, "stop": k.stop_prefix, "takeovers": k.takeovers,
        }  # fmt: skip
        there = self.dump(k)
        return {names[kind] + who: end for (kind, who), end in self.expires.items() if names[kind] + who in there}

    def dump(self, k: Keys) -> dict[str, Any]:
        """All keys that are not empty, with what they hold."""
        numbers: tuple[tuple[str, dict[str, int]], ...] = ((k.stats, self.stats), (k.takeovers, self.takeovers))
        all_of_it: dict[str, Any] = {
            k.messages: self.bodies, k.state: self.states, k.pending: self.pending, k.ranked: self.ranked,
            k.scheduled: self.scheduled, k.dead: self.dead, k.leases: self.leases,
            k.wake: {"0": 0} if self.wake else {}, k.paused: b"1" if self.paused else b"",
            **{key: {name: b"%d" % n for name, n in counts.items()} for key, counts in numbers},
            **{k.active(worker): ids for worker, ids in self.active.items()},
            **{k.requests(worker): dict.fromkeys(asked, 0) for worker, asked in self.requests.items()},
            **{k.stop_prefix + id: mark for id, mark in self.stops.items()},
            **{k.result_prefix + id: record for id, record in self.results.items()},
        }  # fmt: skip
        return {key: value for key, value in all_of_it.items() if value}
