"""Frames as bytes: what goes in comes out, and no damage gets through."""

import random

import msgpack
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codecs import CODECS, Fidelity, UnknownCodec, find_codec, newest_codec
from kvtransfer.frames import (
    MAX_HEADER_BYTES,
    Ack,
    DamagedFrame,
    FrameHeader,
    LeaseRef,
    Opening,
    SlotRef,
    decode_ack,
    decode_frame,
    decode_opening,
    encode_ack,
    encode_frame,
    encode_opening,
    max_frame_bytes,
)
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane

pytestmark = pytest.mark.unit

HEADER = FrameHeader(
    lease=LeaseRef(bytes(range(16)), 3, 2**64 - 1, 5),
    number=7,
    piece=Piece("k", range(2, 4), range(3), range(512, 1024)),
    codec="raw",
    codec_version=1,
    raw_bytes=4096,
    dtypes=("float32",),
)
PAYLOAD = random.Random(0).randbytes(4096)
MESSAGE, CHECKSUM = encode_frame(HEADER, PAYLOAD)


def seal(packed_header: bytes, payload: bytes = b"") -> bytes:
    """A frame with a good checksum around any header."""
    rest = len(packed_header).to_bytes(4, "little") + packed_header + payload
    return b"HRF1" + xxhash.xxh3_64_intdigest(rest).to_bytes(8, "little") + rest


def fields(**changes: object) -> dict[str, object]:
    length = int.from_bytes(MESSAGE[12:16], "little")
    unpacked = msgpack.unpackb(MESSAGE[16 : 16 + length])
    return {key: value for key, value in (unpacked | changes).items() if value is not None}


def test_a_frame_comes_back_whole() -> None:
    frame = decode_frame(MESSAGE)
    assert frame.header == HEADER
    assert bytes(frame.payload) == PAYLOAD
    assert frame.checksum == CHECKSUM


def test_the_format_is_the_one_written_in_the_proto() -> None:
    assert MESSAGE[:4] == b"HRF1"
    assert int.from_bytes(MESSAGE[4:12], "little") == CHECKSUM == xxhash.xxh3_64_intdigest(MESSAGE[12:])
    assert MESSAGE.endswith(PAYLOAD)
    assert fields() == {
        "l": bytes(range(16)),
        "a": 3,
        "s": 2**64 - 1,
        "r": 5,
        "n": 7,
        "p": "k",
        "y": [2, 4],
        "h": [0, 3],
        "e": [512, 1024],
        "c": "raw",
        "v": 1,
        "b": 4096,
        "d": ["float32"],
        "f": 0,
    }


SLOT = SlotRef(1, 3, len(PAYLOAD))
SLOT_MESSAGE, SLOT_CHECKSUM = encode_frame(HEADER, PAYLOAD, SLOT)


def test_a_payload_in_a_slot_comes_back_whole_under_the_same_checksum() -> None:
    """A frame may be sent again the other way: the manifest must not see it."""
    asked: list[SlotRef] = []

    def read_slot(ref: SlotRef) -> memoryview:
        asked.append(ref)
        return memoryview(PAYLOAD)

    frame = decode_frame(SLOT_MESSAGE, read_slot)
    assert asked == [SLOT]
    assert (frame.header, bytes(frame.payload)) == (HEADER, PAYLOAD)
    assert frame.checksum == SLOT_CHECKSUM == CHECKSUM
    assert frame.wire_bytes == len(SLOT_MESSAGE) < 300


def test_any_flipped_bit_of_a_frame_in_a_slot_or_of_the_slot_is_found() -> None:
    """Where it is in the reference itself, another slot or length is read."""
    slots = {(1, 3): PAYLOAD}

    def read_slot(ref: SlotRef) -> memoryview:
        return memoryview(slots.get(ref[:2], b"other")[: ref.num_bytes])

    for bit in range(len(SLOT_MESSAGE) * 8):
        damaged = bytearray(SLOT_MESSAGE)
        damaged[bit // 8] ^= 1 << bit % 8
        longer = int.from_bytes(damaged[-4:], "little") > len(PAYLOAD)
        if longer and damaged[:-4] == SLOT_MESSAGE[:-4]:
            continue  # a slot of that length is refused by whoever has the slots
        with pytest.raises(DamagedFrame):
            decode_frame(damaged, read_slot)
    slots[1, 3] = PAYLOAD[:-1] + b"x"
    with pytest.raises(DamagedFrame, match="checksum"):
        decode_frame(SLOT_MESSAGE, read_slot)


def test_a_frame_in_a_slot_is_refused_where_there_are_none() -> None:
    for message in (SLOT_MESSAGE, SLOT_MESSAGE[:-1], SLOT_MESSAGE + b"x"):
        with pytest.raises(DamagedFrame, match="without slots"):
            decode_frame(message)


def test_any_flipped_bit_is_found() -> None:
    """Every bit of everything before the payload, and a sample of the payload's."""
    rng = random.Random(1)
    num_header_bits = (len(MESSAGE) - len(PAYLOAD)) * 8
    sample = [rng.randrange(num_header_bits, len(MESSAGE) * 8) for _ in range(500)]
    for bit in [*range(num_header_bits), *sample]:
        damaged = bytearray(MESSAGE)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedFrame):
            decode_frame(damaged)


@pytest.mark.parametrize("length", [0, 3, 15, 16, 40, len(MESSAGE) - 1])
def test_a_truncated_frame_is_found(length: int) -> None:
    with pytest.raises(DamagedFrame):
        decode_frame(MESSAGE[:length])


def test_bytes_behind_a_frame_are_found() -> None:
    with pytest.raises(DamagedFrame):
        decode_frame(MESSAGE + b"\0")


@pytest.mark.parametrize(
    "changes",
    [
        {"l": b"short"},
        {"l": None},
        {"a": -1},
        {"a": 2**32},
        {"s": 1.0},
        {"r": True},
        {"n": None},
        {"p": b"k"},
        {"y": [4, 2]},
        {"h": [0]},
        {"e": [0, "x"]},
        {"e": [-1, 3]},
        {"b": 1 << 40},
        {"c": "x" * 300},
        {"extra": [[[[]]]]},
    ],
)
def test_a_wrong_header_with_a_good_checksum_is_refused(changes: dict[str, object]) -> None:
    packed = msgpack.packb(fields(**changes))
    if "extra" in changes:
        assert decode_frame(seal(packed)).header == HEADER  # later versions may add keys
    else:
        with pytest.raises(DamagedFrame):
            decode_frame(seal(packed))


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x81", b"\x93\1\2\3", b"\xdf\xff\xff\xff\xff", bytes(2000)]
)
def test_what_is_not_a_small_map_is_refused(header: bytes) -> None:
    with pytest.raises(DamagedFrame):
        decode_frame(seal(header))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_headers_never_do_more_than_raise(header: bytes) -> None:
    with pytest.raises(DamagedFrame):
        decode_frame(seal(header))


@pytest.mark.parametrize(
    "ack",
    [
        Ack(7, ok=True, landing_s=0.25, credit=1 << 40),
        Ack(0, ok=False, cause="STALE_EPOCH", message="a: b: c"),
        Ack(None, ok=False, cause="DAMAGED_FRAME", message=""),
    ],
)
def test_an_acknowledgement_comes_back_whole(ack: Ack) -> None:
    assert decode_ack(encode_ack(ack)) == ack


def test_a_long_refusal_is_shortened_so_that_it_arrives() -> None:
    ack = decode_ack(encode_ack(Ack(7, ok=False, cause="LANDING_FAILED", message="\u20ac" * 100_000)))
    assert ack.cause == "LANDING_FAILED"
    assert ack.message.startswith("\u20ac" * 500)


@pytest.mark.parametrize(
    "opening", [Opening(0), Opening(1 << 40, ({"kind": "shm", "bytes": 7, "name": b"x"}, {"kind": "nixl"}))]
)
def test_an_opening_comes_back_whole(opening: Opening) -> None:
    assert decode_opening(encode_opening(opening)) == opening


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc0",
        msgpack.packb({"c": 1}),
        msgpack.packb({"c": -1, "offers": []}),
        encode_ack(Ack(1, ok=True)),
    ],
)
def test_a_wrong_opening_is_refused(message: bytes) -> None:
    with pytest.raises(DamagedFrame):
        decode_opening(message)


def test_the_longest_message_holds_a_piece_and_every_header() -> None:
    layout = CacheLayout((Plane("k", 2, Paged(1), 4, (Field("k", 8, "float32"),)),), 16)
    assert max_frame_bytes(layout, 4096) >= 4096 + MAX_HEADER_BYTES
    assert max_frame_bytes(layout, 100) >= layout.entry_bytes("k") + MAX_HEADER_BYTES


@pytest.mark.parametrize("message", [b"", b"\x80", b"\xc0", msgpack.packb({"n": -1, "ok": True, "t": 0.0})])
def test_a_wrong_acknowledgement_is_refused(message: bytes) -> None:
    with pytest.raises(DamagedFrame):
        decode_ack(message)


def test_every_codec_gives_back_the_length_it_was_given() -> None:
    plane = Plane("k", 4, Paged(1), 2, (Field("k", 8, "float32"),))
    piece = Piece("k", range(1, 3), range(2), range(5, 9))
    raw = torch.randn(plane.num_bytes(piece) // 4, generator=torch.Generator().manual_seed(2)).view(
        torch.uint8
    )
    for codec in CODECS:
        assert find_codec(codec.name, codec.version) is codec
        back = codec.decode(codec.encode(raw, plane, piece), plane, piece)
        assert back.shape == raw.shape
        if codec.fidelity is Fidelity.EXACT:
            assert torch.equal(back, raw)


def test_an_unknown_codec_is_told_with_those_that_are_known() -> None:
    with pytest.raises(UnknownCodec, match=r"'raw version 9'.*known are: raw 1"):
        find_codec("raw", 9)
    with pytest.raises(UnknownCodec, match="'zip'"):
        newest_codec("zip")
    assert newest_codec("raw").version == 1


def test_a_fidelity_bound_allows_its_class_and_better() -> None:
    assert [bound.allows(Fidelity.NEAR) for bound in Fidelity] == [False, True, True]
    assert all(bound.allows(Fidelity.EXACT) for bound in Fidelity)
