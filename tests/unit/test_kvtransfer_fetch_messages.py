"""The request and the closing word of a fetch as bytes: whole messages survive, everything else is one error."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer.fetch_messages import (
    CLOSING_MAGIC,
    REQUEST_MAGIC,
    BadFetchMessage,
    NotServed,
    Served,
    decode_closing,
    decode_request,
    encode_closing,
    encode_request,
    is_closing,
)
from kvtransfer.frames import MAX_RAW_BYTES, FrameRecord, LeaseRef
from kvtransfer.sources import MAX_FETCH_KEYS, FetchRequest

pytestmark = pytest.mark.unit

REQUEST = FetchRequest(
    lease=LeaseRef(b"the asker's own!", 3, (1 << 64) - 1, 5),
    keys=tuple(bytes([i]) * 16 for i in range(5)),
    first_block=2,
    block_tokens=64,
    layout="9d" * 16,
    dtypes=(("bfloat16",), ("float8_e4m3", "bfloat16")),
    fidelity=1,
    codecs=(("raw", 1), ("lossless", 2)),
)
SERVED = Served(3, {n: FrameRecord(1000 + n, (1 << 64) - 1 - n) for n in range(7)})

u64 = st.integers(0, (1 << 64) - 1)
texts = st.text(min_size=1, max_size=64)
requests = st.builds(
    FetchRequest,
    lease=st.builds(LeaseRef, st.binary(min_size=16, max_size=16), st.integers(0, (1 << 32) - 1), u64, u64),
    keys=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=9, unique=True).map(tuple),
    first_block=st.integers(0, (1 << 32) - 1),
    block_tokens=st.integers(1, 1 << 16),
    layout=texts,
    dtypes=st.lists(st.lists(texts, min_size=1, max_size=16).map(tuple), min_size=1, max_size=8).map(tuple),
    fidelity=st.integers(0, 2),
    codecs=st.lists(st.tuples(texts, st.integers(0, (1 << 32) - 1)), min_size=1, max_size=8).map(tuple),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=5,
)


def enclosed(magic: bytes, packed: bytes) -> bytes:
    """With a checksum that is right, so that what lies behind it is looked at."""
    return magic + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little") + packed


def fields_of(message: bytes) -> dict[str, object]:
    return msgpack.unpackb(message[12:])


@given(requests)
def test_a_request_survives_the_wire(request: FetchRequest) -> None:
    assert decode_request(encode_request(request)) == request


@given(
    st.integers(1, MAX_FETCH_KEYS),
    st.lists(st.builds(FrameRecord, st.integers(0, MAX_RAW_BYTES), u64), min_size=1, max_size=20),
)
def test_a_closing_word_survives_the_wire(num_blocks: int, records: list[FrameRecord]) -> None:
    served = Served(num_blocks, dict(enumerate(records)))
    message = encode_closing(served)
    assert is_closing(message)
    assert decode_closing(message) == served


def test_a_refusal_says_why() -> None:
    message = encode_closing(NotServed("NO_BLOCKS", "none: of 7"))
    assert decode_closing(message) == NotServed("NO_BLOCKS", "none: of 7")
    assert decode_closing(encode_closing(NotServed("READ_FAILED", "x" * 5000))).message.startswith("xxx")


@pytest.mark.parametrize(
    "good", [encode_request(REQUEST), encode_closing(SERVED)], ids=["request", "closing"]
)
def test_no_single_damaged_byte_and_no_lost_end_goes_unseen(good: bytes) -> None:
    decode = decode_closing if is_closing(good) else decode_request
    for at in range(len(good)):
        with pytest.raises(BadFetchMessage):
            decode(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        with pytest.raises(BadFetchMessage):
            decode(good[:at])
    with pytest.raises(BadFetchMessage):
        decode(good + b"\x00")


@settings(max_examples=150)
@given(st.sampled_from(sorted(fields_of(encode_request(REQUEST)))), values)
@example("k", b"x" * 17)
@example("k", b"x" * 32)  # the same key twice
@example("t", 0)
@example("l", b"")
@example("f", 3)
@example("a", True)
@example("o", [["raw", 1, 2]])
@example("d", [[]])
@example("y", "")
def test_any_value_in_a_requests_field_is_read_or_refused(key: str, value: object) -> None:
    message = enclosed(REQUEST_MAGIC, msgpack.packb({**fields_of(encode_request(REQUEST)), key: value}))
    try:
        request = decode_request(message)
    except BadFetchMessage:
        return
    assert encode_request(request)


@settings(max_examples=150)
@given(st.sampled_from("nmw"), values)
@example("n", 0)
@example("n", MAX_FETCH_KEYS + 1)
@example("m", b"")
@example("m", b"x" * 13)
@example("m", b"\xff" * 12)  # more raw bytes than a frame may have
def test_any_value_in_a_closing_word_is_read_or_refused(key: str, value: object) -> None:
    message = enclosed(CLOSING_MAGIC, msgpack.packb({**fields_of(encode_closing(SERVED)), key: value}))
    try:
        closing = decode_closing(message)
    except BadFetchMessage:
        return
    assert isinstance(closing, NotServed) or 1 <= closing.num_blocks <= MAX_FETCH_KEYS


@settings(max_examples=150)
@given(st.binary(max_size=200))
@example(b"\xc1")
@example(b"\xdf\xff\xff\xff\xff")  # a map of 4 billion
@example(b"\xc6\xff\xff\xff\xff")  # bytes, 4 GiB
@example(b"\x81\xa1k" + b"\x91" * 5000)
@example(b"\xc7\x01\x05x")  # an extension
def test_any_bytes_behind_a_right_checksum_are_one_error(packed: bytes) -> None:
    for magic, decode in ((REQUEST_MAGIC, decode_request), (CLOSING_MAGIC, decode_closing)):
        for message in (packed, magic + packed, enclosed(magic, packed)):
            try:
                assert decode(message)
            except BadFetchMessage:
                continue


@pytest.mark.parametrize("missing", sorted(fields_of(encode_request(REQUEST))))
def test_every_field_of_a_request_is_needed(missing: str) -> None:
    fields = fields_of(encode_request(REQUEST))
    del fields[missing]
    with pytest.raises(BadFetchMessage, match=repr(missing)):
        decode_request(enclosed(REQUEST_MAGIC, msgpack.packb(fields)))


def test_what_the_other_side_would_refuse_is_not_sent() -> None:
    keys = tuple(i.to_bytes(16, "little") for i in range(MAX_FETCH_KEYS))
    assert len(decode_request(encode_request(replace(REQUEST, keys=keys))).keys) == MAX_FETCH_KEYS
    with pytest.raises(BadFetchMessage):
        encode_request(replace(REQUEST, keys=(*keys, b"one key too many")))
    with pytest.raises(BadFetchMessage):
        encode_request(replace(REQUEST, keys=()))
    with pytest.raises(BadFetchMessage):
        encode_request(replace(REQUEST, lease=replace(REQUEST.lease, sender_epoch=1 << 64)))
