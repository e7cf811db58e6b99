"""The leases of other workers: which of them have ended, though clocks may be wrong and all may have been cut off.

- A lease has ended when the server's clock has passed its end; or when it was seen unmoved for as long as it had left
  when it was first seen, by this process's own clock, which never leaps: the server's may have gone back by hours.
- What all suffered together is nobody's death. When this worker's own beats have failed to come through for half a
  lease, or the server's clock has leapt, the leases of all may have ended: for one more lease nobody is taken over.
"""

from __future__ import annotations

LONGEST_LEASE_S = 3600.0


class Rivals:
    """What one worker has seen of the others at its beats. Times in `_s` are of the monotonic clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._beats: dict[str, tuple[int, float]] = {}  # queue -> the server's time and ours at the last one
        self._leases: dict[str, dict[str, tuple[int, float]]] = {}  # queue -> worker -> its end; when it must be over
        self._patient_until_s = 0.0

    def be_patient(self, at_s: float) -> None:
        """All may have been cut off, and be on their way back: take nobody over for one lease."""
        self._patient_until_s = at_s + self._lease_s

    def judge(self, queue: str, now_ms: int, at_s: float, leases: list[tuple[str, int]]) -> list[tuple[str, int, bool]]:
        """A beat has told these leases, worker and end. -> those to take over; True: only by our own clock"""
        before_ms, before_s = self._beats.get(queue, (now_ms, at_s))
        self._beats[queue] = now_ms, at_s
        passed_s = at_s - before_s
        leapt_s = (now_ms - before_ms) / 1000 - passed_s
        if max(passed_s, abs(leapt_s)) > self._lease_s / 2:
            self.be_patient(at_s)
        known, seen = self._leases.get(queue, {}), {}
        ended = []
        for worker, end_ms in leases:
            before = known.get(worker)
            if not before or before[0] != end_ms:
                before = end_ms, at_s + min(LONGEST_LEASE_S, (end_ms - now_ms) / 1000)
            seen[worker] = before
            if at_s >= self._patient_until_s and (end_ms < now_ms or before[1] < at_s):
                ended.append((worker, end_ms, end_ms >= now_ms))
        self._leases[queue] = seen
        return ended
