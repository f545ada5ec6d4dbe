"""Every kind of damage, over real gRPC: nothing wrong lands, neighbours stay as they are, and the lease goes on.

The cache is full of canaries before each test, so that any byte written where none belongs shows. Pieces travel in
every codec of the registry; what makes a frame good is worked out by the tests, not by the code under test.
"""

from __future__ import annotations

import random
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import zstandard

from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.codecs import CODECS, Codec, newest_codec
from kvtransfer.frames import MAX_RAW_BYTES, Ack, FrameHeader, decode_ack, encode_frame
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, pieces_for
from kvtransfer.lease_types import Grant, LeaseState
from tests.fuzz.mutations import join, seal, split
from tests.integration.kvtransfer_harness import Receiver, Sender, raw_push

pytestmark = pytest.mark.integration

LAYOUT = CacheLayout(
    planes=(
        Plane("k", 2, Paged(1), 2, (Field("k", 8, "bfloat16"),), "channel"),
        Plane("v", 2, Paged(1), 2, (Field("v", 8, "bfloat16"),), "token"),
    ),
    block_tokens=16,
)
NUM_TOKENS = 48
START_TOKEN = 16
PIECES = pieces_for(LAYOUT, range(START_TOKEN, NUM_TOKENS), 1024)
EXACT, COMPACT = 0, 2
MIB = 1 << 20

each_codec = pytest.mark.parametrize("codec", CODECS, ids=[codec.name for codec in CODECS])


class Line:
    """A receiver full of canaries, a sender of real numbers, and one lease between them."""

    def __init__(self, fidelity: int = COMPACT) -> None:
        self.receiver = Receiver(LAYOUT)
        rng = np.random.default_rng(11)
        for pool in self.receiver.store._pools.values():
            pool[:] = rng.integers(0, 256, pool.shape, np.uint8)
        self.sender = Sender(self.receiver, NUM_TOKENS, LAYOUT)
        for plane in LAYOUT.planes:
            piece = Piece(plane.name, range(2), range(2), range(NUM_TOKENS))
            numbers = torch.from_numpy(rng.standard_normal(plane.num_bytes(piece) // 2)).to(torch.bfloat16)
            self.sender.store.scatter(Sender.OWNER, piece, plane, numbers.view(torch.uint8))
        self.neighbour = self.receiver.grant(NUM_TOKENS, request="neighbour", fidelity=fidelity)
        self.grant = self.new_grant(fidelity)

    def new_grant(self, fidelity: int = COMPACT, **changes: Any) -> Grant:
        return self.receiver.grant(NUM_TOKENS, start_token=START_TOKEN, fidelity=fidelity, **changes)

    def frame(self, number: int, codec: Codec, grant: Grant | None = None) -> tuple[bytes, int]:
        """A good frame of piece `number`, and its checksum."""
        piece = PIECES[number]
        plane = LAYOUT.plane(piece.plane)
        header = FrameHeader(
            self.sender.ref(grant or self.grant),
            number,
            piece,
            codec.name,
            codec.version,
            plane.num_bytes(piece),
            plane.dtypes,
        )
        return encode_frame(
            header, codec.encode(self.sender.store.gather(Sender.OWNER, piece, plane), plane, piece)
        )

    def frames(self, codec: Codec) -> tuple[list[bytes], dict[int, tuple[int, int]]]:
        """All of them, and the manifest."""
        made = [self.frame(number, codec) for number in range(len(PIECES))]
        manifest = {n: (PIECES[n].num_bytes(LAYOUT), checksum) for n, (_, checksum) in enumerate(made)}
        return [message for message, _ in made], manifest

    def push(self, *messages: bytes) -> list[Ack]:
        return [decode_ack(answer) for answer in raw_push(self.sender.channel, list(messages))]

    def commit(self, manifest: dict[int, tuple[int, int]], **changes: int) -> pb.CommitResponse:
        ref = self.sender.ref(self.grant, **changes)
        lease = pb.LeaseRef(
            lease_id=ref.lease_id,
            attempt=ref.attempt,
            sender_epoch=ref.sender_epoch,
            receiver_epoch=ref.receiver_epoch,
        )
        request = pb.CommitRequest(lease=lease, handoff=self.sender.handoff(NUM_TOKENS), remaining_s=5.0)
        for number, (raw_bytes, checksum) in manifest.items():
            request.manifest.add(frame=number, raw_bytes=raw_bytes, checksum=checksum)
        return pb_grpc.KvTransferStub(self.sender.channel).Commit(request, timeout=10.0)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Not one byte of the receiver's memory changes in here."""
        before = {name: pool.copy() for name, pool in self.receiver.store._pools.items()}
        yield
        for name, pool in self.receiver.store._pools.items():
            assert np.array_equal(pool, before[name]), f"memory of plane {name} changed"

    def assert_goes_on(self, codec: Codec) -> None:
        """The lease is none the worse: the good frames land where they belong, nowhere else, and commit."""
        expected = self._expected(codec)
        messages, manifest = self.frames(codec)
        assert all(ack.ok for ack in self.push(*messages))
        assert self.commit(manifest).state == pb.LEASE_STATE_COMMITTED
        for name, pool in self.receiver.store._pools.items():
            assert np.array_equal(pool, expected[name]), f"plane {name} is not what was sent"

    def _expected(self, codec: Codec) -> dict[str, np.ndarray]:
        store, lease_id = self.receiver.store, self.grant.lease_id
        expected = {name: pool.copy() for name, pool in store._pools.items()}
        for number, piece in enumerate(PIECES):
            plane = LAYOUT.plane(piece.plane)
            _, payload = split(self.frame(number, codec)[0])
            rows = iter(codec.decode(payload, plane, piece).numpy().reshape(-1, plane.record_bytes))
            slots = store._slots(lease_id, piece)
            for layer in piece.layers:
                for slot in slots:
                    for head in piece.heads:
                        expected[piece.plane][layer, slot, head] = next(rows)
        return expected

    def close(self) -> None:
        """Nobody is in the way of anything any more, and nothing is left."""
        with self.receiver.desk.change() as table:
            table.fence(1)
        assert self.receiver.table.num_held == 0
        assert self.receiver.store.num_owners == 0
        self.sender.close()
        self.receiver.close()
        assert self.receiver.credits.num_streams == 0


@pytest.fixture
def line() -> Iterator[Line]:
    threads = _num_threads()
    line = Line()
    yield line
    line.close()
    deadline = time.monotonic() + 20
    while _num_threads() > threads:
        assert time.monotonic() < deadline, f"threads are left: {threading.enumerate()}"
        time.sleep(0.01)


def _num_threads() -> int:
    """Without the server's own, which its pool keeps."""
    return sum(not thread.name.startswith("kv-bulk") for thread in threading.enumerate())


# ---- bytes on their way


@each_codec
def test_a_flipped_bit_in_any_byte_is_noticed(line: Line, codec: Codec) -> None:
    good, _ = line.frame(0, codec)
    rng = random.Random(3)
    spoiled = []
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << rng.randrange(8)
        spoiled.append(bytes(flipped))
    with line.unchanged():
        acks = line.push(*spoiled)
    assert {(ack.ok, ack.cause, ack.number) for ack in acks} == {(False, "DAMAGED_FRAME", None)}
    line.assert_goes_on(codec)


@each_codec
def test_a_frame_cut_short_or_with_something_behind_it_is_noticed(line: Line, codec: Codec) -> None:
    good, _ = line.frame(0, codec)
    spoiled = [good[:length] for length in range(1, len(good))]
    spoiled += [good + b"\0", good + good, b"\0" + good]
    with line.unchanged():
        acks = line.push(*spoiled)
    assert {(ack.ok, ack.cause) for ack in acks} == {(False, "DAMAGED_FRAME")}
    line.assert_goes_on(codec)


@each_codec
def test_a_sealed_frame_whose_payload_has_another_length_does_not_land(line: Line, codec: Codec) -> None:
    header, payload = split(line.frame(0, codec)[0])
    spoiled = [join({**header, "n": 100 + at}, payload[:at]) for at in range(len(payload))]
    spoiled += [join({**header, "n": 9000 + more}, payload + bytes(more)) for more in (1, 2, 64)]
    with line.unchanged():
        acks = line.push(*spoiled)
    assert {ack.cause for ack in acks} == {"LANDING_FAILED"}
    assert not line.receiver.lease(line.grant).landing
    line.assert_goes_on(codec)


@each_codec
def test_a_payload_that_is_not_what_the_manifest_says_never_becomes_visible(line: Line, codec: Codec) -> None:
    """Sealed anew it may well decode, into the lease's own private memory; the commit finds out."""
    messages, manifest = line.frames(codec)
    header, payload = split(messages[1])
    spoiled = join(header, payload[:-1] + bytes((payload[-1] ^ 1,)))
    with line.receiver.lock:
        neighbour = line.receiver.store.read(line.neighbour.lease_id, NUM_TOKENS)
    line.push(messages[0], spoiled, *messages[2:])
    answer = line.commit(manifest)
    assert answer.state in (pb.LEASE_STATE_ABORTED, pb.LEASE_STATE_FILLING)
    assert not line.receiver.committed
    assert line.receiver.store.read(line.neighbour.lease_id, NUM_TOKENS) == neighbour


# ---- header fields, with a checksum that is right


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown lease": ({"l": bytes(16)}, "UNKNOWN_LEASE"),
    "an older attempt": ({"a": 0}, "STALE_ATTEMPT"),
    "a newer attempt": ({"a": 2}, "STALE_ATTEMPT"),
    "another incarnation of the receiver": ({"r": 5}, "STALE_EPOCH"),
    "an unknown plane": ({"p": "w"}, "BAD_PIECE"),
    "layers beyond the plane": ({"y": [1, 3]}, "BAD_PIECE"),
    "no layers": ({"y": [1, 1]}, "BAD_PIECE"),
    "layers backwards": ({"y": [1, 0]}, "DAMAGED_FRAME"),
    "heads beyond the plane": ({"h": [0, 3]}, "BAD_PIECE"),
    "entries of the prefix that is held": ({"e": [15, 47]}, "BAD_PIECE"),
    "entries beyond the lease's blocks": ({"e": [40, 72]}, "LANDING_FAILED"),
    "as many entries as there are numbers": ({"e": [16, (1 << 63) - 1]}, "BAD_PIECE"),
    "entries below zero": ({"e": [-1, 31]}, "DAMAGED_FRAME"),
    "an unknown codec": ({"c": "zip"}, "UNKNOWN_CODEC"),
    "an unknown version of the codec": ({"v": 99}, "UNKNOWN_CODEC"),
    "one byte more": ({"b": 1025}, "BAD_PIECE"),
    "one byte less": ({"b": 1023}, "BAD_PIECE"),
    "more bytes than any frame": ({"b": MAX_RAW_BYTES + 1}, "DAMAGED_FRAME"),
    "a wider dtype": ({"d": ["float32"]}, "BAD_PIECE"),
    "a dtype that does not convert": ({"d": ["int8"]}, "BAD_PIECE"),
    "a dtype that nobody knows": ({"d": ["float12"]}, "BAD_PIECE"),
    "two dtypes": ({"d": ["bfloat16", "bfloat16"]}, "BAD_PIECE"),
    "a dtype that rounds": ({"d": ["float16"]}, "FIDELITY_EXCEEDED"),
    "content that has lost something": ({"f": 1}, "FIDELITY_EXCEEDED"),
    "a rank that does not exist": ({"f": 255}, "FIDELITY_EXCEEDED"),
    "a rank out of range": ({"f": 256}, "DAMAGED_FRAME"),
}


@pytest.fixture
def exact_line() -> Iterator[Line]:
    line = Line(EXACT)
    yield line
    line.close()


@pytest.mark.parametrize("name", HEADERS)
def test_a_sealed_frame_with_one_wrong_fact_does_not_land(exact_line: Line, name: str) -> None:
    changes, cause = HEADERS[name]
    raw = newest_codec("raw")
    header, payload = split(exact_line.frame(0, raw)[0])
    assert header["b"] == len(payload) == 1024
    with exact_line.unchanged():
        [ack] = exact_line.push(join({**header, **changes}, payload))
    assert (ack.ok, ack.cause) == (False, cause)
    exact_line.assert_goes_on(raw)


def test_another_incarnation_of_the_sender_does_not_land_beside_the_first(exact_line: Line) -> None:
    raw = newest_codec("raw")
    first, _ = exact_line.frame(0, raw)
    header, payload = split(exact_line.frame(1, raw)[0])
    [ack] = exact_line.push(first)
    assert ack.ok
    with exact_line.unchanged():
        [ack] = exact_line.push(join({**header, "s": 77}, payload))
    assert ack.cause == "STALE_EPOCH"
    exact_line.assert_goes_on(raw)


@pytest.mark.parametrize("key", list("lasrnpyhecvbdf"))
def test_a_header_without_one_of_its_keys_or_with_another_type_is_no_frame(
    exact_line: Line, key: str
) -> None:
    raw = newest_codec("raw")
    header, payload = split(exact_line.frame(0, raw)[0])
    without = {k: v for k, v in header.items() if k != key}
    others: tuple[Any, ...] = (None, 0.5, True, -1, 1 << 63, {"a": 1}, [[1]], [1, 2, 3], "x" * 300, b"x")
    values = [value for value in others if not _is_possible(key, value)]
    spoiled = [join(without, payload), *(join({**header, key: value}, payload) for value in values)]
    with exact_line.unchanged():
        acks = exact_line.push(*spoiled)
    assert {ack.cause for ack in acks} == {"DAMAGED_FRAME"}
    exact_line.assert_goes_on(raw)


def _is_possible(key: str, value: object) -> bool:
    """Whether it could be meant: epochs have 64 bits."""
    return key in "sr" and value == 1 << 63


def test_a_header_length_that_lies_is_noticed(exact_line: Line) -> None:
    good, _ = exact_line.frame(0, newest_codec("raw"))
    (length,) = struct.unpack_from("<I", good, 12)
    spoiled = []
    for wrong in (0, 1, length - 1, length + 1, len(good), 1024, 1025, 1 << 31, (1 << 32) - 1):
        spoiled.append(seal(good[:12] + struct.pack("<I", wrong) + good[16:]))
    with exact_line.unchanged():
        acks = exact_line.push(*spoiled)
    assert {ack.cause for ack in acks} == {"DAMAGED_FRAME"}


# ---- whole frames, in the wrong place or at the wrong time


@each_codec
def test_frames_in_any_order_and_repeated_land_as_in_order(line: Line, codec: Codec) -> None:
    expected = line._expected(codec)
    messages, manifest = line.frames(codec)
    shuffled = messages * 3
    random.Random(5).shuffle(shuffled)
    assert all(ack.ok for ack in line.push(*shuffled))
    assert line.receiver.store.num_scatters == len(PIECES)
    assert line.commit(manifest).state == pb.LEASE_STATE_COMMITTED
    for name, pool in line.receiver.store._pools.items():
        assert np.array_equal(pool, expected[name])


def test_a_number_that_has_landed_does_not_land_with_other_bytes(exact_line: Line) -> None:
    raw = newest_codec("raw")
    messages, _ = exact_line.frames(raw)
    header, payload = split(messages[0])
    assert exact_line.push(messages[0])[0].ok
    with exact_line.unchanged():
        acks = exact_line.push(join(header, bytes(len(payload))), join({**header, "y": [1, 2]}, payload))
    assert [ack.cause for ack in acks] == ["FRAME_CONFLICT"] * 2
    exact_line.assert_goes_on(raw)


def test_frames_of_an_incarnation_that_is_gone_do_not_land(exact_line: Line) -> None:
    raw = newest_codec("raw")
    messages, manifest = exact_line.frames(raw)
    with exact_line.receiver.desk.change() as table:
        table.fence(4711)
    with exact_line.unchanged():
        acks = exact_line.push(*messages)
        answer = exact_line.commit(manifest)
    assert {ack.cause for ack in acks} == {"STALE_EPOCH"}
    assert (answer.state, answer.reason[:11]) == (pb.LEASE_STATE_UNSPECIFIED, "STALE_EPOCH")


def test_frames_of_an_older_attempt_do_not_land_in_the_newer_ones_memory(exact_line: Line) -> None:
    raw = newest_codec("raw")
    messages, manifest = exact_line.frames(raw)
    assert exact_line.push(messages[0])[0].ok
    newer = exact_line.new_grant(EXACT, attempt=2)
    as_newer, _ = exact_line.frame(1, raw, newer)
    mixed = join({**split(as_newer)[0], "a": 1}, split(as_newer)[1])
    with exact_line.unchanged():
        acks = exact_line.push(*messages, mixed)
        answer = exact_line.commit(manifest)
    assert [ack.cause for ack in acks] == ["LEASE_CLOSED"] * len(messages) + ["STALE_ATTEMPT"]
    assert answer.state == pb.LEASE_STATE_ABORTED
    exact_line.grant = newer
    exact_line.assert_goes_on(raw)


@each_codec
def test_nothing_lands_after_the_commit(line: Line, codec: Codec) -> None:
    line.assert_goes_on(codec)
    messages, manifest = line.frames(codec)
    header, payload = split(messages[0])
    with line.unchanged():
        acks = line.push(*messages, join({**header, "n": 50}, payload))
        assert line.commit(manifest).state == pb.LEASE_STATE_COMMITTED
    # What landed is said to have landed; what is new is not let in.
    assert [ack.cause for ack in acks] == [""] * len(messages) + ["LEASE_CLOSED"]
    assert len(line.receiver.committed) == 1


def test_nothing_lands_after_an_abort_and_the_memory_is_somebody_elses(exact_line: Line) -> None:
    raw = newest_codec("raw")
    messages, manifest = exact_line.frames(raw)
    exact_line.push(messages[0])
    with exact_line.receiver.desk.change() as table:
        assert table.abort(exact_line.sender.ref(exact_line.grant), "TEST").state is LeaseState.ABORTED
    heir = exact_line.new_grant(EXACT, request="heir")  # the free blocks go to the next one
    with exact_line.unchanged():
        acks = exact_line.push(*messages)
        assert exact_line.commit(manifest).state == pb.LEASE_STATE_ABORTED
    assert {ack.cause for ack in acks} == {"LEASE_CLOSED"}
    exact_line.grant = heir
    exact_line.assert_goes_on(raw)


# ---- bombs


def _zeros(num_bytes: int, *, declared: bool = True) -> bytes:
    """A zstd frame of a few bytes for each megabyte."""
    writer = zstandard.ZstdCompressor(write_content_size=declared)
    if declared:
        return writer.compress(bytes(num_bytes))
    stream = writer.compressobj()
    return stream.compress(bytes(num_bytes)) + stream.flush()


def _bombs() -> dict[str, bytes]:
    """Streams (how, length, bytes) that would become 64 MiB."""
    big = 64 * MIB
    lying = bytearray(_zeros(big))
    small = _zeros(1024)
    frames = {
        "declares 64 MiB": bytes(lying),
        "declares nothing": _zeros(big, declared=False),
        # The head of a frame of 1 KiB before the blocks of one of 64 MiB.
        "declares 1 KiB": small[: zstandard.frame_header_size(small)]
        + bytes(lying)[zstandard.frame_header_size(bytes(lying)) :],
        "two frames": small + _zeros(big),
    }
    return {name: struct.pack("<BI", 1, len(data)) + data for name, data in frames.items()}


@each_codec
def test_a_payload_that_would_become_more_than_the_piece_is_refused_before_it_does(
    line: Line, codec: Codec
) -> None:
    """Wherever a stream is expected: as the whole payload, as a field, behind a field's own head."""
    header, payload = split(line.frame(0, codec)[0])
    spoiled = []
    for bomb in _bombs().values():
        spoiled += [bomb, payload + bomb]
        for mode in range(5):
            for head in (
                b"",
                b"\0" * 5,
                b"\1" + struct.pack("<I", (1 << 32) - 1),
                struct.pack("<I", 1 << 31),
            ):
                body = head + bomb * 3
                spoiled.append(struct.pack("<BI", mode, len(body)) + body)
    messages = [join({**header, "n": 100 + n}, payload) for n, payload in enumerate(spoiled)]
    line.push(messages[0])  # what is made once has been made
    del spoiled
    tracemalloc.start()
    with line.unchanged():
        acks = line.push(*messages)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {ack.cause for ack in acks} == {"LANDING_FAILED"}
    assert peak < 8 * MIB
    line.assert_goes_on(codec)


def test_a_piece_beyond_the_leases_memory_is_refused_before_it_is_decoded(line: Line) -> None:
    """Half a kilobyte that is a good frame of a piece of 60 MiB: no other codec makes so little of zeros."""
    codec, plane = newest_codec("ecsq"), LAYOUT.planes[0]
    piece = Piece("k", range(2), range(2), range(START_TOKEN, START_TOKEN + 60 * MIB // 64))
    num_bytes = plane.num_bytes(piece)
    payload = codec.encode(torch.zeros(num_bytes, dtype=torch.uint8), plane, piece)
    header = FrameHeader(
        line.sender.ref(line.grant), 0, piece, codec.name, codec.version, num_bytes, plane.dtypes
    )
    message, _ = encode_frame(header, payload)
    assert len(message) < 1024
    tracemalloc.start()
    with line.unchanged():
        [ack] = line.push(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ack.cause == "LANDING_FAILED"
    assert peak < 8 * MIB
    line.assert_goes_on(codec)


def test_a_message_beyond_what_the_line_takes_ends_the_stream_and_nothing_else(line: Line) -> None:
    header, payload = split(line.frame(0, newest_codec("raw"))[0])
    with line.unchanged(), pytest.raises(grpc.RpcError) as failed:
        line.push(join(header, payload + bytes(17 * MIB)))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    line.assert_goes_on(newest_codec("raw"))
