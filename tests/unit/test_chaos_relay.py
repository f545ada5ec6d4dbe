"""The relay's pure parts: HTTP/2 is cut into frames however it arrives; one bit of KV frames is changed, no other."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos_relay import HTTP2_PREFACE, Http2Frames, flip_kv
from kvtransfer.frames import MAGIC, SLOT_MAGIC

pytestmark = pytest.mark.unit


def http2(kind: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + (1).to_bytes(4, "big") + payload


def message(body: bytes) -> bytes:
    return struct.pack(">BI", 0, len(body)) + body


FRAMES = st.lists(st.builds(http2, st.integers(0, 9), st.binary(max_size=200)), max_size=8)


@given(FRAMES, st.booleans(), st.lists(st.integers(1, 50), max_size=60))
def test_frames_come_out_whole_however_the_bytes_arrive(
    frames: list[bytes], from_client: bool, cuts: list[int]
) -> None:
    stream = (HTTP2_PREFACE if from_client else b"") + b"".join(frames)
    cutter, found, start = Http2Frames(from_client=from_client), [], 0
    for length in [*cuts, len(stream)]:
        found += [bytes(part) for part in cutter.feed(stream[start : start + length])]
        start += length
    assert found == ([HTTP2_PREFACE] if from_client else []) + frames


def num_changed_bits(before: bytes, after: bytes) -> int:
    return sum((old ^ new).bit_count() for old, new in zip(before, after, strict=True))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([MAGIC, SLOT_MAGIC]),
    st.binary(max_size=300),
    st.binary(max_size=30),
)
def test_one_bit_of_a_kv_frame_is_changed(seed: int, magic: bytes, body: bytes, behind: bytes) -> None:
    kv = message(magic + body)
    before = http2(0, kv + behind)
    after = bytearray(before)
    assert flip_kv(after, random.Random(seed))
    assert num_changed_bits(before, after) == 1
    start, end = len(http2(0, b"")) + 5, len(http2(0, kv))
    assert after[:start] == before[:start]
    assert after[end:] == before[end:]


@given(st.integers(0, 9), st.binary(max_size=100))
def test_nothing_else_is(kind: int, body: bytes) -> None:
    other = http2(kind, message(body.replace(MAGIC, b"").replace(SLOT_MAGIC, b"")))
    headers = http2(1, message(MAGIC + body))
    for before in (other, headers, HTTP2_PREFACE):
        if MAGIC in before and before is other:
            continue
        after = bytearray(before)
        assert not flip_kv(after, random.Random(1))
        assert after == before
