"""Signatures: what they cover, and what is said of one that is missing or wrong."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import Prefork
from prefork.errors import BadSignature, InvalidOption
from prefork.message import Header, decode, new_id
from prefork.signing import Signer, from_file

OLD, NEW = "o" * 32, "n" * 64
ID, QUEUE, PRIORITY = new_id(), "mail", -3
PAYLOAD = Header("shop.send", max_retries=3, timeout_s=2.5, delay_s=9).encode() + b'\n[[7],{"copy":true}]'


def stored(payload: bytes, priority: int = PRIORITY) -> bytes:
    return b"1 1764000000000 %d " % priority + payload


def refused(signer: Signer, raw: bytes, id: str = ID, queue: str = QUEUE) -> str:
    with pytest.raises(BadSignature) as caught:
        signer.verified(id.encode(), queue, raw)
    return str(caught.value)


@pytest.mark.parametrize("key", ["k" * 32, "k" * 64, "k" * 65, "k" * 500])
def test_it_is_hmac_sha_256_as_others_compute_it(key: str) -> None:
    signed = Signer([key]).sign(ID, QUEUE, PRIORITY, PAYLOAD)
    header, body = PAYLOAD.split(b"\n")
    covered = f"prefork 1:32:{ID}:4:{QUEUE}:{PRIORITY}:{len(header)}:".encode() + header + body
    assert b"." + base64.b64encode(hmac.digest(key.encode(), covered, "sha256")) + b'"}\n' in signed


def test_what_was_signed_is_verified_and_comes_back_as_it_was() -> None:
    signer = Signer([NEW])
    assert signer.verified(ID.encode(), QUEUE, stored(signer.sign(ID, QUEUE, PRIORITY, PAYLOAD))) == stored(PAYLOAD)


def test_one_who_has_no_keys_reads_it_as_if_it_were_not_signed() -> None:
    signed, plain = stored(Signer([NEW]).sign(ID, QUEUE, PRIORITY, PAYLOAD)), stored(PAYLOAD)
    assert decode(ID.encode(), QUEUE, signed) == decode(ID.encode(), QUEUE, plain)


@pytest.mark.parametrize("at", range(len(stored(Signer([NEW]).sign(ID, QUEUE, PRIORITY, PAYLOAD)))))
def test_no_byte_of_it_can_be_changed_unseen_but_the_stamp_of_the_broker(at: int) -> None:
    signer = Signer([NEW])
    raw = bytearray(stored(signer.sign(ID, QUEUE, PRIORITY, PAYLOAD)))
    raw[at] ^= 1
    try:
        read = signer.verified(ID.encode(), QUEUE, bytes(raw))
    except BadSignature:
        return
    assert at < len(b"1 1764000000000 ")
    assert read.split(b" ", 2)[2] == stored(PAYLOAD).split(b" ", 2)[2]


def test_it_holds_for_its_id_its_queue_and_its_priority_only() -> None:
    signer = Signer([NEW])
    signed = signer.sign(ID, QUEUE, PRIORITY, PAYLOAD)
    for said in (
        refused(signer, stored(signed), id=new_id()),
        refused(signer, stored(signed), queue="default"),
        refused(signer, stored(signed, 100)),
    ):
        assert "does not match its signature" in said


@given(st.text(max_size=12), st.text("a:1", max_size=6), st.integers(-100, 100), st.binary(max_size=8), st.data())
def test_no_part_can_lend_bytes_to_the_next(
    id: str, queue: str, priority: int, body: bytes, data: st.DataObject
) -> None:
    signer = Signer([NEW])
    other = data.draw(st.tuples(st.just(id + queue), st.text("a:1", max_size=6), st.integers(-100, 100), st.binary()))
    one = signer.sign(id, queue, priority, b'{"task":"t"}\n' + body)
    two = signer.sign(*other[:3], b'{"task":"t"}\n' + other[3])
    assert (one.split(b"\n")[0] == two.split(b"\n")[0]) == ((id, queue, priority, body) == other)


def test_the_first_key_signs_and_all_verify() -> None:
    old, both, new = Signer([OLD]), Signer([NEW, OLD]), Signer([NEW])
    by_old = stored(old.sign(ID, QUEUE, PRIORITY, PAYLOAD))
    by_both = stored(both.sign(ID, QUEUE, PRIORITY, PAYLOAD))
    assert both.verified(ID.encode(), QUEUE, by_old) == new.verified(ID.encode(), QUEUE, by_both) == stored(PAYLOAD)
    said = refused(new, by_old)
    assert f"signed with the key {old.ids[0]}, and this worker has {new.ids[0]}; add that key" in said
    assert "\n" not in said


@pytest.mark.parametrize("sig", ["", ',"sig":"x"', ',"sig":"' + "0" * 8 + '."', ',"sig":7', ',"sig":"é"'])
def test_what_is_no_signature_is_none(sig: str) -> None:
    raw = stored(b'{"task":"t"%b}\n[[],{}]' % sig.encode())
    assert "is not signed, and this worker has signing_keys; give them" in refused(Signer([NEW]), raw)


@pytest.mark.parametrize("raw", [b"", b"hello", b"1 2 3", b"1 2 x {}\n", b"\xff" * 99])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    assert "is not in prefork's format, let alone signed" in refused(Signer([NEW]), raw)


BAD_KEYS = [
    ([], "holds no key; make one with: openssl rand -hex 32"),
    ([NEW, "SECRET" * 5], "key 2 has 30 characters, 32 are the least"),
    ([""], "key 1 has 0 characters, 32 are the least"),
    (["SECRET " * 9], "key 1 holds a space, a comma or what is not printable ASCII"),
    (["SECRETé" * 9], "key 1 holds a space"),
    ([NEW, OLD, NEW], "key 3 is there twice; remove one"),
    ([b"SECRET" * 9], "key 1 is a bytes; give text"),
]


@pytest.mark.parametrize(("keys", "said"), BAD_KEYS)
def test_a_key_that_is_none_is_refused_and_not_quoted(keys: list[str], said: str) -> None:
    for make in (Signer, lambda keys: Prefork("shop", "redis://x", signing_keys=keys)):
        with pytest.raises(ValueError, match=said) as caught:
            make(keys)
        assert "SECRET" not in str(caught.value)


def test_one_text_is_no_list_of_keys() -> None:
    with pytest.raises(InvalidOption, match="takes a list of keys") as caught:
        Prefork("shop", "redis://x", signing_keys=NEW)
    assert NEW not in str(caught.value)


def test_no_key_is_shown() -> None:
    app = Prefork("shop", "redis://x", signing_keys=[NEW, OLD])
    assert app.signer
    for text in (repr(app), repr(app.signer), str(vars(app))):
        assert NEW not in text
        assert OLD not in text
    assert all(id in repr(app.signer) for id in app.signer.ids)


def test_a_file_holds_one_key_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# since May\n{NEW}\n\n  {OLD}\r\n")
    assert from_file(path).ids == Signer([NEW, OLD]).ids
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="is not UTF-8; write one key a line"):
        from_file(path)
