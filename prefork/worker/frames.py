"""What goes through the pipes between master and child (`handoff.py`): tokens, frames, answers."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from prefork.message import Header, Message

TOKEN = struct.Struct("<Q")
# number, length of the body; indices of task and queue, flags, attempt, retried, max_retries; timeout_s, soft_timeout_s
# (0: none), enqueued_ms; id; then the body
FRAME = struct.Struct("<QIHHHIIIddQ32s")
# number, kind, length of the payload, seconds it ran, seconds of CPU, peak memory of the child in KiB
ANSWER = struct.Struct("<QBIddI")

WILL_LAST = 1  # flag: worth a process title of its own

READY, DONE, DONE_WITH_FOLLOW_UPS, FAILED, PROGRESS, BOOT_FAILED = range(6)  # kinds of answers

LARGEST_ANSWER = 64 << 20
LONGEST_S = 1e10  # infinity, and what is no number, would stay in all means for ever


@dataclass(frozen=True, slots=True)
class Terms:
    """What all messages of one queue and one header have in common. 0.0: no timeout."""

    header: Header
    task: int
    queue: int
    max_retries: int
    timeout_s: float
    soft_timeout_s: float
    expires: bool
    result_ttl_ms: int  # 0: no result is kept


@dataclass(slots=True)
class Order:
    """A message with what this attempt of it needs, as the master hands it to a child."""

    message: Message
    terms: Terms
    attempt: int
    retried: int
    expected_s: float
    serial: int  # in the order in which this master claimed them
    flags: int = 0
    ready_since_s: float = 0.0
    cancelled: bool = False  # its task was told to stop

    def frame(self, number: int) -> tuple[bytes, bytes | memoryview]:
        """Head and body, to be written one after the other."""
        m, terms = self.message, self.terms
        head = FRAME.pack(
            number, len(m.body), terms.task, terms.queue, self.flags, self.attempt, self.retried, terms.max_retries,
            terms.timeout_s, terms.soft_timeout_s, m.enqueued_ms, m.id.encode(),
        )  # fmt: skip
        return head, m.body


@dataclass(slots=True)
class Answer:
    """What a child said."""

    number: int
    kind: int
    ran_s: float
    cpu_s: float
    peak_kib: int
    payload: bytes


@dataclass(slots=True)
class Given:
    """An order as the child receives it."""

    number: int
    task: int
    queue: int
    flags: int
    attempt: int
    retried: int
    max_retries: int
    timeout_s: float
    soft_timeout_s: float
    enqueued_ms: int
    id: str
    body: bytes | bytearray


def short_answers(data: bytes) -> list[Answer]:
    """The answers at the beginning that are well-formed and carry nothing, as most do."""
    answers: list[Answer] = []
    for number, kind, size, ran_s, cpu_s, peak_kib in ANSWER.iter_unpack(data):
        if size or kind > BOOT_FAILED or not (0 <= ran_s < LONGEST_S and -1 <= cpu_s < LONGEST_S):
            break
        answers.append(Answer(number, kind, ran_s, cpu_s, peak_kib, b""))
    return answers
