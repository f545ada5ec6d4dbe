"""What every transport offers to the prefill service, and how it fails. Knows no gRPC."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from headrace.v1 import kvtransfer_pb2 as pb
from kvtransfer.lease_types import LeaseState

HANDOFF_MAJOR = 1

_WIRE_STATES = {
    LeaseState.GRANTED: pb.LEASE_STATE_GRANTED,
    LeaseState.FILLING: pb.LEASE_STATE_FILLING,
    LeaseState.COMMITTED: pb.LEASE_STATE_COMMITTED,
    LeaseState.RELEASED: pb.LEASE_STATE_RELEASED,
    LeaseState.ABORTED: pb.LEASE_STATE_ABORTED,
    LeaseState.EXPIRED: pb.LEASE_STATE_EXPIRED,
}
_LEASE_STATES = {wire: state for state, wire in _WIRE_STATES.items()}


class TransferCause(StrEnum):
    """Causes of this side. A TransferError may also carry a refusal of the lease table or of a frame."""

    PEER_UNAVAILABLE = "PEER_UNAVAILABLE"  # no connection, for longer than retries are worth
    PEER_REFUSED = "PEER_REFUSED"  # the call failed with a status that a retry does not mend
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    RECEIVER_STALLED = "RECEIVER_STALLED"  # connected, but nothing was acknowledged for a lease's TTL
    LEASE_LOST = "LEASE_LOST"  # the receiver has ended the lease
    PROTOCOL_ERROR = "PROTOCOL_ERROR"
    CACHE_READ_FAILED = "CACHE_READ_FAILED"
    CANCELLED = "CANCELLED"  # by this side's abort
    INTERNAL = "INTERNAL"


class TransferError(Exception):
    """A transfer that has failed for good. `cause` is UPPER_SNAKE: a TransferCause, Refusal or AckFault."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = str(cause)
        self.message = message


class HandoffRefused(Exception):
    """Raised by a receiver's `on_commit` when the sequence cannot be taken over; the lease is aborted."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What the lease table decided. Where it is not COMMITTED, cause and message say what came first."""

    state: LeaseState | None  # None: the receiver does not know the lease, or not as ours
    cause: str = ""
    message: str = ""

    @property
    def is_committed(self) -> bool:
        return self.state is LeaseState.COMMITTED


@dataclass(frozen=True, slots=True)
class PushStats:
    """What a push has cost so far. Times are of this process's monotonic clock.

    `kv_bytes`: canonical bytes of distinct frames; `wire_bytes`: as sent, with headers and repeats, in landing slots
    too. `codecs`: canonical bytes by the codec that they went in; `reason`: why the most used of them was chosen.
    `carriers`: canonical bytes, repeats too, by how they travelled: "inline" in the messages, or a carrier's kind.
    `transfer_s`: first frame begun to last acknowledgement. `frame_s`: time during which at least one
    frame was being read, encoded or in flight; overlapping frames count once, so that it can be
    compared with the time a request was made to wait.
    """

    num_tokens: int
    num_frames: int
    num_resent: int
    kv_bytes: int
    wire_bytes: int
    transfer_s: float
    frame_s: float
    codecs: dict[str, int] = field(default_factory=dict)
    carriers: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def codec(self) -> str:
        """The most used one; empty where nothing was sent."""
        return max(self.codecs, key=self.codecs.__getitem__, default="")


class Pusher(Protocol):
    """Sends one sequence's cache into one lease while it is being computed."""

    @property
    def error(self) -> TransferError | None:
        """Set once the transfer has failed for good: computing on is of no use."""

    def advance(self, num_tokens: int, num_layers: int | None = None) -> None:
        """Cache of positions [0, num_tokens) is ready to be sent, of the last chunk only the first `num_layers`
        layers where that is given. Never blocks."""

    def declare_fidelity(self, rank: int) -> None:
        """The worst class of what this side's cache holds of the sequence (0 exact, 1 near, 2 compact), where the
        prefix that it begins with is not exact. Before the first `advance` beyond that prefix."""

    def commit(self, handoff: pb.Handoff, remaining_s: float) -> CommitOutcome:
        """Sends the rest, then hands over. Blocks up to `remaining_s`. Raises TransferError."""

    def abort(self, cause: str) -> LeaseState | None:
        """Ends the transfer; when it returns, nothing reads the cache on its behalf any more.

        Gives the lease's state as the receiver told it, or None where it could not be told. After a
        commit that has won, this is COMMITTED.
        """

    def stats(self) -> PushStats:
        """So far; final after commit or abort."""


def wire_state(state: LeaseState | None) -> pb.LeaseState:
    """UNSPECIFIED for None: the lease is not known, or not as the caller's."""
    return pb.LEASE_STATE_UNSPECIFIED if state is None else _WIRE_STATES[state]


def lease_state(wire: pb.LeaseState) -> LeaseState | None:
    """None for UNSPECIFIED, and for a state that this version does not know."""
    return _LEASE_STATES.get(wire)
