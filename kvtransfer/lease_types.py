"""The values of the lease table (leases.py): states, refusals, verdicts, counters, and the lease itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtransfer.frames import FrameRecord
    from kvtransfer.layouts import Piece


class LeaseState(StrEnum):
    GRANTED = "GRANTED"
    FILLING = "FILLING"
    COMMITTED = "COMMITTED"
    RELEASED = "RELEASED"
    ABORTED = "ABORTED"
    EXPIRED = "EXPIRED"

    @property
    def is_open(self) -> bool:
        """Frames and a commit may still come."""
        return self in (LeaseState.GRANTED, LeaseState.FILLING)

    @property
    def is_over(self) -> bool:
        return self in (LeaseState.RELEASED, LeaseState.ABORTED, LeaseState.EXPIRED)


class Refusal(StrEnum):
    """Why a message had no effect."""

    STALE_ATTEMPT = "STALE_ATTEMPT"  # a newer placement of the request is known here
    STALE_EPOCH = "STALE_EPOCH"  # of another incarnation of the sender or of this worker
    UNKNOWN_LEASE = "UNKNOWN_LEASE"  # never granted, or over so long ago that it is forgotten
    LEASE_CLOSED = "LEASE_CLOSED"  # committed or over
    CANCELLED = "CANCELLED"  # the cancel came before the reserve
    FRAME_CONFLICT = "FRAME_CONFLICT"  # the number has landed with other bytes
    FRAME_LANDING = "FRAME_LANDING"  # the number is being written at this moment; send it again
    MANIFEST_MISMATCH = "MANIFEST_MISMATCH"  # what landed is not what the manifest says


@dataclass(frozen=True, slots=True)
class RequestId:
    """A request of a tenant; its placements are told apart by an attempt number."""

    tenant: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Grant:
    lease_id: bytes
    attempt: int
    ttl_s: float
    repeated: bool  # the same reserve came before: its blocks are held already


@dataclass(frozen=True, slots=True)
class Refused:
    refusal: Refusal
    message: str
    state: LeaseState | None = None


@dataclass(frozen=True, slots=True)
class Landing:
    """Leave to write one frame; `end_landing` must follow, whatever happens. `start_token` and `fidelity` bound it;
    `order` counts the landings of its lease."""

    lease_id: bytes
    number: int
    start_token: int
    fidelity: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class AlreadyLanded:
    """A repeat of a frame that is here: acknowledge it, do not write it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Every frame of the manifest has landed, and nothing else: the lease may be committed now.

    `fidelity`: the worst rank that landed (0 exact, 1 near, 2 compact).
    """

    lease_id: bytes
    start_token: int
    pieces: tuple[Piece, ...]
    fidelity: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Frames of the manifest have not landed yet. `until` is when the lease runs out."""

    state: LeaseState
    missing: tuple[int, ...]
    until: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a lease: its state, and the cause where it is over."""

    state: LeaseState
    cause: str = ""


@dataclass(slots=True)
class LeaseCounters:
    """Since the table was made. `stale` counts messages of older attempts or other epochs."""

    granted: int = 0
    committed: int = 0
    released: int = 0
    aborted: int = 0
    expired: int = 0
    stale: int = 0
    unknown: int = 0
    closed: int = 0
    repeated: int = 0
    cancelled_early: int = 0


@dataclass(slots=True)
class Lease:
    """One grant. Read it; only the table writes it.

    `fidelity`: the worst rank that may land, `landed_fidelity` the worst that did.
    """

    lease_id: bytes
    request: RequestId
    attempt: int
    peer_epoch: int | None
    ttl_s: float
    renewed_at: float
    deadline: float
    state: LeaseState
    fidelity: int = 0
    landed_fidelity: int = 0
    cause: str = ""
    start_token: int = 0
    landed: dict[int, tuple[FrameRecord, Piece]] = field(default_factory=dict)
    landing: set[int] = field(default_factory=set)
    num_landings: int = 0
    spoiled: list[tuple[int, Piece]] = field(default_factory=list)
    """Where frames were written, or may have been in part, that did not land, and how many landings had begun by then;
    without what a later frame was written over."""

    @property
    def expires_at(self) -> float:
        """Clock seconds at which an open lease runs out."""
        return min(self.deadline, self.renewed_at + self.ttl_s)
