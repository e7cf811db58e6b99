"""Signatures: what was enqueued by one who has a key, and what was written into the broker by another.

The signature is the last thing in a message's header, so that one who has no keys can pass over it:

    1 1764000000000 0 {"task":"shop.tasks.send_invoice","sig":"9f86d081.mXk…"}\\n[[7],{"copy":true}]
                                                              │        └ HMAC-SHA-256, base64
                                                              └ id of the key: made from it, tells nothing of it

It covers the id, the queue, the priority, the header without it, and the body; not what the broker puts in front, nor
what happens to the message later (docs/signing.md).
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Any

from prefork.errors import BadSignature

LEAST_KEY_BYTES = 32
REMEDY = "make one with: openssl rand -hex 32"
_SIGNATURE = re.compile(rb',"sig":"[0-9a-f]{8}\.[A-Za-z0-9+/]{43}="\}')
_SIG = b',"sig":"%b.%b"}'
_LENGTH = 8 + 8 + 1 + 44 + 2  # of what this pattern finds
_BLOCK = 64  # bytes that SHA-256 takes at a time


class Signer:
    """Some keys: the first one signs, all of them verify. Raises ValueError, which quotes no key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes: dict[bytes, tuple[Any, Any]] = {}
        for number, key in enumerate(keys, 1):
            raw = _checked(number, key)
            id = sha256(b"prefork signing key\0" + raw).hexdigest()[:8].encode()
            if id in self._hashes:
                raise ValueError(f"key {number} is there twice; remove one")
            self._hashes[id] = _begun(raw)
        if not self._hashes:
            raise ValueError(f"holds no key; {REMEDY}")
        self._first, self._hashes_of_first = next(iter(self._hashes.items()))

    def __repr__(self) -> str:
        return f"<signer, keys {', '.join(self.ids)}>"

    @property
    def ids(self) -> list[str]:
        """The ids of the keys, the one that signs first. They may be shown."""
        return [id.decode() for id in self._hashes]

    def sign(self, id: str, queue: str, priority: int, payload: bytes) -> bytes:
        """A payload (header, newline, body) with its signature in it."""
        header, body = payload.split(b"\n", 1)
        mac = _mac(self._hashes_of_first, id, queue, priority, header, body)
        return b"%b%b\n%b" % (header[:-1], _SIG % (self._first, mac), body)

    def verified(self, raw_id: bytes, queue: str, raw: bytes) -> bytes:
        """A value of the broker without its signature. Raises BadSignature, saying what is wrong with it."""
        try:
            id = raw_id.decode()
            version, enqueued_ms, priority, rest = raw.split(b" ", 3)
            header, body = rest.split(b"\n", 1)
            rank = int(priority)
        except ValueError:  # nothing that was not verified leaves here, also what its decoder would refuse
            raise BadSignature(
                f"message {raw_id.decode('utf-8', 'replace')} in queue {queue} is not in prefork's format, let alone "
                f"signed: {raw[:60]!r}"
            ) from None
        # By position: a third cheaper than by a pattern, and what is no signature is the id of no key.
        plain, told = header[:-_LENGTH] + b"}", header[-_LENGTH:]
        key = told[8:16]
        hashes = self._hashes.get(key)
        if hashes is None and not _SIGNATURE.fullmatch(told):
            raise BadSignature(
                f"message {id} in queue {queue} is not signed, and this worker has signing_keys; give them to whoever "
                f"enqueues it, if that was one of yours"
            )
        if hashes is None:
            raise BadSignature(
                f"message {id} in queue {queue} is signed with the key {key.decode()}, and this worker has "
                f"{', '.join(self.ids)}; add that key to signing_keys, if it is one of yours, and retry it"
            )
        if not compare_digest(told, _SIG % (key, _mac(hashes, id, queue, rank, plain, body))):
            raise BadSignature(
                f"message {id} in queue {queue} does not match its signature by the key {key.decode()}: it was "
                f"altered, or belongs to another id or queue; find out who can write to the broker"
            )
        return b"%b %b %b %b\n%b" % (version, enqueued_ms, priority, plain, body)


def from_file(path: Path) -> Signer:
    """The keys of a file, one a line; `#` begins a comment. Raises ValueError and OSError, which quote no key."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; write one key a line") from None
    return Signer(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def _checked(number: int, key: Any) -> bytes:
    if not isinstance(key, str):
        raise ValueError(f"key {number} is a {type(key).__name__}; give text; {REMEDY}")
    if not key.isascii() or not key.isprintable() or " " in key or "," in key:
        raise ValueError(f"key {number} holds a space, a comma or what is not printable ASCII; {REMEDY}")
    if len(key) < LEAST_KEY_BYTES:
        raise ValueError(f"key {number} has {len(key)} characters, {LEAST_KEY_BYTES} are the least; {REMEDY}")
    return key.encode()


def _begun(key: bytes) -> tuple[Any, Any]:
    """The two hashes of HMAC after their first block, the key's (RFC 2104, 4): half of a short message's cost."""
    block = (sha256(key).digest() if len(key) > _BLOCK else key).ljust(_BLOCK, b"\0")
    return sha256(bytes(b ^ 0x36 for b in block)), sha256(bytes(b ^ 0x5C for b in block))


def _mac(hashes: tuple[Any, Any], id: str, queue: str, priority: int, header: bytes, body: bytes) -> bytes:
    """Each part has its length before it but the last, so that none can lend bytes to another."""
    inner, outer = hashes[0].copy(), hashes[1].copy()
    head = f"prefork 1:{len(id)}:{id}:{len(queue)}:{queue}:{priority}:{len(header)}:"
    inner.update(head.encode() + header + body)
    outer.update(inner.digest())
    return b2a_base64(outer.digest(), newline=False)
