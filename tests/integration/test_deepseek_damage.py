"""Corruption drills for DeepSeek-V4's cache, over real gRPC: every plane and every window altered, dropped, swapped
between two requests, or taken from another boundary. Nothing of it is ever committed; what is whole is.

In every engine that serves V4 the small windows have been where silent corruption came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.models.config_keys import ConfigKeys
from engine.models.deepseek.layouts import FP8, v4_layout
from engine.models.families import config_of
from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.frames import FrameHeader, decode_ack, encode_frame
from kvtransfer.layouts import CacheLayout, Piece, Window, pieces_for, window_pieces_for
from kvtransfer.lease_types import Grant
from tests.deepseek_checkpoints import v4_config
from tests.fuzz.mutations import join, split
from tests.integration.kvtransfer_harness import Receiver, Sender, raw_push

pytestmark = pytest.mark.integration

CONFIG = config_of(ConfigKeys(v4_config(num_hidden_layers=3, compress_ratios=[0, 4, 128]).to_dict(), "v4"))
LAYOUT: CacheLayout = v4_layout(CONFIG, FP8)  # type: ignore[arg-type]
PLANES = [plane.name for plane in LAYOUT.planes]
WINDOWS = [plane.name for plane in LAYOUT.planes if isinstance(plane.kind, Window)]
NUM_TOKENS = 303  # no boundary of anything

Manifest = dict[int, tuple[int, int]]


class Requests:
    """Two requests of one length with different contents, from two senders to one receiver."""

    def __init__(self) -> None:
        self.receiver = Receiver(LAYOUT, max_wait_s=0.2)
        self.senders = [Sender(self.receiver, NUM_TOKENS, LAYOUT, seed=seed) for seed in (1, 2)]
        self.grants = [self.receiver.grant(NUM_TOKENS, request=name) for name in ("one", "other")]

    def frames(self, request: int, num_tokens: int = NUM_TOKENS) -> tuple[list[bytes], Manifest]:
        """All frames of a request, the windows as they are at `num_tokens`, and the manifest that belongs to them."""
        messages, manifest = [], {}
        for number, piece in enumerate(pieces(num_tokens)):
            message, checksum = self.senders[request].frame(self.ref(request), number, piece)
            messages.append(message)
            manifest[number] = (piece.num_bytes(LAYOUT), checksum)
        return messages, manifest

    def ref(self, request: int):  # type: ignore[no-untyped-def]
        return self.senders[request].ref(self.grants[request])

    def push(self, messages: list[bytes]) -> list[str]:
        return [decode_ack(ack).cause for ack in raw_push(self.senders[0].channel, messages)]

    def commit(self, request: int, manifest: Manifest) -> pb.CommitResponse:
        ref, sender = self.ref(request), self.senders[request]
        lease = pb.LeaseRef(
            lease_id=ref.lease_id,
            attempt=ref.attempt,
            sender_epoch=ref.sender_epoch,
            receiver_epoch=ref.receiver_epoch,
        )
        asked = pb.CommitRequest(lease=lease, handoff=sender.handoff(NUM_TOKENS), remaining_s=0.2)
        for number, (raw_bytes, checksum) in manifest.items():
            asked.manifest.add(frame=number, raw_bytes=raw_bytes, checksum=checksum)
        return pb_grpc.KvTransferStub(sender.channel).Commit(asked, timeout=10.0)

    def assert_refused(self, request: int, manifest: Manifest) -> None:
        answer = self.commit(request, manifest)
        assert answer.state != pb.LEASE_STATE_COMMITTED, answer
        assert not self.receiver.committed

    def assert_taken(self, request: int) -> None:
        """Whole, and as it was sent."""
        messages, manifest = self.frames(request)
        assert set(self.push(messages)) == {""}
        assert self.commit(request, manifest).state == pb.LEASE_STATE_COMMITTED
        grant: Grant = self.grants[request]
        sent = self.senders[request].store.read(Sender.OWNER, NUM_TOKENS)
        assert self.receiver.store.read(grant.lease_id, NUM_TOKENS) == sent

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        self.receiver.close()


def pieces(num_tokens: int) -> list[Piece]:
    return [*pieces_for(LAYOUT, range(NUM_TOKENS), 4096), *window_pieces_for(LAYOUT, num_tokens, 4096)]


def numbers_of(plane: str) -> list[int]:
    """Frames that carry something of a plane."""
    found = [number for number, piece in enumerate(pieces(NUM_TOKENS)) if piece.plane == plane]
    assert found
    return found


@pytest.fixture
def requests() -> Iterator[Requests]:
    made = Requests()
    yield made
    made.close()


def test_what_is_whole_is_taken(requests: Requests) -> None:
    requests.assert_taken(0)
    requests.assert_taken(1)


@pytest.mark.parametrize("plane", PLANES)
def test_an_altered_plane_does_not_land_and_is_not_committed(requests: Requests, plane: str) -> None:
    messages, manifest = requests.frames(0)
    for number in numbers_of(plane):
        spoiled = bytearray(messages[number])
        spoiled[-1] ^= 1
        assert requests.push([bytes(spoiled)]) == ["DAMAGED_FRAME"]
    number = numbers_of(plane)[0]
    header, payload = split(messages[number])
    sealed_anew = join(header, bytes([payload[0] ^ 1]) + payload[1:])
    requests.push([*messages[:number], sealed_anew, *messages[number + 1 :]])
    requests.assert_refused(0, manifest)


@pytest.mark.parametrize("plane", PLANES)
def test_a_dropped_plane_is_missed(requests: Requests, plane: str) -> None:
    messages, manifest = requests.frames(0)
    gone = numbers_of(plane)[-1]
    requests.push([message for number, message in enumerate(messages) if number != gone])
    requests.assert_refused(0, manifest)  # it waited for what did not come


@pytest.mark.parametrize("plane", PLANES)
def test_a_manifest_without_a_plane_is_not_enough(requests: Requests, plane: str) -> None:
    messages, manifest = requests.frames(0)
    gone = numbers_of(plane)[-1]
    del manifest[gone]
    requests.push([message for number, message in enumerate(messages) if number != gone])
    requests.assert_refused(0, manifest)
    assert plane in requests.commit(0, manifest).reason


@pytest.mark.parametrize("plane", PLANES)
def test_a_plane_of_another_request_is_refused(requests: Requests, plane: str) -> None:
    """Its content under this request's header; and its frame as it is, in this one's place."""
    messages, manifest = requests.frames(0)
    others, _ = requests.frames(1)
    number = numbers_of(plane)[0]
    swapped = join(split(messages[number])[0], split(others[number])[1])
    requests.push([*messages[:number], swapped, *messages[number + 1 :]])
    requests.assert_refused(0, manifest)


@pytest.mark.parametrize("plane", PLANES)
def test_a_frame_of_another_request_does_not_fill_the_place_of_ones_own(
    requests: Requests, plane: str
) -> None:
    messages, manifest = requests.frames(0)
    others, _ = requests.frames(1)
    number = numbers_of(plane)[0]
    requests.push([*messages[:number], others[number], *messages[number + 1 :]])
    requests.assert_refused(0, manifest)
    requests.assert_taken(1)


@pytest.mark.parametrize("plane", WINDOWS)
@pytest.mark.parametrize("boundary", [256, NUM_TOKENS - 4, NUM_TOKENS - 1, NUM_TOKENS + 1])
def test_windows_of_another_boundary_are_refused(requests: Requests, plane: str, boundary: int) -> None:
    """Also where the manifest says the same as the frames."""
    layout_plane = LAYOUT.plane(plane)
    if layout_plane.live(boundary) == layout_plane.live(NUM_TOKENS):
        pytest.skip("the same rows")
    sender, ref = requests.senders[0], requests.ref(0)
    sender.store.free(Sender.OWNER)
    sender.store.allocate(Sender.OWNER, NUM_TOKENS + 4)
    sender.store.fill(Sender.OWNER, NUM_TOKENS + 4)
    messages, manifest = [], {}
    kept = [piece for piece in pieces(NUM_TOKENS) if piece.plane != plane]
    taken = [piece for piece in window_pieces_for(LAYOUT, boundary, 4096) if piece.plane == plane]
    for number, piece in enumerate([*kept, *taken]):
        message, checksum = sender.frame(ref, number, piece)
        messages.append(message)
        manifest[number] = (piece.num_bytes(LAYOUT), checksum)
    requests.push(messages)
    answer = requests.commit(0, manifest)
    assert answer.state != pb.LEASE_STATE_COMMITTED
    assert not requests.receiver.committed


@pytest.mark.parametrize("plane", PLANES)
def test_a_plane_of_other_fields_is_refused(requests: Requests, plane: str) -> None:
    number = numbers_of(plane)[0]
    piece = pieces(NUM_TOKENS)[number]
    here = LAYOUT.plane(plane)
    header = FrameHeader(requests.ref(0), number, piece, "raw", 1, here.num_bytes(piece), here.dtypes)
    raw = requests.senders[0].store.gather(Sender.OWNER, piece, here).numpy().data
    narrowed = tuple("int8" for _ in here.dtypes)
    message, _ = encode_frame(replace(header, dtypes=narrowed), raw)
    assert requests.push([message]) == ["BAD_PIECE"]
