"""The receiving end over gRPC: the bulk stream, and commit, abort and renew.

Thin: what a frame or a message does to a lease is decided by `leases.py`, whether the pieces suffice
by `coverage.py`; here are only the waiting, the words on the wire, and the order of the steps.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc

from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.coverage import find_gap
from kvtransfer.frames import LEASE_ID_BYTES, FrameRecord, LeaseRef, encode_ack
from kvtransfer.lease_types import Outcome, Ready, Refused, Waiting
from kvtransfer.transports.grpc_channel import BULK_SERVICE
from kvtransfer.transports.seam import HANDOFF_MAJOR, HandoffRefused, wire_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtransfer.cache_store import CacheStore
    from kvtransfer.desk import LeaseDesk
    from kvtransfer.landing import FrameLander
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.leases import LeaseTable

_log = logging.getLogger(__name__)

# An answer that names missing frames must reach the sender before its own deadline does.
REPLY_MARGIN_S = 0.1


class BulkReceiver:
    """Method Push of the bulk service: one acknowledgement for every frame, in order."""

    def __init__(self, lander: FrameLander) -> None:
        self._lander = lander

    def handler(self) -> grpc.GenericRpcHandler:
        """For `server.add_generic_rpc_handlers`: raw bytes in and out, no protobuf."""
        return grpc.method_handlers_generic_handler(
            BULK_SERVICE, {"Push": grpc.stream_stream_rpc_method_handler(self._push)}
        )

    def _push(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            for message in messages:
                yield encode_ack(self._lander.land(message))
        except grpc.RpcError:
            # The sender cancelled or is gone. A new stream may follow, or the lease's TTL ends it.
            return


class KvTransferService(pb_grpc.KvTransferServicer):
    """Commit, Abort and Renew.

    `on_commit(lease_id, handoff)`: makes the sequence visible to the decode scheduler. Called once per
    lease, under the lock, when all of it is here; raises HandoffRefused where it cannot be taken.
    `max_wait_s`: the longest that one Commit waits for frames before it answers which are missing.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        cache: CacheStore,
        layout: CacheLayout,
        on_commit: Callable[[bytes, pb.Handoff], None],
        clock: Callable[[], float],
        max_wait_s: float = 5.0,
    ) -> None:
        self._desk = desk
        self._cache = cache
        self._layout = layout
        self._layout_identity = layout.identity()
        self._on_commit = on_commit
        self._clock = clock
        self._max_wait_s = max_wait_s

    def Commit(self, request: pb.CommitRequest, context: grpc.ServicerContext) -> pb.CommitResponse:
        ref = _lease_ref(request.lease, context)
        manifest = {e.frame: FrameRecord(e.raw_bytes, e.checksum) for e in request.manifest}
        verdict = self._await_frames(ref, manifest, self._clock() + self._wait_s(request, context))
        if isinstance(verdict, Ready):
            self._cache.fence()
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
            self._on_commit(ready.lease_id, handoff)
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
        if handoff.layout != self._layout_identity:
            raise HandoffRefused("LAYOUT_MISMATCH", "the sender's cache layout is not this worker's")
        gap = find_gap(self._layout, ready.pieces, ready.start_token, handoff.num_tokens)
        if gap is not None:
            raise HandoffRefused("MANIFEST_INCOMPLETE", gap)

    def _give_up(self, ref: LeaseRef, refused: Refused) -> Outcome | Refused:
        """What landed can never become what the manifest says: end the lease, so that repeats agree."""
        with self._desk.change() as table:
            return table.abort(ref, f"{refused.refusal}: {refused.message}")


def add_kv_services(server: grpc.Server, receiver: BulkReceiver, service: KvTransferService) -> None:
    """Registers both on a server made by `make_bulk_server`."""
    server.add_generic_rpc_handlers((receiver.handler(),))
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
