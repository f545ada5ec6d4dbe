"""What a push chooses and is bound by: codec by codec, fidelity, dtypes on the wire, the receiver's credit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch

from engine.cache import PagedCache
from engine.models.layouts import gqa_layout
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import CodecChoice
from kvtransfer.codecs import newest_codec
from kvtransfer.frame_builder import PieceEncoder
from kvtransfer.frames import AckFault, FrameHeader, LeaseRef, decode_opening
from kvtransfer.landing import CannotLand
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, pieces_for
from kvtransfer.lease_types import LeaseState
from kvtransfer.transports.grpc_push import PushOptions
from kvtransfer.transports.seam import TransferError
from tests.integration.kvtransfer_harness import (
    GQA,
    Receiver,
    Sender,
    flip_messages,
    holding,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

EXACT = [newest_codec("raw"), newest_codec("split")]


class Alternating:
    """Another codec for every frame; remembers what it was told."""

    def __init__(self) -> None:
        self.bytes_left: list[int] = []
        self.encoded: list[tuple[str, int]] = []
        self.landed: list[tuple[str, int]] = []
        self.times: list[float] = []

    def choose(self, bytes_left: int) -> CodecChoice:
        self.bytes_left.append(bytes_left)
        codec = EXACT[len(self.bytes_left) % 2]
        return CodecChoice(codec, f"number {len(self.bytes_left)}")

    def note_encoded(self, codec: str, raw_bytes: int, payload_bytes: int, encode_s: float) -> None:
        self.encoded.append((codec, raw_bytes))
        self.times.append(encode_s)

    def note_landed(
        self, codec: str, raw_bytes: int, payload_bytes: int, in_flight_s: float, landing_s: float
    ) -> None:
        self.landed.append((codec, raw_bytes))
        self.times += [in_flight_s, landing_s]


def test_every_frame_may_take_another_codec(receiver: Receiver, sender: Sender) -> None:
    chooser = Alternating()
    grant = receiver.grant(200)
    session = sender.session(grant, chooser=chooser)
    assert sender.push_all(session, 200).is_committed
    assert receiver.store.read(grant.lease_id, 200) == sender.store.read(sender.OWNER, 200)
    stats = session.stats()
    assert set(stats.codecs) == {"raw", "split"}
    assert sum(stats.codecs.values()) == stats.kv_bytes == GQA.num_bytes(200)
    assert stats.reason.startswith("number ")
    assert chooser.encoded == chooser.landed
    assert len(chooser.encoded) == stats.num_frames == len(chooser.bytes_left)
    assert all(0 <= seconds < 20 for seconds in chooser.times)
    assert chooser.bytes_left[-1] == chooser.encoded[-1][1]  # the last frame is all that is left


def test_a_frame_that_goes_again_keeps_its_codec(receiver: Receiver, sender: Sender) -> None:
    """Another codec would make other bytes, which conflict with a first copy that landed unseen."""
    flip_messages(sender, {0, 3, 4})
    chooser = Alternating()
    grant = receiver.grant(200)
    session = sender.session(grant, chooser=chooser)
    assert sender.push_all(session, 200).is_committed
    assert session.stats().num_resent == 3
    assert len(chooser.bytes_left) == session.stats().num_frames
    assert receiver.store.read(grant.lease_id, 200) == sender.store.read(sender.OWNER, 200)


# ---- fidelity


def test_content_worse_than_the_lease_allows_is_refused_and_not_written(
    receiver: Receiver, sender: Sender
) -> None:
    grant = receiver.grant(64)
    session = sender.session(grant)
    session.declare_fidelity(1)
    session.advance(64)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(64), 10.0)
    assert failed.value.cause == AckFault.FIDELITY_EXCEEDED
    assert receiver.store.num_scatters == 0
    assert session.abort("FAILED") is LeaseState.ABORTED


def test_a_codec_that_loses_more_than_the_lease_allows_is_refused(receiver: Receiver, sender: Sender) -> None:
    session = sender.session(receiver.grant(64, fidelity=1), codec=newest_codec("int4"))
    session.advance(64)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(64), 10.0)
    assert failed.value.cause == AckFault.FIDELITY_EXCEEDED
    assert receiver.store.num_scatters == 0


@pytest.mark.parametrize(
    ("declared", "codec", "landed"), [(0, "raw", 0), (1, "raw", 1), (0, "int8", 1), (2, "int8", 2)]
)
def test_the_commit_tells_the_worst_that_landed(
    receiver: Receiver, sender: Sender, declared: int, codec: str, landed: int
) -> None:
    session = sender.session(receiver.grant(64, fidelity=2), codec=newest_codec(codec))
    session.declare_fidelity(declared)
    assert sender.push_all(session, 64).is_committed
    assert receiver.fidelities == [landed]


def paged_cache(dtype: str, seed: int | None = None) -> PagedCache:
    cache = PagedCache(gqa_layout(2, 2, 8, dtype, 16), 4, torch.device("cpu"), lambda owner: [2, 0, 3])
    if seed is not None:
        for tensor in cache.planes.values():
            tensor.normal_(generator=torch.Generator().manual_seed(seed))
    return cache


@pytest.mark.parametrize(
    ("stored", "wire", "there", "sent", "landed"),
    [
        ("float32", "float32", "float32", 0, 0),
        ("float32", "bfloat16", "bfloat16", 1, 1),
        ("bfloat16", "bfloat16", "float32", 0, 1),
    ],
)
def test_a_conversion_of_dtypes_on_either_side_counts_as_near(
    stored: str, wire: str, there: str, sent: int, landed: int
) -> None:
    source, target = paged_cache(stored, seed=1), paged_cache(there)
    layout = source.layout.with_dtypes([[wire], [wire]])
    piece = pieces_for(layout, range(40))[0]
    encoded = PieceEncoder(source, b"any", source.layout, layout).encode(piece, newest_codec("raw"), 0)
    assert encoded.fidelity == sent
    lease = LeaseRef(bytes(16), 1, 2, 3)
    header = FrameHeader(
        lease, 0, piece, "raw", 1, encoded.raw_bytes, encoded.dtypes, fidelity=encoded.fidelity
    )
    assert CacheSink(target, target.layout).check(header) == landed


def test_a_sink_refuses_a_codec_that_it_does_not_know() -> None:
    cache = paged_cache("float32")
    header = FrameHeader(
        LeaseRef(bytes(16), 1, 2, 3), 0, Piece("k", *[range(1)] * 3), "zip", 1, 32, ("float32",)
    )
    with pytest.raises(CannotLand) as refused:
        CacheSink(cache, cache.layout).check(header)
    assert refused.value.fault is AckFault.UNKNOWN_CODEC


# ---- credit

MIB_FRAMES = CacheLayout((Plane("k", 64, Paged(1), 8, (Field("k", 128, "float32"),)),), 16)
"""256 KiB a token."""


def test_a_sender_reads_no_more_than_the_receivers_credit() -> None:
    gate = threading.Event()
    receiver = Receiver(MIB_FRAMES, pace=holding(gate), landing_bytes=8 << 20)
    sender = Sender(receiver, 128, MIB_FRAMES)
    sizes: list[int] = []
    gather = sender.store.gather

    def counting_gather(
        owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        sizes.append(piece.num_bytes(MIB_FRAMES))
        return gather(owner, piece, wire, out)

    sender.store.gather = counting_gather  # type: ignore[method-assign]
    session = sender.session(receiver.grant(128), options=PushOptions(window_bytes=1 << 30))
    session.advance(128)
    wait_until(lambda: len(sizes) > 1)  # more than the one that may go without credit
    time.sleep(0.3)  # room to overrun
    assert sum(sizes) <= 8 << 20
    gate.set()
    assert session.commit(sender.handoff(128), 20.0).is_committed
    sender.close()
    receiver.close()


def test_a_stream_more_than_the_budget_carries_waits_for_its_turn() -> None:
    receiver = Receiver(MIB_FRAMES, landing_bytes=10 << 20)
    assert receiver.credits.max_streams == 2
    sender = Sender(receiver, 16, MIB_FRAMES)
    leave = threading.Event()

    def idle() -> Iterator[bytes]:
        leave.wait(20)
        yield from ()

    push = sender.channel.stream_stream("/headrace.v1.KvBulk/Push")
    others = [push(idle(), timeout=30.0) for _ in range(2)]
    assert all(decode_opening(next(call)).credit > 0 for call in others)
    with pytest.raises(grpc.RpcError) as refused:
        next(push(idle(), timeout=30.0))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    session = sender.session(receiver.grant(16), options=PushOptions(reconnect_s=0.1))
    session.advance(16)
    time.sleep(0.3)  # longer than a broken stream is tried again
    assert session.error is None
    others[0].cancel()
    assert session.commit(sender.handoff(16), 20.0).is_committed
    leave.set()
    others[1].cancel()
    wait_until(lambda: receiver.credits.num_streams == 0)
    sender.close()
    receiver.close()
