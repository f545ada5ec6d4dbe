"""Fetch between an answering and an asking worker over real gRPC on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

import grpc
import msgpack
import pytest
import torch
import xxhash

from kvtransfer.codecs import CODECS, Codec, Fidelity
from kvtransfer.credit import CreditBook
from kvtransfer.fetch_messages import NotServed, Served, decode_closing, encode_closing, encode_request
from kvtransfer.frames import (
    Ack,
    FrameRecord,
    LeaseRef,
    Opening,
    decode_frame,
    encode_ack,
    encode_frame,
    encode_opening,
)
from kvtransfer.layouts import CacheLayout, Piece
from kvtransfer.sources import EncodedPiece, FetchRequest, SourceRefused
from kvtransfer.transports import grpc_fetch
from kvtransfer.transports.grpc_channel import make_bulk_server, open_bulk_channel
from kvtransfer.transports.grpc_serve import ServeOptions
from tests.integration.kvtransfer_fetch_harness import (
    BLOCK,
    Answerer,
    Asker,
    GatedSource,
    Tampering,
    cached_bytes,
    convert,
)
from tests.integration.kvtransfer_harness import (
    GQA,
    MIXED,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

BF16 = GQA.with_dtypes([["bfloat16"], ["bfloat16"]])
FRAMES = 12
"""Of two key blocks of GQA, at 4 KiB a frame."""


@pytest.fixture
def answerer() -> Iterator[Answerer]:
    answerer = Answerer()
    yield answerer
    answerer.close()


@pytest.fixture
def asker(answerer: Answerer) -> Iterator[Asker]:
    asker = Asker(answerer)
    yield asker
    asker.close()


def is_idle(answerer: Answerer) -> bool:
    return not answerer.store.num_pins and not answerer.fetches.num_open


def fetch_through(change: Callable[[int, bytes], Sequence[bytes]]) -> tuple[str, Asker, Answerer]:
    """Two blocks through a stream whose messages down are changed; the outcome's cause. Nothing may be left over."""
    answerer = Answerer(interceptors=[Tampering(change)])
    asker = Asker(answerer)
    outcome = asker.fetch(answerer.keys[:2])
    assert asker.is_clean
    wait_until(lambda: is_idle(answerer))
    asker.close()
    answerer.close()
    assert outcome.is_committed == bool(asker.sealed)
    return outcome.cause, asker, answerer


# ---- the way it is meant to go


@pytest.mark.parametrize("layout", [GQA, MIXED], ids=["gqa", "mixed"])
@pytest.mark.parametrize("blocks", [range(8), range(3, 5), range(7, 8)], ids=str)
def test_what_is_fetched_is_what_is_cached_there(layout: CacheLayout, blocks: range) -> None:
    answerer = Answerer(layout)
    asker = Asker(answerer, layout)
    outcome = asker.fetch(answerer.keys[blocks.start : blocks.stop], blocks.start)
    assert outcome.is_committed, outcome
    (sealed,) = asker.sealed
    assert (sealed.num_blocks, sealed.fidelity) == (len(blocks), 0)
    assert sealed.planes == cached_bytes(answerer, blocks)
    assert outcome.kv_bytes == sum(map(len, sealed.planes.values())) < outcome.wire_bytes
    assert asker.receiver.store.num_fences == 1
    assert asker.is_clean
    wait_until(lambda: is_idle(answerer))
    asker.close()
    answerer.close()


def test_only_a_leading_run_of_the_keys_is_served(answerer: Answerer, asker: Asker) -> None:
    unknown = [bytes([99]) * 16, answerer.keys[3]]
    outcome = asker.fetch([*answerer.keys[1:3], *unknown], 1)
    assert outcome.num_blocks == 2
    assert asker.sealed[0].planes == cached_bytes(answerer, range(1, 3))
    assert asker.is_clean


@pytest.mark.parametrize(
    "codec", sorted({codec.name for codec in CODECS if codec.fidelity is Fidelity.EXACT})
)
def test_every_exact_codec_brings_the_same(codec: str) -> None:
    answerer = Answerer(codec=codec, frame_bytes=16 << 10)
    asker = Asker(answerer)
    assert asker.fetch(answerer.keys[:3]).is_committed
    assert asker.sealed[0].planes == cached_bytes(answerer, range(3))
    asker.close()
    answerer.close()


@pytest.mark.parametrize(
    "codec", [codec for codec in CODECS if codec.fidelity is not Fidelity.EXACT], ids=lambda c: c.name
)
def test_what_a_codec_loses_counts_against_the_bound(codec: Codec) -> None:
    answerer = Answerer(BF16, codec=codec.name, frame_bytes=16 << 10)
    asker = Asker(answerer, BF16)
    assert asker.fetch(answerer.keys[:2]).cause == "NO_COMMON_CODEC"
    outcome = asker.fetch(answerer.keys[:2], fidelity=codec.fidelity.rank)
    assert outcome.fidelity == asker.sealed[0].fidelity == codec.fidelity.rank
    assert asker.is_clean
    asker.close()
    answerer.close()


def test_a_store_that_kept_the_frames_payloads_answers_the_same_request(
    answerer: Answerer, asker: Asker
) -> None:
    recorded = answerer.source.open(asker.request(answerer.keys[:2]))
    stored = _StoredPieces(list(recorded.pieces()))
    recorded.close()
    tier = Answerer(source=stored)
    other = Asker(tier)
    assert other.fetch(answerer.keys[:5]).num_blocks == 2
    assert other.sealed[0].planes == cached_bytes(answerer, range(2))
    wait_until(lambda: stored.num_closed == 1)
    other.close()
    tier.close()


class _StoredPieces:
    """A tier: it gives payloads as it has them, and knows no cache."""

    def __init__(self, stored: list[EncodedPiece]) -> None:
        self.num_blocks = 2
        self.num_closed = 0
        self._stored = stored

    def open(self, request: FetchRequest) -> _StoredPieces:
        return self

    def pieces(self) -> Iterator[EncodedPiece]:
        yield from self._stored

    def piece(self, number: int) -> EncodedPiece:
        return self._stored[number]

    def note_landed(self, number: int, in_flight_s: float, landing_s: float) -> None:
        """Chooses no codec."""

    def close(self) -> None:
        self.num_closed += 1


def test_fetches_run_side_by_side_up_to_a_bound(asker: Asker, answerer: Answerer) -> None:
    gated = GatedSource(answerer.source, number=3)
    busy = Answerer(source=gated, options=ServeOptions(max_fetches=1))
    first, second = Asker(busy), Asker(busy)
    outcomes = []
    running = threading.Thread(target=lambda: outcomes.append(first.fetch(answerer.keys[:2])))
    running.start()
    assert gated.reached.wait(10)
    assert second.fetch(answerer.keys[:2]).cause == "BUSY"
    assert second.is_clean
    gated.gate.set()
    running.join(10)
    assert outcomes[0].is_committed
    wait_until(lambda: is_idle(busy))
    assert second.fetch(answerer.keys[:2]).is_committed
    for end in (first, second, busy):
        end.close()


# ---- what is refused


def test_blocks_that_are_not_there(answerer: Answerer, asker: Asker) -> None:
    outcome = asker.fetch([bytes([99]) * 16])
    assert (outcome.cause, outcome.num_blocks) == ("NO_BLOCKS", 0)
    assert asker.is_clean
    wait_until(lambda: is_idle(answerer))


def test_an_answerer_that_has_started_anew(answerer: Answerer, asker: Asker) -> None:
    request = asker.request(answerer.keys)
    answerer.epoch += 1
    assert asker.session(request).run().cause == "STALE_EPOCH"
    assert asker.is_clean


def test_another_layout_or_key_block(answerer: Answerer, asker: Asker) -> None:
    request = asker.request(answerer.keys)
    assert asker.session(replace(request, layout=MIXED.identity())).run().cause == "LAYOUT_MISMATCH"
    other = replace(asker.request(answerer.keys), block_tokens=BLOCK // 2)
    assert asker.session(other).run().cause == "LAYOUT_MISMATCH"
    assert asker.is_clean


@pytest.mark.parametrize(
    "dtypes",
    [
        (("float32",),),
        (("float32",), ("float32", "float32")),
        (("float32",), ("uint8",)),
        (("float32",), ("complex128",)),
    ],
    ids=["too few planes", "too many fields", "not convertible", "unknown"],
)
def test_dtypes_that_numbers_cannot_change_into(
    answerer: Answerer, asker: Asker, dtypes: tuple[tuple[str, ...], ...]
) -> None:
    request = replace(asker.request(answerer.keys, fidelity=2), dtypes=dtypes)
    assert asker.session(request).run().cause == "DTYPE_MISMATCH"
    assert asker.is_clean


def test_blocks_beyond_the_fidelity_bound_are_as_good_as_absent() -> None:
    answerer = Answerer(fidelity=Fidelity.COMPACT.rank)
    asker = Asker(answerer)
    assert asker.fetch(answerer.keys, fidelity=Fidelity.NEAR.rank).cause == "NO_BLOCKS"
    outcome = asker.fetch(answerer.keys, fidelity=Fidelity.COMPACT.rank)
    assert outcome.fidelity == asker.sealed[0].fidelity == Fidelity.COMPACT.rank
    asker.close()
    answerer.close()


def test_the_asker_itself_refuses_frames_beyond_its_bound() -> None:
    def lossy(number: int, message: bytes) -> list[bytes]:
        return [_with_header(message, fidelity=1) if message.startswith(b"HRF1") else message]

    cause, asker, _ = fetch_through(lossy)
    assert cause == "FIDELITY_EXCEEDED"
    assert not asker.receiver.store.num_scatters


@pytest.mark.parametrize(("here", "there"), [(GQA, BF16), (BF16, GQA)], ids=["narrower", "wider"])
def test_dtypes_are_converted_where_the_bound_allows_it(here: CacheLayout, there: CacheLayout) -> None:
    answerer = Answerer(here)
    asker = Asker(answerer, there)
    assert asker.fetch(answerer.keys[:2]).cause == "FIDELITY_EXCEEDED"
    outcome = asker.fetch(answerer.keys[:2], fidelity=Fidelity.NEAR.rank)
    assert outcome.fidelity == Fidelity.NEAR.rank
    wanted = cached_bytes(answerer, range(2))
    for plane in here.planes:
        raw = torch.frombuffer(bytearray(wanted[plane.name]), dtype=torch.uint8)
        converted = convert(raw, plane, there.plane(plane.name)).numpy().tobytes()
        assert asker.sealed[0].planes[plane.name] == converted
    assert outcome.kv_bytes == BF16.num_bytes(2 * BLOCK)  # the narrower of both travels
    assert asker.is_clean
    asker.close()
    answerer.close()


def test_a_chooser_that_takes_a_codec_that_the_asker_lacks(answerer: Answerer, asker: Asker) -> None:
    request = replace(asker.request(answerer.keys), codecs=(("raw", 99),))
    assert asker.session(request).run().cause == "NO_COMMON_CODEC"
    assert asker.is_clean
    wait_until(lambda: is_idle(answerer))


def test_a_call_without_a_deadline_is_refused(answerer: Answerer, asker: Asker) -> None:
    call = asker.channel.stream_stream("/headrace.v1.KvBulk/Fetch")(iter([b""]))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_asker_that_cannot_take_the_blocks_over(answerer: Answerer, asker: Asker) -> None:
    asker.fails_to_seal = True
    outcome = asker.fetch(answerer.keys)
    assert (outcome.cause, outcome.num_blocks) == ("COMMIT_FAILED", 0)
    assert asker.is_clean


def test_an_asker_whose_landing_budget_is_used_up(answerer: Answerer, asker: Asker) -> None:
    credits = asker.receiver.credits
    streams = [credits.open() for _ in range(credits.max_streams)]
    assert asker.fetch(answerer.keys).cause == "BUSY"
    for stream in streams:
        assert stream is not None
        credits.close(stream)
    assert asker.is_clean


# ---- damage on the way


def _with_header(message: bytes, **changes: object) -> bytes:
    frame = decode_frame(message)
    return encode_frame(replace(frame.header, **changes), frame.payload)[0]


def _flipped(message: bytes, at: int) -> bytes:
    at %= len(message)
    return message[:at] + bytes([message[at] ^ 0x10]) + message[at + 1 :]


@pytest.mark.parametrize("at", [0, 5, 13, 40, 300, -1], ids=lambda at: f"byte {at}")
def test_a_damaged_frame_is_sent_again(at: int) -> None:
    damaged = set()

    def flip(number: int, message: bytes) -> list[bytes]:
        if number in (0, 3) and number not in damaged:
            damaged.add(number)
            return [_flipped(message, at)]
        return [message]

    cause, asker, answerer = fetch_through(flip)
    assert not cause
    assert asker.sealed[0].planes == cached_bytes(answerer, range(2))


@pytest.mark.parametrize("length", [0, 3, 15, 100, 4000])
def test_a_truncated_frame_is_sent_again(length: int) -> None:
    cause, asker, answerer = fetch_through(lambda n, message: [message[:length] if n == 2 else message])
    assert not cause
    assert asker.sealed[0].planes == cached_bytes(answerer, range(2))


def test_a_frame_that_is_always_damaged_ends_the_fetch() -> None:
    number_of = {}

    def flip(number: int, message: bytes) -> list[bytes]:
        if not message.startswith(b"HRF1"):
            return [message]
        frame = decode_frame(message).header.number
        number_of[number] = frame
        return [_flipped(message, -1) if frame == 4 else message]

    cause, _, _ = fetch_through(flip)
    assert cause == "DAMAGED_FRAME"
    assert list(number_of.values()).count(4) == 1 + ServeOptions().max_resends


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"attempt": 2}, "STALE_ATTEMPT"),
        ({"attempt": 0}, "STALE_ATTEMPT"),
        ({"sender_epoch": 7}, "STALE_EPOCH"),
        ({"receiver_epoch": 7}, "STALE_EPOCH"),
        ({"lease_id": b"somebody else's!"}, "UNKNOWN_LEASE"),
    ],
    ids=str,
)
def test_frames_of_another_lease_attempt_or_epoch_are_refused(changes: dict[str, int], cause: str) -> None:
    def replay(number: int, message: bytes) -> list[bytes]:
        if number == 1:
            message = _with_header(message, lease=replace(decode_frame(message).header.lease, **changes))
        return [message]

    found, asker, _ = fetch_through(replay)
    assert found == cause
    assert asker.receiver.store.num_scatters == 1


def test_frames_that_were_dropped_swapped_or_doubled() -> None:
    kept: list[bytes] = []

    def swap(number: int, message: bytes) -> list[bytes]:
        if number == 2:
            kept.append(message)
            return []
        return [message, *kept] if number == 3 else [message]

    # Acknowledgements come in the order of the frames: anything else is no way to go on.
    assert fetch_through(swap)[0] == "PROTOCOL_ERROR"
    assert fetch_through(lambda n, message: [] if n == 2 else [message])[0] == "PROTOCOL_ERROR"
    assert fetch_through(lambda n, message: [message] * (1 + (n == 2)))[0] == "PROTOCOL_ERROR"


def test_frames_over_the_prefix_that_is_held_never_land() -> None:
    answerer = Answerer(interceptors=[Tampering(_moved_to_the_front)])
    asker = Asker(answerer)
    assert asker.fetch(answerer.keys[2:4], 2).cause == "BAD_PIECE"
    assert asker.is_clean
    assert not asker.receiver.store.num_scatters
    asker.close()
    answerer.close()


def _moved_to_the_front(number: int, message: bytes) -> list[bytes]:
    if message.startswith(b"HRF1"):
        piece = decode_frame(message).header.piece
        message = _with_header(message, piece=replace(piece, entries=range(len(piece.entries))))
    return [message]


def _served(message: bytes) -> Served:
    closing = decode_closing(message)
    assert isinstance(closing, Served)
    return closing


def _other_checksum(served: Served) -> Served:
    first = served.manifest[0]
    return replace(served, manifest={**served.manifest, 0: FrameRecord(first.raw_bytes, first.checksum ^ 1)})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda served: replace(served, num_blocks=1), "INCOMPLETE"),
        (lambda served: replace(served, num_blocks=3), "INCOMPLETE"),
        (_other_checksum, "MANIFEST_MISMATCH"),
        (
            lambda served: replace(served, manifest={n: served.manifest[n] for n in range(FRAMES // 2)}),
            "MANIFEST_MISMATCH",
        ),
        (
            lambda served: replace(served, manifest={**served.manifest, FRAMES: FrameRecord(1, 2)}),
            "INCOMPLETE",
        ),
    ],
    ids=["too few blocks", "too many blocks", "another checksum", "too few frames", "too many frames"],
)
def test_a_closing_word_that_is_not_what_landed(change: Callable[[Served], Served], cause: str) -> None:
    def lie(number: int, message: bytes) -> list[bytes]:
        return [encode_closing(change(_served(message))) if message.startswith(b"HRE1") else message]

    assert fetch_through(lie)[0] == cause


def test_a_closing_word_that_is_damaged_or_missing() -> None:
    def closing(change: Callable[[bytes], list[bytes]]) -> Callable[[int, bytes], list[bytes]]:
        return lambda number, message: change(message) if message.startswith(b"HRE1") else [message]

    assert fetch_through(closing(lambda message: []))[0] == "PROTOCOL_ERROR"
    for at in (0, 6, 14, -1):
        assert fetch_through(closing(lambda message, at=at: [_flipped(message, at)]))[0] == "PROTOCOL_ERROR"
    assert fetch_through(closing(lambda message: [message[:-9]]))[0] == "PROTOCOL_ERROR"


def test_frames_of_a_plane_without_blocks_do_not_count_as_served() -> None:
    """A window row lands in a lease, but no block holds it."""
    answerer = Answerer(MIXED, interceptors=[Tampering(_with_a_window_row)])
    asker = Asker(answerer, MIXED)
    outcome = asker.fetch(answerer.keys[:2])
    assert outcome.cause == "INCOMPLETE"
    assert "window" in outcome.message
    assert asker.is_clean
    asker.close()
    answerer.close()


def _with_a_window_row(number: int, message: bytes) -> list[bytes]:
    """In place of frame 0; the manifest is made to fit."""
    plane = MIXED.plane("window")
    piece = Piece("window", range(1), range(2), range(1))
    payload = bytes(plane.num_bytes(piece))
    if number == 0:
        return [_window_frame(message, piece, payload)]
    if message.startswith(b"HRE1"):
        served = _served(message)
        record = FrameRecord(len(payload), _window_frame.checksum)  # type: ignore[attr-defined]
        return [encode_closing(replace(served, manifest={**served.manifest, 0: record}))]
    return [message]


def _window_frame(message: bytes, piece: Piece, payload: bytes) -> bytes:
    header = decode_frame(message).header
    plane = MIXED.plane("window")
    header = replace(header, piece=piece, raw_bytes=len(payload), dtypes=plane.dtypes)
    encoded, _window_frame.checksum = encode_frame(header, payload)  # type: ignore[attr-defined]
    return encoded


# ---- ends that die, stall or leave


class _Running:
    """A fetch of everything in a thread of its own, with a source that waits in front of frame `number`."""

    def __init__(self, number: int = 5, **times: float) -> None:
        self.cached = Answerer()
        self.source = GatedSource(self.cached.source, number)
        self.answerer = Answerer(source=self.source)
        self.asker = Asker(self.answerer)
        self.session = self.asker.session(self.asker.request(self.cached.keys), **times)
        self._outcomes: list[object] = []
        self._thread = threading.Thread(target=lambda: self._outcomes.append(self.session.run()))
        self._thread.start()
        if not times:  # else it may be over before
            assert self.source.reached.wait(10)

    def cause(self) -> str:
        """Of the outcome, once it is there; then both sides are as before."""
        self._thread.join(10)
        (outcome,) = self._outcomes
        assert self.asker.is_clean
        assert not self.asker.sealed
        self.source.gate.set()
        wait_until(lambda: not self.cached.store.num_pins and not self.answerer.fetches.num_open)
        for end in (self.asker, self.answerer, self.cached):
            end.close()
        return outcome.cause  # type: ignore[attr-defined]


def test_a_source_that_dies_in_the_middle() -> None:
    running = _Running()
    running.answerer.server.stop(0)
    assert running.cause() == "PEER_UNAVAILABLE"


def test_a_source_that_stalls() -> None:
    assert _Running(stall_s=0.2).cause() == "SOURCE_STALLED"


def test_a_fetch_beyond_its_deadline() -> None:
    assert _Running(remaining_s=0.3).cause() == "DEADLINE_EXCEEDED"


def test_a_fetch_that_is_cancelled() -> None:
    running = _Running()
    running.session.cancel()
    assert running.cause() == "CANCELLED"


def test_a_fetch_that_is_cancelled_before_it_begins(answerer: Answerer, asker: Asker) -> None:
    session = asker.session(asker.request(answerer.keys))
    session.cancel()
    assert session.run().cause == "CANCELLED"
    assert asker.receiver.table.num_held == asker.receiver.store.num_owners == 0
    wait_until(lambda: asker.is_clean and is_idle(answerer))


def test_a_lease_that_is_cancelled_while_it_is_filled() -> None:
    running = _Running()
    with running.asker.receiver.desk.change() as table:
        table.release(running.asker.grant.lease_id, "CANCELLED")
    running.source.gate.set()
    assert running.cause() == "LEASE_CLOSED"


def test_a_server_that_closes_ends_its_fetches() -> None:
    running = _Running()
    assert not running.answerer.fetches.close(0.05)  # its source is still reading
    assert running.cause() == "PEER_UNAVAILABLE"
    assert running.answerer.fetches.close(0)


def test_a_source_that_fails_in_the_middle(answerer: Answerer) -> None:
    gone = Answerer(source=_FailingSource(answerer.source, SourceRefused("READ_FAILED", "the disk is gone")))
    broken = Answerer(source=_FailingSource(answerer.source, ZeroDivisionError("no")))
    for source in (gone, broken):
        asker = Asker(source)
        outcome = asker.fetch(answerer.keys)
        assert outcome.cause == "READ_FAILED"
        assert asker.is_clean
        wait_until(lambda: not answerer.store.num_pins)
        asker.close()
        source.close()
    assert "ZeroDivisionError" in outcome.message


class _FailingSource(GatedSource):
    def __init__(self, inner: object, error: Exception) -> None:
        super().__init__(inner, number=4)  # type: ignore[arg-type]
        self._error = error

    def pass_through(self, number: int) -> None:
        if number == 4:
            raise self._error


def test_an_answerer_that_cannot_be_reached(answerer: Answerer, asker: Asker) -> None:
    answerer.close()
    assert asker.fetch(answerer.keys).cause == "PEER_UNAVAILABLE"
    assert asker.is_clean


def test_an_answerer_that_comes_up_a_little_later(
    answerer: Answerer, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_fetch, "CONNECT_S", 20.0)
    answerer.close()
    outcomes = []
    session = asker.session(asker.request(answerer.keys))
    running = threading.Thread(target=lambda: outcomes.append(session.run()))
    running.start()
    server = make_bulk_server(max_calls=4)
    server.add_generic_rpc_handlers((answerer.fetches.handler(),))
    server.add_insecure_port(answerer.address)
    server.start()
    running.join(20)
    assert outcomes[0].is_committed
    server.stop(0).wait(5)


def test_an_asker_that_vanishes_leaves_no_pins(answerer: Answerer, asker: Asker) -> None:
    request = asker.request(answerer.keys)
    opening = encode_opening(Opening(credit=5000))
    hold = threading.Event()

    def silent() -> Iterator[bytes]:
        yield encode_request(request)
        yield opening
        hold.wait(10)

    call = asker.channel.stream_stream("/headrace.v1.KvBulk/Fetch")(silent(), timeout=20)
    next(iter(call))
    assert answerer.store.num_pins == 1
    call.cancel()
    wait_until(lambda: is_idle(answerer))
    hold.set()


def _speak(answerer: Answerer, first: list[bytes], hold: threading.Event | None = None) -> list[bytes]:
    """Sends messages as they are; half-closes the stream, or holds it until the answerer ends it."""

    def messages() -> Iterator[bytes]:
        yield from first
        if hold is not None:
            hold.wait(10)

    channel = open_bulk_channel(answerer.address)
    try:
        return list(channel.stream_stream("/headrace.v1.KvBulk/Fetch")(messages(), timeout=10))
    finally:
        channel.close()


def test_an_asker_that_acknowledges_nothing_is_given_up(answerer: Answerer, asker: Asker) -> None:
    impatient = Answerer(source=answerer.source, options=ServeOptions(stall_s=0.1))
    request = replace(asker.request(answerer.keys), lease=LeaseRef(b"x" * 16, 1, impatient.epoch, 0))
    first = [encode_request(request), encode_opening(Opening(credit=12_000))]
    hold = threading.Event()
    *frames, closing = _speak(impatient, first, hold)
    hold.set()
    assert isinstance(refusal := decode_closing(closing), NotServed)
    assert refusal.cause == "ASKER_STALLED"
    assert sum(map(len, frames)) <= 12_000
    wait_until(lambda: is_idle(answerer))
    impatient.close()


def test_what_is_in_flight_stays_within_the_credit_of_a_slow_asker() -> None:
    gate, landing, sent = threading.Event(), threading.Event(), []

    def slow(num_bytes: int) -> None:
        landing.set()
        gate.wait(10)

    def watch(number: int, message: bytes) -> list[bytes]:
        sent.append(len(message))
        return [message]

    answerer = Answerer(interceptors=[Tampering(watch)])
    asker = Asker(answerer, pace=slow)
    asker.receiver.credits = CreditBook(40_000, frame_bytes=10_000)  # less than HTTP/2 would let through
    outcomes = []
    session = asker.session(asker.request(answerer.keys))
    running = threading.Thread(target=lambda: outcomes.append(session.run()))
    running.start()
    assert landing.wait(10)
    wait_until(lambda: sum(sent) > 20_000 - 4_500)
    time.sleep(0.05)  # it would send more now if it meant to
    assert sum(sent) <= 20_000
    gate.set()
    running.join(10)
    assert outcomes[0].is_committed
    assert asker.sealed[0].planes == cached_bytes(answerer, range(8))
    asker.close()
    answerer.close()


# ---- hostile requests


def _envelope(magic: bytes, packed: bytes) -> bytes:
    return magic + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little") + packed


def _hostile_messages(good: bytes, random: Random) -> Iterator[bytes]:
    yield b""
    yield b"HRQ1"
    fields = msgpack.unpackb(good[12:])
    values = [None, -1, (1 << 64) - 1, 1.5, b"", b"x" * 17, "", "y" * 5000, [], [[]], [["raw", -1]], {}, True]
    for key in fields:
        yield _envelope(b"HRQ1", msgpack.packb({k: v for k, v in fields.items() if k != key}))
        yield _envelope(b"HRQ1", msgpack.packb({**fields, key: random.choice(values)}))
    for _ in range(20):
        yield random.randbytes(random.randrange(400))
        yield _envelope(b"HRQ1", random.randbytes(random.randrange(100)))
        yield _flipped(good, random.randrange(len(good)))
        yield good[: random.randrange(len(good))]


def test_hostile_requests_get_a_refusal_and_harm_nothing(answerer: Answerer, asker: Asker) -> None:
    good = encode_request(asker.request(answerer.keys))
    opening = encode_opening(Opening(credit=5000))
    for message in _hostile_messages(good, Random(7)):
        if message == good:
            continue
        answers = _speak(answerer, [message, opening])
        refusal = decode_closing(answers[-1])
        assert isinstance(refusal, NotServed), refusal
    for message in (b"", b"\x80", Random(3).randbytes(80)):
        refusal = decode_closing(_speak(answerer, [good, message])[-1])
        assert isinstance(refusal, NotServed)
        assert refusal.cause == "BAD_REQUEST"
    wait_until(lambda: is_idle(answerer))
    assert asker.fetch(answerer.keys).is_committed


@pytest.mark.parametrize(
    "ack",
    [b"", b"\xc1", encode_ack(Ack(7, ok=True, credit=9)), encode_ack(Ack(0, ok=False, cause="LEASE_CLOSED"))],
    ids=["empty", "no msgpack", "of a frame never sent", "final"],
)
def test_an_acknowledgement_that_cannot_be_followed_ends_the_fetch(
    answerer: Answerer, asker: Asker, ack: bytes
) -> None:
    good = encode_request(asker.request(answerer.keys))
    hold = threading.Event()
    closing = _speak(answerer, [good, encode_opening(Opening(credit=5000)), ack], hold)[-1]
    hold.set()
    refusal = decode_closing(closing)
    assert isinstance(refusal, NotServed)
    assert refusal.cause in ("PROTOCOL_ERROR", "LEASE_CLOSED")
    wait_until(lambda: is_idle(answerer))
