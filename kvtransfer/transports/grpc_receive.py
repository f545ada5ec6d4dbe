"""The receiving end over gRPC: the bulk stream, and commit, abort and renew.

Thin: what a frame or a message does to a lease is decided by `leases.py`, whether the pieces suffice
by `coverage.py`; here are only the waiting, the words on the wire, and the order of the steps.

Memory: what is held of all streams is what they sent and nobody acknowledged, so at most the credit book's budget
where senders keep to their credit. On top come, for each open stream, copies while one message is handed over by
gRPC and one is decoded: 3 frames. A sender that does not keep to its credit is held back by HTTP/2: three messages
of a stream are read (at most MAX_MESSAGE_BYTES each), the rest waits in its flow-control window.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc

from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.coverage import find_gap
from kvtransfer.frames import LEASE_ID_BYTES, FrameRecord, LeaseRef, encode_ack, encode_opening
from kvtransfer.landing import layout_of
from kvtransfer.landing_stream import LandingStream
from kvtransfer.lease_types import Outcome, Ready, Refused, Waiting
from kvtransfer.read_ahead import ReadAhead
from kvtransfer.transports.grpc_channel import BULK_SERVICE, LAST_WORD
from kvtransfer.transports.seam import HANDOFF_MAJOR, HandoffRefused, wire_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.credit import CreditBook
    from kvtransfer.desk import LeaseDesk
    from kvtransfer.landing import FrameLander, FrameSink, LayoutOf
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.leases import LeaseTable
    from kvtransfer.transports.carriers import LandingSlots
    from kvtransfer.transports.grpc_serve import FetchServer

    OpenSlots = Callable[[Sequence[tuple[str, str | bytes]]], Sequence[LandingSlots]]

_log = logging.getLogger(__name__)

# An answer that names missing frames must reach the sender before its own deadline does.
REPLY_MARGIN_S = 0.1

_READ_AHEAD = 1  # messages of one stream that wait while one lands


class BulkReceiver:
    """Method Push of the bulk service: an opening, then one acknowledgement for every frame, in order.

    `credits`: divides what may be in flight among the streams; a stream more than it carries is refused with
    RESOURCE_EXHAUSTED, which a sender tries again. `open_slots(metadata)`: landing slots for a new stream, by the
    metadata of its call; may give none.
    """

    def __init__(self, lander: FrameLander, credits: CreditBook, open_slots: OpenSlots | None = None) -> None:
        self._lander = lander
        self._credits = credits
        self._open_slots = open_slots

    def handler(self) -> grpc.GenericRpcHandler:
        """For `server.add_generic_rpc_handlers`: raw bytes in and out, no protobuf."""
        return grpc.method_handlers_generic_handler(
            BULK_SERVICE, {"Push": grpc.stream_stream_rpc_method_handler(self._push)}
        )

    def _push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        stream = self._open(context)
        ahead = ReadAhead(messages, _READ_AHEAD, "kv-read")
        is_clean = False
        try:
            yield encode_opening(stream.opening())
            for message in ahead:
                if message == LAST_WORD:
                    is_clean = True
                    break
                ack = stream.take(message)
                del message  # or it is held until the next one comes
                yield encode_ack(ack)
        except grpc.RpcError:
            # The sender cancelled or is gone. A new stream may follow, or the lease's TTL ends it.
            return
        finally:
            ahead.close()
            stream.close(clean=is_clean)

    def _open(self, context: grpc.ServicerContext) -> LandingStream:
        name = self._credits.open()
        if name is None:
            text = f"{self._credits.max_streams} streams land here already, as many as the landing budget carries"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        slots: Sequence[LandingSlots] = ()
        if self._open_slots is not None:
            try:
                slots = self._open_slots(context.invocation_metadata())
            except Exception:  # noqa: BLE001 - the stream carries everything where slots cannot be had
                _log.exception("no landing slots for a stream")
        return LandingStream(self._lander, self._credits, name, slots)


class KvTransferService(pb_grpc.KvTransferServicer):
    """Commit, Abort and Renew.

    `sink`: what the frames went to; `layout`: as the lander has it. `on_commit(lease_id, handoff, fidelity)`: makes
    the sequence visible to the decode scheduler; `fidelity` is the worst rank of what landed (0 exact, 1 near, 2
    compact). Called once per lease, under the lock, when all of it is here; raises HandoffRefused where it cannot
    be taken.
    `max_wait_s`: the longest that one Commit waits for frames before it answers which are missing.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        sink: FrameSink,
        layout: CacheLayout | LayoutOf,
        on_commit: Callable[[bytes, pb.Handoff, int], None],
        clock: Callable[[], float],
        max_wait_s: float = 5.0,
    ) -> None:
        self._desk = desk
        self._sink = sink
        self._layout_of = layout_of(layout)
        self._on_commit = on_commit
        self._clock = clock
        self._max_wait_s = max_wait_s

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        ref = _lease_ref(request.lease, context)
        manifest = {e.frame: FrameRecord(e.raw_bytes, e.checksum) for e in request.manifest}
        verdict = self._await_frames(ref, manifest, self._clock() + self._wait_s(request, context))
        if isinstance(verdict, Ready):
            self._sink.fence()
            with self._desk.change() as table:
                # The lock was let go since: a cancel may have come first.
                verdict = table.check_commit(ref, manifest)
                if isinstance(verdict, Ready):
                    verdict = self._adopt(table, ref, verdict, request.handoff)
        if isinstance(verdict, Refused) and verdict.state is not None and verdict.state.is_open:
            verdict = self._give_up(ref, verdict)
        return _commit_response(verdict)

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        ref = _lease_ref(request.lease, context)
        with self._desk.change() as table:
            answer = table.abort(ref, request.cause)
        return pb.AbortResponse(state=wire_state(answer.state))

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        ref = _lease_ref(request.lease, context)
        with self._desk.change() as table:
            answer = table.renew(ref)
            lease = table.get(ref.lease_id)
            ttl_s = lease.ttl_s if lease is not None and lease.state.is_open else 0.0
        return pb.RenewResponse(state=wire_state(answer.state), ttl_s=ttl_s)

    def _wait_s(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> float:
        wait_s = min(request.remaining_s, self._max_wait_s)
        call_s = context.time_remaining()
        return wait_s if call_s is None else min(wait_s, call_s - REPLY_MARGIN_S)

    def _await_frames(
        self, ref: LeaseRef, manifest: dict[int, FrameRecord], deadline: float
    ) -> Ready | Waiting | Outcome | Refused:
        while True:
            with self._desk.change() as table:
                verdict = table.check_commit(ref, manifest)
                version = table.version
            now = self._clock()
            if not isinstance(verdict, Waiting) or now >= deadline:
                return verdict
            self._desk.wait_beyond(version, min(deadline, verdict.until) - now)

    def _adopt(
        self, table: LeaseTable, ref: LeaseRef, ready: Ready, handoff: pb.Handoff
    ) -> Outcome | Refused:
        """Under the lock, so that nothing comes between the decode service's yes and the commit."""
        try:
            self._verify(ready, handoff)
            self._on_commit(ready.lease_id, handoff, ready.fidelity)
        except HandoffRefused as error:
            return table.abort(ref, f"{error.cause}: {error.message}")
        except Exception as error:  # noqa: BLE001 - a fault there must not leave a lease that nobody ends
            _log.exception("taking over lease %s failed", ready.lease_id.hex())
            return table.abort(ref, f"HANDOFF_FAILED: {type(error).__name__}")
        return table.commit(ready.lease_id)

    def _verify(self, ready: Ready, handoff: pb.Handoff) -> None:
        if handoff.handoff_major != HANDOFF_MAJOR:
            text = f"the handoff record has major version {handoff.handoff_major}, here it is {HANDOFF_MAJOR}"
            raise HandoffRefused("HANDOFF_VERSION", text)
        layout = self._layout_of(ready.lease_id)
        if handoff.layout != layout.identity():
            raise HandoffRefused("LAYOUT_MISMATCH", "the sender's cache layout is not this worker's")
        gap = find_gap(layout, ready.pieces, ready.start_token, handoff.num_tokens)
        if gap is not None:
            raise HandoffRefused("MANIFEST_INCOMPLETE", gap)

    def _give_up(self, ref: LeaseRef, refused: Refused) -> Outcome | Refused:
        """What landed can never become what the manifest says: end the lease, so that repeats agree."""
        with self._desk.change() as table:
            return table.abort(ref, f"{refused.refusal}: {refused.message}")


def add_kv_services(
    server: grpc.Server,
    receiver: BulkReceiver,
    service: KvTransferService,
    fetches: FetchServer | None = None,
) -> None:
    """Registers them on a server made by `make_bulk_server`; without `fetches`, method Fetch is not offered."""
    server.add_generic_rpc_handlers((receiver.handler(),))
    if fetches is not None:
        server.add_generic_rpc_handlers((fetches.handler(),))
    pb_grpc.add_KvTransferServicer_to_server(service, server)


def _lease_ref(lease: pb.LeaseRef, context: grpc.ServicerContext) -> LeaseRef:
    if len(lease.lease_id) != LEASE_ID_BYTES:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"lease_id must have {LEASE_ID_BYTES} bytes, got {len(lease.lease_id)}",
        )
    return LeaseRef(lease.lease_id, lease.attempt, lease.sender_epoch, lease.receiver_epoch)


def _commit_response(verdict: Ready | Waiting | Outcome | Refused) -> pb.CommitResponse:
    match verdict:
        case Waiting(missing=missing):
            return pb.CommitResponse(state=wire_state(verdict.state), missing_frames=missing)
        case Refused(refusal, message):
            return pb.CommitResponse(state=wire_state(None), reason=f"{refusal}: {message}")
        case Outcome(cause=cause):
            return pb.CommitResponse(state=wire_state(verdict.state), reason=cause)
        case Ready():
            raise AssertionError("a ready lease is committed or aborted before it is answered")
