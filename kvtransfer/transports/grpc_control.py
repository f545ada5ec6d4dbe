"""The sender's unary calls about one lease: commit, renew, abort, with their deadlines and retries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from headrace.v1 import kvtransfer_pb2 as pb
from headrace.v1 import kvtransfer_pb2_grpc as pb_grpc
from kvtransfer.transports.seam import TransferCause, TransferError, lease_state

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence

    from kvtransfer.frames import FrameRecord, LeaseRef
    from kvtransfer.lease_types import LeaseState

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 0.5
TRANSIENT_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class LeaseControl:
    """`stop`: set to give up waiting between retries."""

    def __init__(
        self,
        channel: grpc.Channel,
        lease: LeaseRef,
        metadata: Sequence[tuple[str, str]],
        clock: Callable[[], float],
        stop: threading.Event,
    ) -> None:
        self._stub = pb_grpc.KvTransferStub(channel)
        self._lease = pb.LeaseRef(
            lease_id=lease.lease_id,
            attempt=lease.attempt,
            sender_epoch=lease.sender_epoch,
            receiver_epoch=lease.receiver_epoch,
        )
        self._metadata = tuple(metadata)
        self._clock = clock
        self._stop = stop
        self._commit_call: grpc.Future[pb.CommitResponse] | None = None

    def commit(
        self, manifest: Mapping[int, FrameRecord], handoff: pb.Handoff, deadline: float, patience_s: float
    ) -> pb.CommitResponse:
        """One answer to a commit. Retries while the peer is unavailable, for at most `patience_s`.

        Safe to retry: commit is idempotent. Raises TransferError.
        """
        request = pb.CommitRequest(lease=self._lease, handoff=handoff)
        for number, record in manifest.items():
            request.manifest.add(frame=number, raw_bytes=record.raw_bytes, checksum=record.checksum)
        give_up_at = min(deadline, self._clock() + patience_s)
        backoff_s = FIRST_BACKOFF_S
        while True:
            remaining_s = deadline - self._clock()
            if remaining_s <= 0:
                raise TransferError(TransferCause.DEADLINE_EXCEEDED, "the commit was not answered in time")
            request.remaining_s = remaining_s
            self._commit_call = self._stub.Commit.future(
                request, timeout=remaining_s, metadata=self._metadata
            )
            try:
                return self._commit_call.result()
            except grpc.FutureCancelledError as error:
                text = "aborted before the receiver answered the commit"
                raise TransferError(TransferCause.CANCELLED, text) from error
            except grpc.RpcError as error:
                transfer_error = as_transfer_error(error)
                if error.code() not in TRANSIENT_CODES or self._clock() + backoff_s >= give_up_at:
                    raise transfer_error from error
            if self._stop.wait(backoff_s):
                raise transfer_error
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def cancel_commit(self) -> None:
        """Ends the wait for an answer that has not come; without effect on one that has."""
        if self._commit_call is not None:
            self._commit_call.cancel()

    def renew(self, timeout_s: float) -> LeaseState | None:
        """The lease's state. Raises grpc.RpcError: the caller knows how long it may try again."""
        request = pb.RenewRequest(lease=self._lease)
        return lease_state(self._stub.Renew(request, timeout=timeout_s, metadata=self._metadata).state)

    def abort(self, cause: str, timeout_s: float) -> LeaseState | None:
        """Best effort: where it does not arrive, the lease's TTL does the same. None when it did not."""
        request = pb.AbortRequest(lease=self._lease, cause=cause)
        try:
            return lease_state(self._stub.Abort(request, timeout=timeout_s, metadata=self._metadata).state)
        except grpc.RpcError:
            return None


def as_transfer_error(error: grpc.RpcError) -> TransferError:
    """The cause that a failed call stands for."""
    code = error.code()
    text = f"{code.name}: {error.details()}"
    if code in TRANSIENT_CODES:
        return TransferError(TransferCause.PEER_UNAVAILABLE, text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TransferError(TransferCause.DEADLINE_EXCEEDED, text)
    return TransferError(TransferCause.PEER_REFUSED, text)
