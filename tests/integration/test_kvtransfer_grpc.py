"""Push, commit, abort and renew between a sender and a receiver over real gRPC on loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.frames import (
    Ack,
    FrameHeader,
    FrameRecord,
    LeaseRef,
    decode_ack,
    decode_opening,
    encode_frame,
)
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, pieces_for
from kvtransfer.lease_types import Grant, Landing, LeaseState, RequestId
from kvtransfer.transports.grpc_channel import open_bulk_channel
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from kvtransfer.transports.seam import HandoffRefused, TransferError
from tests.integration.kvtransfer_harness import (
    GQA,
    MIXED,
    Peer,
    Receiver,
    Sender,
    flip_messages,
    holding,
    raw_push,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


MIB_FRAMES = CacheLayout((Plane("k", 64, Paged(1), 8, (Field("k", 128, "float32"),)),), 16)
"""2 MiB for every 8 tokens: enough to fill what gRPC buffers."""


def lease_pb(ref: LeaseRef) -> pb.LeaseRef:
    return pb.LeaseRef(
        lease_id=ref.lease_id,
        attempt=ref.attempt,
        sender_epoch=ref.sender_epoch,
        receiver_epoch=ref.receiver_epoch,
    )


def acks_of(sender: Sender, *messages: bytes) -> list[Ack]:
    return [decode_ack(message) for message in raw_push(sender.channel, list(messages))]


# ---- the way it is meant to go


def test_what_is_pushed_in_chunks_lands_bit_identical(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(200)
    session = sender.session(grant)
    outcome = sender.push_all(session, 200)
    assert outcome.is_committed
    assert receiver.store.read(grant.lease_id, 200) == sender.store.read(sender.OWNER, 200)
    assert [(lease_id, handoff.num_tokens) for lease_id, handoff in receiver.committed] == [
        (grant.lease_id, 200)
    ]
    stats = session.stats()
    assert stats.num_tokens == 200
    assert stats.kv_bytes == GQA.num_bytes(200)
    assert stats.kv_bytes < stats.wire_bytes < 1.2 * stats.kv_bytes
    assert stats.num_frames == receiver.store.num_scatters
    assert 0 < stats.frame_s <= stats.transfer_s
    assert receiver.store.num_fences == 1


@pytest.mark.parametrize("num_tokens", [7, 24, 37, 128])
def test_windows_and_entries_of_several_tokens_land_too(num_tokens: int) -> None:
    receiver = Receiver(MIXED)
    sender = Sender(receiver, num_tokens, MIXED)
    grant = receiver.grant(num_tokens)
    assert sender.push_all(sender.session(grant), num_tokens, chunk=10).is_committed
    assert receiver.store.read(grant.lease_id, num_tokens) == sender.store.read(sender.OWNER, num_tokens)
    sender.close()
    receiver.close()


def test_any_chunking_and_frame_size_lands_the_same(receiver: Receiver, sender: Sender) -> None:
    wanted = sender.store.read(sender.OWNER, 200)
    examples = count()

    @settings(max_examples=12, deadline=None)
    @given(
        cuts=st.sets(st.integers(1, 199), max_size=6),
        frame_bytes=st.integers(1_000, 100_000),
        window_bytes=st.integers(1_000, 200_000),
    )
    def check(cuts: set[int], frame_bytes: int, window_bytes: int) -> None:
        grant = receiver.grant(200, request=f"example {next(examples)}")
        options = PushOptions(frame_bytes=frame_bytes, window_bytes=window_bytes)
        session = sender.session(grant, options=options)
        for ready in sorted(cuts):
            session.advance(ready)
        assert session.commit(sender.handoff(200), 20.0).is_committed
        assert receiver.store.read(grant.lease_id, 200) == wanted
        with receiver.desk.change() as table:
            table.release(grant.lease_id)

    check()


def test_a_prefix_that_the_receiver_holds_does_not_travel(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(200, start_token=64)
    receiver.store.fill(grant.lease_id, 64, seed=99)
    prefix = receiver.store.read(grant.lease_id, 64)
    session = sender.session(grant, start_token=64)
    assert sender.push_all(session, 200).is_committed
    assert session.stats().kv_bytes == GQA.num_bytes(200) - GQA.num_bytes(64)
    assert session.stats().num_tokens == 136
    assert receiver.store.read(grant.lease_id, 64) == prefix
    assert receiver.store.read(grant.lease_id, 200, 64) == sender.store.read(sender.OWNER, 200, 64)


def test_a_prompt_that_is_wholly_cached_commits_without_a_frame(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64, start_token=64)
    session = sender.session(grant, start_token=64)
    assert session.commit(sender.handoff(64), 10.0).is_committed
    assert session.stats().num_frames == 0


def test_a_repeated_commit_gives_the_same_answer_and_adopts_once(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    session = sender.session(grant)
    assert sender.push_all(session, 64).is_committed
    with receiver.desk.change() as table:
        table.release(grant.lease_id)  # decoded to its end in the meantime
    assert session.commit(sender.handoff(64), 10.0).is_committed
    assert session.abort("LATE") is LeaseState.COMMITTED
    assert len(receiver.committed) == 1


# ---- damage


def test_damaged_frames_are_refused_sent_again_and_never_land(receiver: Receiver, sender: Sender) -> None:
    flip_messages(sender, {0, 3, 4})
    grant = receiver.grant(200)
    session = sender.session(grant)
    assert sender.push_all(session, 200).is_committed
    assert receiver.store.read(grant.lease_id, 200) == sender.store.read(sender.OWNER, 200)
    assert session.stats().num_resent == 3
    assert receiver.store.num_scatters == session.stats().num_frames


def test_a_line_that_damages_everything_ends_the_transfer(receiver: Receiver, sender: Sender) -> None:
    flip_messages(sender, set(range(1000)))
    grant = receiver.grant(200)
    session = sender.session(grant)
    with pytest.raises(TransferError) as failed:
        sender.push_all(session, 200)
    assert failed.value.cause == "DAMAGED_FRAME"
    assert session.error is failed.value
    assert receiver.store.num_scatters == 0
    assert session.abort("FAILED") is LeaseState.ABORTED
    assert receiver.reclaimed == [grant.lease_id]


# ---- frames by hand


def piece_of(sender: Sender, number: int = 0) -> Piece:
    return pieces_for(sender.layout, range(64), 4096)[number]


def test_frames_of_another_attempt_or_epoch_are_refused(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    good, _ = sender.frame(sender.ref(grant), 0, piece_of(sender))
    wrong = [
        sender.frame(sender.ref(grant, **{fact: 7}), 1, piece_of(sender, 1))[0]
        for fact in ("attempt", "sender_epoch", "receiver_epoch")
    ]
    acks = acks_of(sender, good, *wrong)
    assert [ack.cause for ack in acks] == ["", "STALE_ATTEMPT", "STALE_EPOCH", "STALE_EPOCH"]
    assert receiver.table.counters.stale == 3
    assert receiver.store.num_scatters == 1


def test_a_stale_session_fails_with_the_receivers_word(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    receiver.grant(64, attempt=2)
    session = sender.session(grant)
    session.advance(64)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(64), 10.0)
    assert failed.value.cause == "LEASE_CLOSED"
    assert "SUPERSEDED" in failed.value.message


def test_a_duplicate_is_acknowledged_again_and_lands_once(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    first, _ = sender.frame(sender.ref(grant), 0, piece_of(sender))
    second, _ = sender.frame(sender.ref(grant), 1, piece_of(sender, 1))
    acks = acks_of(sender, first, second, first, first)
    assert [(ack.number, ack.ok) for ack in acks] == [(0, True), (1, True), (0, True), (0, True)]
    assert receiver.store.num_scatters == 2


def test_pieces_that_do_not_fit_are_refused_and_the_stream_goes_on(
    receiver: Receiver, sender: Sender
) -> None:
    grant = receiver.grant(64, start_token=16)
    ref = sender.ref(grant)
    k = range(1), range(2)
    over_prefix, _ = sender.frame(ref, 0, Piece("k", *k, range(15, 17)))
    beyond_memory, _ = sender.frame(ref, 1, Piece("k", *k, range(63, 66)))
    unknown_codec, _ = sender.frame(ref, 2, Piece("k", *k, range(16, 20)), ("zip", 1))
    good, _ = sender.frame(ref, 3, Piece("k", *k, range(16, 20)))
    acks = acks_of(sender, over_prefix, beyond_memory, unknown_codec, b"nonsense", good)
    assert [ack.cause for ack in acks] == [
        "BAD_PIECE",
        "LANDING_FAILED",
        "UNKNOWN_CODEC",
        "DAMAGED_FRAME",
        "",
    ]
    assert "known are: raw 1" in acks[2].message
    lease = receiver.lease(grant)
    assert set(lease.landed) == {3}
    assert not lease.landing


def test_a_frame_that_declares_another_length_is_refused(receiver: Receiver, sender: Sender) -> None:
    """Before anything of that length is allocated."""
    piece = piece_of(sender)
    header = FrameHeader(
        sender.ref(receiver.grant(64)),
        0,
        piece,
        "raw",
        1,
        piece.num_bytes(GQA) + 1,
        GQA.plane(piece.plane).dtypes,
    )
    message, _ = encode_frame(
        header, sender.store.gather(sender.OWNER, piece, GQA.plane(piece.plane)).numpy().data
    )
    assert [ack.cause for ack in acks_of(sender, message)] == ["BAD_PIECE"]


def test_another_workers_layout_is_refused_at_the_frame(receiver: Receiver, sender: Sender) -> None:
    narrower = CacheLayout(GQA.planes[:1] + MIXED.planes[:1], 16)
    other = Sender(receiver, 64, narrower)
    grant = receiver.grant(64)
    frame, _ = other.frame(other.ref(grant), 0, Piece("latent", range(3), range(1), range(4)))
    assert [ack.cause for ack in acks_of(other, frame)] == ["BAD_PIECE"]
    other.close()


# ---- commit against the rest


def commit_by_hand(
    sender: Sender, grant: Grant, checksums: dict[int, tuple[int, int]], **changes: int
) -> pb.CommitResponse:
    request = pb.CommitRequest(
        lease=lease_pb(sender.ref(grant, **changes)), handoff=sender.handoff(64), remaining_s=10.0
    )
    for number, (raw_bytes, checksum) in checksums.items():
        request.manifest.add(frame=number, raw_bytes=raw_bytes, checksum=checksum)
    return pb_grpc.KvTransferStub(sender.channel).Commit(request, timeout=10.0)


def all_frames(sender: Sender, grant: Grant) -> tuple[list[bytes], dict[int, tuple[int, int]]]:
    messages, manifest = [], {}
    for number, piece in enumerate(pieces_for(sender.layout, range(64), 4096)):
        message, checksum = sender.frame(sender.ref(grant), number, piece)
        messages.append(message)
        manifest[number] = piece.num_bytes(sender.layout), checksum
    return messages, manifest


def test_a_commit_before_its_frames_waits_for_them(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    messages, manifest = all_frames(sender, grant)
    responses: list[pb.CommitResponse] = []
    commit = threading.Thread(target=lambda: responses.append(commit_by_hand(sender, grant, manifest)))
    commit.start()
    for message in messages:
        assert acks_of(sender, message)[0].ok
        assert len(receiver.committed) == 0 or message is messages[-1]
    commit.join(10)
    assert responses[0].state == pb.LEASE_STATE_COMMITTED
    assert len(receiver.committed) == 1


def test_a_commit_without_its_frames_names_them() -> None:
    receiver = Receiver(max_wait_s=0.05)
    sender = Sender(receiver, 64)
    grant = receiver.grant(64)
    messages, manifest = all_frames(sender, grant)
    raw_push(sender.channel, messages[1:])
    response = commit_by_hand(sender, grant, manifest)
    assert (response.state, list(response.missing_frames)) == (pb.LEASE_STATE_FILLING, [0])
    assert receiver.committed == []
    sender.close()
    receiver.close()


def test_a_session_sends_again_what_a_commit_finds_missing() -> None:
    receiver = Receiver(max_wait_s=0.05)
    sender = Sender(receiver, 64)
    grant = receiver.grant(64)
    session = sender.session(grant)
    session.advance(64)
    lease = receiver.lease(grant)
    wait_until(lambda: len(lease.landed) == len(pieces_for(GQA, range(64), 4096)))
    with receiver.desk.change():
        del lease.landed[1]  # lost in some way that its acknowledgement did not show
    assert session.commit(sender.handoff(64), 20.0).is_committed
    assert session.stats().num_resent == 1
    assert receiver.store.read(grant.lease_id, 64) == sender.store.read(sender.OWNER, 64)
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    ("break_it", "cause"),
    [
        (lambda manifest: manifest.popitem(), "MANIFEST_MISMATCH"),
        (lambda manifest: manifest.update({0: (manifest[0][0], 1)}), "MANIFEST_MISMATCH"),
    ],
)
def test_a_manifest_that_differs_from_what_landed_ends_the_lease(
    receiver: Receiver, sender: Sender, break_it: Callable[[dict[int, tuple[int, int]]], None], cause: str
) -> None:
    grant = receiver.grant(64)
    messages, manifest = all_frames(sender, grant)
    raw_push(sender.channel, messages)
    break_it(manifest)
    for _ in range(2):
        response = commit_by_hand(sender, grant, manifest)
        assert response.state == pb.LEASE_STATE_ABORTED
        assert response.reason.startswith(cause)
    assert receiver.committed == []
    assert receiver.reclaimed == [grant.lease_id]


def test_a_manifest_that_leaves_out_a_part_of_the_prompt_is_refused(
    receiver: Receiver, sender: Sender
) -> None:
    grant = receiver.grant(64)
    messages, manifest = all_frames(sender, grant)
    raw_push(sender.channel, messages[:-1])
    manifest.popitem()
    response = commit_by_hand(sender, grant, manifest)
    assert response.state == pb.LEASE_STATE_ABORTED
    assert response.reason.startswith("MANIFEST_INCOMPLETE: plane 'v'")


def test_a_handoff_of_another_layout_or_version_is_refused(receiver: Receiver, sender: Sender) -> None:
    for request, change in (("a", {"layout": "other"}), ("b", {"handoff_major": 2})):
        grant = receiver.grant(64, request=request)
        session = sender.session(grant)
        handoff = sender.handoff(64)
        for name, value in change.items():
            setattr(handoff, name, value)
        outcome = session.commit(handoff, 10.0)
        assert outcome.state is LeaseState.ABORTED
        assert outcome.cause in ("LAYOUT_MISMATCH", "HANDOFF_VERSION")


@pytest.mark.parametrize(
    ("error", "cause"),
    [(HandoffRefused("NO_ROOM", "all slots are taken"), "NO_ROOM"), (RuntimeError("bug"), "HANDOFF_FAILED")],
)
def test_a_decode_service_that_cannot_take_it_ends_the_lease(
    error: Exception, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(lease_id: bytes, handoff: pb.Handoff, fidelity: int) -> None:
        raise error

    receiver = Receiver(on_commit=refuse)
    sender = Sender(receiver, 64)
    grant = receiver.grant(64)
    outcome = sender.push_all(sender.session(grant), 64)
    assert (outcome.state, outcome.cause) == (LeaseState.ABORTED, cause)
    assert receiver.reclaimed == [grant.lease_id]
    sender.close()
    receiver.close()


def test_a_commit_after_expiry_is_refused(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64, ttl_s=0.2)
    messages, manifest = all_frames(sender, grant)
    assert all(ack.ok for ack in acks_of(sender, *messages))
    wait_until(lambda: receiver.desk.tick() == [grant.lease_id])
    response = commit_by_hand(sender, grant, manifest)
    assert (response.state, response.reason) == (pb.LEASE_STATE_EXPIRED, "TTL")
    assert receiver.committed == []
    assert receiver.store.num_owners == 0


def test_a_commit_that_waits_learns_of_a_cancel_at_once(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    _, manifest = all_frames(sender, grant)
    responses: list[pb.CommitResponse] = []
    commit = threading.Thread(target=lambda: responses.append(commit_by_hand(sender, grant, manifest)))
    commit.start()
    with receiver.desk.change() as table:
        table.cancel(RequestId("t", "r"), 1, "CLIENT")
    commit.join(4)  # well below the 5 s that it would wait for frames
    assert responses[0].state == pb.LEASE_STATE_ABORTED
    assert responses[0].reason == "CLIENT"


def test_a_cancel_at_the_last_moment_wins_over_the_commit(receiver: Receiver, sender: Sender) -> None:
    """All frames are here and the cache is being fenced, without the lock."""

    def cancel() -> None:
        with receiver.desk.change() as table:
            table.cancel(RequestId("t", "r"), 1, "CLIENT")

    receiver.store.fence = cancel  # type: ignore[method-assign]
    outcome = sender.push_all(sender.session(receiver.grant(64)), 64)
    assert (outcome.state, outcome.cause) == (LeaseState.ABORTED, "CLIENT")
    assert receiver.committed == []


def test_a_malformed_lease_id_is_an_invalid_argument(sender: Sender) -> None:
    stub = pb_grpc.KvTransferStub(sender.channel)
    with pytest.raises(grpc.RpcError) as failed:
        stub.Renew(pb.RenewRequest(lease=pb.LeaseRef(lease_id=b"short")), timeout=10.0)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_leases_have_no_state(receiver: Receiver, sender: Sender) -> None:
    stub = pb_grpc.KvTransferStub(sender.channel)
    lease = pb.LeaseRef(lease_id=bytes(16), attempt=1, receiver_epoch=receiver.epoch)
    assert stub.Renew(pb.RenewRequest(lease=lease), timeout=10.0).state == pb.LEASE_STATE_UNSPECIFIED
    assert stub.Abort(pb.AbortRequest(lease=lease), timeout=10.0).state == pb.LEASE_STATE_UNSPECIFIED
    assert stub.Commit(pb.CommitRequest(lease=lease), timeout=10.0).reason.startswith("UNKNOWN_LEASE")


# ---- ends before their time


def test_an_abort_mid_way_gives_the_memory_back(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(200)
    session = sender.session(grant)
    session.advance(100)
    wait_until(lambda: receiver.store.num_scatters > 0)
    assert session.abort("CLIENT_CANCELLED") is LeaseState.ABORTED
    wait_until(lambda: receiver.reclaimed == [grant.lease_id])
    scatters = receiver.store.num_scatters
    session.advance(200)
    with pytest.raises(TransferError, match="CLIENT_CANCELLED"):
        session.commit(sender.handoff(200), 5.0)
    assert receiver.store.num_scatters == scatters
    assert receiver.table.num_held == 0


def test_after_an_abort_nothing_reads_the_senders_cache(receiver: Receiver, sender: Sender) -> None:
    """The engine frees the blocks as soon as abort returns."""
    reading, let_go = threading.Event(), threading.Event()
    gather = sender.store.gather

    def slow_gather(owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None) -> torch.Tensor:
        reading.set()
        assert let_go.wait(10)
        finished.append(piece)
        return gather(owner, piece, wire, out)

    finished: list[Piece] = []
    sender.store.gather = slow_gather  # type: ignore[method-assign]
    session = sender.session(receiver.grant(64))
    session.advance(64)
    assert reading.wait(10)
    abort = threading.Thread(target=session.abort, args=("CLIENT_CANCELLED",))
    abort.start()
    abort.join(0.3)
    assert abort.is_alive()
    let_go.set()
    abort.join(10)
    assert len(finished) == 1


def commit_in_thread(session: PushSession, handoff: pb.Handoff) -> tuple[threading.Thread, list[str]]:
    """Commits, and notes the cause of what came instead."""
    causes: list[str] = []

    def commit() -> None:
        try:
            causes.append(session.commit(handoff, 20.0).cause)
        except TransferError as error:
            causes.append(error.cause)

    thread = threading.Thread(target=commit)
    thread.start()
    return thread, causes


def test_an_abort_ends_a_commit_that_waits(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    session = sender.session(grant)
    session.advance(64)
    with receiver.desk.change() as table:  # a frame that never finishes landing keeps the commit waiting
        assert isinstance(table.begin_landing(sender.ref(grant), 99, FrameRecord(1, 1)), Landing)
    thread, causes = commit_in_thread(session, sender.handoff(64))
    wait_until(lambda: len(receiver.lease(grant).landed) == len(pieces_for(GQA, range(64), 4096)))
    assert session.abort("CLIENT_CANCELLED") is LeaseState.ABORTED
    thread.join(4)
    # The receiver's answer, or this side's when the commit had not left yet.
    assert causes in (["CLIENT_CANCELLED"], ["CANCELLED"])
    assert receiver.committed == []


def test_an_abort_ends_a_commit_that_nobody_answers(receiver: Receiver, sender: Sender) -> None:
    """A frozen worker: connections stand, calls go unanswered."""
    grant = receiver.grant(64)
    session = sender.session(grant, options=PushOptions(frame_bytes=4096, abort_s=0.1))
    session.advance(64)
    wait_until(lambda: len(receiver.lease(grant).landed) == len(pieces_for(GQA, range(64), 4096)))
    frozen, thaw = threading.Event(), threading.Event()

    def freeze() -> None:
        with receiver.lock:
            frozen.set()
            thaw.wait(20)

    worker = threading.Thread(target=freeze)
    worker.start()
    assert frozen.wait(10)
    thread, causes = commit_in_thread(session, sender.handoff(64))
    time.sleep(0.1)  # so that the abort most often finds the commit under way; it holds either way
    assert session.abort("CLIENT_CANCELLED") is None
    thread.join(5)
    assert causes == ["CANCELLED"]
    thaw.set()
    worker.join()


def test_a_cache_that_cannot_be_read_fails_the_transfer(receiver: Receiver, sender: Sender) -> None:
    session = sender.session(receiver.grant(400))
    session.advance(400)  # the sender holds 200
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(400), 10.0)
    assert failed.value.cause == "CACHE_READ_FAILED"


def test_a_sender_that_vanishes_leaves_nothing_behind(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64, ttl_s=0.3)
    ref = sender.ref(grant)
    frame, _ = sender.frame(ref, 0, piece_of(sender))
    stream_open = threading.Event()

    def one_frame_then_silence() -> Iterator[bytes]:
        yield frame
        stream_open.wait(10)

    push = sender.channel.stream_stream("/headrace.v1.KvBulk/Push")
    call = push(one_frame_then_silence(), timeout=20.0)
    assert decode_opening(next(call)).credit > 0
    assert decode_ack(next(call)).ok
    wait_until(lambda: bool(receiver.desk.tick() or receiver.reclaimed))
    assert receiver.reclaimed == [grant.lease_id]
    assert receiver.table.num_held == 0
    assert receiver.store.num_owners == 0
    stream_open.set()
    call.cancel()


def test_an_idle_session_keeps_its_lease_alive(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64, ttl_s=0.3)
    session = sender.session(grant)
    lease = receiver.lease(grant)
    granted_at = lease.renewed_at
    wait_until(lambda: (receiver.desk.tick(), lease.renewed_at > granted_at + 0.6)[1])
    assert sender.push_all(session, 64).is_committed


def test_an_idle_session_notices_that_its_receiver_is_gone(receiver: Receiver, sender: Sender) -> None:
    session = sender.session(receiver.grant(64, ttl_s=0.3))
    receiver.close()
    wait_until(lambda: session.error is not None)
    assert session.error is not None
    assert session.error.cause == "PEER_UNAVAILABLE"


def test_a_peer_that_stops_reading_is_noticed_by_the_commit() -> None:
    """gRPC holds the request thread back: only the commit can see that nothing moves."""
    gate = threading.Event()
    receiver = Receiver(MIB_FRAMES, pace=holding(gate))
    sender = Sender(receiver, 256, MIB_FRAMES)
    options = PushOptions(window_bytes=1 << 30)
    session = sender.session(receiver.grant(256, ttl_s=0.5), options=options)
    session.advance(256)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(256), 20.0)
    assert failed.value.cause == "RECEIVER_STALLED"
    gate.set()
    sender.close()
    receiver.close()


def test_an_idle_session_learns_that_its_lease_is_gone(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64, ttl_s=0.3)
    session = sender.session(grant)
    with receiver.desk.change() as table:
        table.release(grant.lease_id)
    wait_until(lambda: session.error is not None)
    assert session.error is not None
    assert session.error.cause == "LEASE_LOST"


def test_a_request_deadline_ends_a_push(receiver: Receiver, sender: Sender) -> None:
    session = sender.session(receiver.grant(200), remaining_s=0.2)
    session.advance(64)
    wait_until(lambda: session.error is not None)
    assert session.error is not None
    assert session.error.cause == "DEADLINE_EXCEEDED"


def test_a_receiver_that_never_was_there_fails_quickly(receiver: Receiver, sender: Sender) -> None:
    grant = receiver.grant(64)
    sender.channel.close()
    receiver.close()
    sender.channel = open_bulk_channel(receiver.address)
    session = sender.session(grant, options=PushOptions(reconnect_s=0.2))
    session.advance(64)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(64), 20.0)
    assert failed.value.cause == "PEER_UNAVAILABLE"


def test_a_stream_that_breaks_is_taken_up_again(receiver: Receiver, sender: Sender) -> None:
    """The server goes away and comes back on its port; table and memory stay, as after a network fault."""
    grant = receiver.grant(200)
    session = sender.session(grant, options=PushOptions(frame_bytes=4096, reconnect_s=10.0))
    session.advance(100)
    wait_until(lambda: receiver.store.num_scatters > 0)
    receiver.restart_server()
    assert sender.push_all(session, 200).is_committed
    assert receiver.store.read(grant.lease_id, 200) == sender.store.read(sender.OWNER, 200)


def test_bytes_in_flight_are_bounded(sender: Sender) -> None:
    """The receiver lands nothing for a while: the sender stops reading its cache at the window."""
    gate = threading.Event()
    receiver = Receiver(pace=holding(gate))
    sender = Sender(receiver, 200)
    sizes: list[int] = []
    gather = sender.store.gather

    def counting_gather(
        owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        sizes.append(piece.num_bytes(GQA))
        return gather(owner, piece, wire, out)

    sender.store.gather = counting_gather  # type: ignore[method-assign]
    session = sender.session(receiver.grant(200), options=PushOptions(frame_bytes=4096, window_bytes=20_000))
    session.advance(200)
    wait_until(lambda: sum(sizes) > 20_000 - 4096)
    time.sleep(0.2)  # room to overrun
    assert sum(sizes) <= 20_000
    gate.set()
    assert session.commit(sender.handoff(200), 20.0).is_committed
    assert sum(sizes) == GQA.num_bytes(200)
    sender.close()
    receiver.close()


def test_a_receiver_that_stops_landing_fails_the_transfer() -> None:
    gate = threading.Event()
    receiver = Receiver(pace=holding(gate))
    sender = Sender(receiver, 64)
    session = sender.session(receiver.grant(64, ttl_s=0.4))
    session.advance(64)
    with pytest.raises(TransferError) as failed:
        session.commit(sender.handoff(64), 20.0)
    assert failed.value.cause == "RECEIVER_STALLED"
    wait_until(lambda: all(thread.name != "kv-push" for thread in threading.enumerate()))
    gate.set()
    sender.close()
    receiver.close()


KILLED_RECEIVER = """
import sys, time
from tests.integration.kvtransfer_harness import Receiver
receiver = Receiver(pace=lambda num_bytes: time.sleep(0.05))
grant = receiver.grant(200)
print(receiver.address, receiver.epoch, grant.lease_id.hex(), flush=True)
sys.stdin.read()
"""


def test_a_receiver_killed_in_mid_push_fails_the_transfer_quickly() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_RECEIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    try:
        assert process.stdout is not None
        address, epoch, lease_id = process.stdout.readline().split()

        sender = Sender(Peer(address, int(epoch)), 200)
        session = sender.session(Grant(bytes.fromhex(lease_id), 1, 30.0, repeated=False))
        session.advance(200)
        wait_until(lambda: session.stats().num_frames > 2)
        process.kill()
        with pytest.raises(TransferError) as failed:
            session.commit(sender.handoff(200), 30.0)
        assert failed.value.cause == "PEER_UNAVAILABLE"
        assert session.abort("FAILED") is None
        sender.close()
    finally:
        process.kill()
        process.communicate()
