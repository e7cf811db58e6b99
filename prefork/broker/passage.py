"""Reading all ids of a queue, a page at a time, while it works on; and what to think of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefork.broker import verbs
from prefork.broker.client import Client

LARGEST_PAGE, OVERLAP = 1000, 50
LARGEST_SCAN = 200  # messages whose values a script looks at: some 2 ms
PAGE_BYTES = 1 << 17
BATCH = 100


@dataclass
class Seen:
    """The ids of a queue as they went by; not of one moment."""

    messages: set[bytes] = field(default_factory=set)
    places: Counter[bytes] = field(default_factory=Counter)

    def doubts(self) -> set[bytes]:
        """What does not fit together."""
        odd = self.messages ^ self.places.keys()
        if len(self.places) < self.places.total():
            odd |= {id for id, n in self.places.items() if n > 1}
        return odd


def fits(has_message: bool, places: int) -> bool:
    """Whether that is as it should be: a message in one place, or nothing in none."""
    return places == (1 if has_message else 0)


def kind_of(is_: bytes, places: list[bytes]) -> str:
    """The fault of an id that a script has looked at; "" for none."""
    if is_ == b"none":
        return "bare" if places else ""
    if not places:
        return "nowhere" if is_ == b"message" else "cancelled"
    return "twice" if len(places) > 1 else ""


def pages(client: Client, key: str, kind: str) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """All ids of a hash or sorted set, and those whose value looks damaged. Large values make small pages."""
    cursor, size = b"0", 10
    while True:
        cursor, bytes_, ids, odd = client.call(verbs.scan(key, cursor, size, kind))
        yield ids, odd
        if cursor == b"0":
            return
        size = min(LARGEST_SCAN, size * 2) if bytes_ < PAGE_BYTES // 2 else max(1, size // 2)


def listed(client: Client, key: str) -> list[bytes]:
    """All ids of a list to which others append meanwhile, and take from its front: from its end to its beginning."""
    found: list[bytes] = []
    at = 0  # from the end
    while page := client.read("LRANGE", key, -(at + LARGEST_PAGE), -(at + 1)):
        page.reverse()
        if found and found[-1] in page:  # with what was appended meanwhile, a page overlaps more of the one before
            found += page[page.index(found[-1]) + 1 :]
        elif not found:
            found += page
        else:  # that one has gone, or more was appended than a page holds
            known = set(found[-2 * LARGEST_PAGE :])
            found += (id for id in page if id not in known)
        at += max(1, len(page) - OVERLAP)
        if len(page) < LARGEST_PAGE:
            break
    return found


def batches(ids: list[bytes]) -> Iterator[list[bytes]]:
    """Some at a time, as a script takes them."""
    return (ids[at : at + BATCH] for at in range(0, len(ids), BATCH))
