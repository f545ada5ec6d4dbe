"""Leases: who owns memory on a decode worker, from the grant until the last byte is given back.

One table per worker is the point of order: of commit, cancel and expiry the first wins, and the
others get its outcome. It is a state machine over plain values: it knows no block, no thread and no
wall clock. All methods are called under one lock that the caller holds.

What each message does in each state. `-` means no effect; the answer is in brackets.

    message      (none)        GRANTED         FILLING         COMMITTED       over*
    ----------------------------------------------------------------------------------------------
    grant        GRANTED       - [same]        - [same]        - [same]        - [LEASE_CLOSED]
    grant, newer GRANTED       ABORTED, new    ABORTED, new    RELEASED, new   new
    grant, older - [STALE]     - [STALE]       - [STALE]       - [STALE]       - [STALE]
    frame        - [UNKNOWN]   FILLING         FILLING         - [CLOSED]**    - [CLOSED]
    commit       - [UNKNOWN]   COMMITTED***    COMMITTED***    - [COMMITTED]   - [its outcome]
    renew        - [UNKNOWN]   TTL restarts    TTL restarts    - [COMMITTED]   - [its state]
    abort        - [UNKNOWN]   ABORTED         ABORTED         - [COMMITTED]   - [its state]
    cancel       tombstone     ABORTED         ABORTED         RELEASED        - [its state]
    take over    -             - [no]          - [no]          newer attempt   - [no]
    release      - [UNKNOWN]   ABORTED         ABORTED         RELEASED        - [its state]
    expiry       -             EXPIRED         EXPIRED         -               -
    fence        -             ABORTED         ABORTED         RELEASED        -

    *   RELEASED, ABORTED or EXPIRED. RELEASED was COMMITTED before, so its answer to commit is COMMITTED.
    **  A repeat of a frame that landed is acknowledged again while the lease is not over.
    *** When every frame of the manifest has landed and none is being written; else the answer is
        what is missing and the state stays.

A frame that is let in may still be refused before it is written: over the prefix that the lease holds, or of a worse
fidelity than it was granted for. Frame, commit, renew and abort come from the sender and carry attempt and both
epochs; any that differ are refused and counted. The first frame or commit binds the lease to the sender's epoch, if
the grant did not. Cancel comes from the router, names request and attempt, and is accepted in every state: before its
grant it leaves a tombstone (a bounded number of them). Release comes from this worker. A local lease has no sender
and nothing to land: it is granted in state COMMITTED.

Of a fetch, the asker is the granter: frames come from the answerer, the rest from the asker itself.
A lease expires at its deadline or a TTL after the last frame or renewal; this is also checked whenever a message names
it. A committed lease does not expire: the request's deadline is then the decode service's to keep (`overdue`).

Memory of a lease that is over may be given back once no frame is being written into it; each such
lease comes out of `drain_reclaimable` exactly once, and `take_landed` says what of it is worth keeping. A
bounded number of leases that are over is remembered, so that late and repeated messages get the right
answer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import count, takewhile
from typing import TYPE_CHECKING

from kvtransfer.frames import LEASE_ID_BYTES
from kvtransfer.lease_types import (
    AlreadyLanded,
    Grant,
    Landing,
    Lease,
    LeaseCounters,
    LeaseState,
    Outcome,
    Ready,
    Refusal,
    Refused,
    RequestId,
    Waiting,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtransfer.frames import FrameRecord, LeaseRef
    from kvtransfer.layouts import Piece

DEFAULT_REMEMBERED = 4096


class LeaseTable:
    """The leases of one worker incarnation; see the module's table of states and messages.

    `epoch`: this incarnation's random 64-bit number. `clock`: monotonic seconds. `random_bytes`:
    makes lease ids (`secrets.token_bytes`). `remembered`: how many leases that are over, and how
    many tombstones, are kept.
    """

    def __init__(
        self,
        epoch: int,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        remembered: int = DEFAULT_REMEMBERED,
    ) -> None:
        self.epoch = epoch
        self.counters = LeaseCounters()
        self.version = 0  # rises with every change: a waiter compares it
        self._clock = clock
        self._random_bytes = random_bytes
        self._remembered = remembered
        self._leases: dict[bytes, Lease] = {}
        self._current: dict[RequestId, bytes] = {}  # the newest attempt's lease
        self._over: OrderedDict[bytes, None] = OrderedDict()  # drained, oldest first
        self._tombstones: OrderedDict[RequestId, int] = OrderedDict()  # request to cancelled attempt
        self._reclaimable: list[bytes] = []

    # ---- the router's messages

    def grant(
        self,
        request: RequestId,
        attempt: int,
        *,
        ttl_s: float,
        remaining_s: float,
        peer_epoch: int | None = None,
        local: bool = False,
        fidelity: int = 0,
    ) -> Grant | Refused:
        """Opens a lease, or says why not. The caller then reserves memory under the lease's id, and
        releases the lease where there is none. `remaining_s`: of the request's deadline. `fidelity`: the
        worst rank that may land in it (0 exact, 1 near, 2 compact).
        Raises ValueError for times that are not finite: such a lease would never end.
        """
        if not (math.isfinite(ttl_s) and math.isfinite(remaining_s)):
            raise ValueError(f"ttl_s and remaining_s must be finite, got {ttl_s} and {remaining_s}")
        cancelled = self._tombstones.get(request)
        if cancelled is not None and attempt <= cancelled:
            self.counters.cancelled_early += 1
            return Refused(Refusal.CANCELLED, f"attempt {attempt} was cancelled before it was reserved")
        current = self._find_current(request)
        if current is not None and attempt <= current.attempt:
            return self._grant_again(current, attempt)
        if current is not None:
            self._end_by_owner(current, "SUPERSEDED")
        now = self._clock()
        lease = Lease(
            lease_id=self._random_bytes(LEASE_ID_BYTES),
            request=request,
            attempt=attempt,
            peer_epoch=peer_epoch,
            ttl_s=ttl_s,
            renewed_at=now,
            deadline=now + remaining_s,
            state=LeaseState.COMMITTED if local else LeaseState.GRANTED,
            fidelity=fidelity,
        )
        self._leases[lease.lease_id] = lease
        self._current[request] = lease.lease_id
        self.counters.granted += 1
        self.version += 1
        return Grant(lease.lease_id, attempt, ttl_s, repeated=False)

    def hold_prefix(self, lease_id: bytes, num_tokens: int) -> None:
        """Notes that the first `num_tokens` positions are cached and pinned here: they need not, and
        must not, be written. Raises KeyError for an unknown lease.
        """
        self._leases[lease_id].start_token = num_tokens

    def cancel(self, request: RequestId, attempt: int, cause: str) -> Outcome:
        """Ends the attempt, and any older one, in whatever state it is; unknown, it leaves a tombstone."""
        lease = self._find_current(request)
        if lease is not None and lease.attempt > attempt:
            self.counters.stale += 1
            return Outcome(lease.state, Refusal.STALE_ATTEMPT)
        if lease is not None:
            self._end_by_owner(lease, cause)
        if lease is None or lease.attempt < attempt:
            self._leave_tombstone(request, attempt)
            return Outcome(LeaseState.ABORTED, cause)
        return Outcome(lease.state, lease.cause)

    def take_over(self, lease_id: bytes, attempt: int) -> bool:
        """A committed lease goes on as a newer attempt of its request; False, with nothing changed, where it cannot.
        Raises KeyError for an unknown lease."""
        lease = self._leases[lease_id]
        if lease.state is not LeaseState.COMMITTED or attempt <= lease.attempt:
            return False
        lease.attempt = attempt
        return True

    # ---- the sender's messages

    def begin_landing(
        self, ref: LeaseRef, number: int, record: FrameRecord
    ) -> Landing | AlreadyLanded | Refused:
        """Asks to write a frame whose checksum has been verified."""
        lease = self._admit(ref)
        if isinstance(lease, Refused):
            return lease
        known = lease.landed.get(number)
        if known is not None and not lease.state.is_over:
            if known[0] != record:
                return Refused(
                    Refusal.FRAME_CONFLICT, f"frame {number} has landed with other bytes", lease.state
                )
            self.counters.repeated += 1
            return AlreadyLanded()
        if not lease.state.is_open:
            self.counters.closed += 1
            return _closed(lease)
        if number in lease.landing:
            return Refused(Refusal.FRAME_LANDING, f"frame {number} is being written", lease.state)
        lease.landing.add(number)
        lease.num_landings += 1
        lease.state = LeaseState.FILLING
        lease.renewed_at = self._clock()
        return Landing(lease.lease_id, number, lease.start_token, lease.fidelity, lease.num_landings)

    def end_landing(
        self, landing: Landing, record: FrameRecord, piece: Piece, *, landed: bool, fidelity: int = 0
    ) -> LeaseState:
        """Closes what `begin_landing` opened; `landed` is False when the frame was not written whole. `fidelity`:
        the rank of what was written."""
        lease = self._leases[landing.lease_id]
        lease.landing.remove(landing.number)
        if landed and lease.state.is_open:
            lease.landed[landing.number] = (record, piece)
            lease.landed_fidelity = max(lease.landed_fidelity, fidelity)
            lease.spoiled = [
                (ended_at, left)
                for ended_at, spoiled in lease.spoiled
                for left in ([spoiled] if ended_at >= landing.order else spoiled.without(piece))
            ]
        else:
            lease.spoiled.append((lease.num_landings, piece))
        self._note_reclaimable(lease)
        self.version += 1
        return lease.state

    def check_commit(
        self, ref: LeaseRef, manifest: Mapping[int, FrameRecord]
    ) -> Ready | Waiting | Outcome | Refused:
        """Whether `commit` may follow under the same hold of the lock, or what it would answer."""
        lease = self._admit(ref)
        if isinstance(lease, Refused):
            return lease
        if not lease.state.is_open:
            return _commit_outcome(lease)
        for number, (record, _) in lease.landed.items():
            if manifest.get(number) != record:
                text = f"frame {number} landed, but the manifest lacks it or has another checksum"
                return Refused(Refusal.MANIFEST_MISMATCH, text, lease.state)
        if _is_written_over(lease):
            text = "something was written to the place of a frame that landed"
            return Refused(Refusal.MANIFEST_MISMATCH, text, lease.state)
        missing = tuple(sorted(number for number in manifest if number not in lease.landed))
        if missing or lease.landing:
            return Waiting(lease.state, missing, lease.expires_at)
        pieces = tuple(piece for _, piece in lease.landed.values())
        return Ready(lease.lease_id, lease.start_token, pieces, lease.landed_fidelity)

    def commit(self, lease_id: bytes) -> Outcome:
        """Hands an open lease over to the decode service; otherwise gives the outcome that came first.

        Only after `check_commit` said Ready. Raises KeyError for an unknown lease.
        """
        lease = self._leases[lease_id]
        if lease.state.is_open:
            lease.state = LeaseState.COMMITTED
            self.counters.committed += 1
            self.version += 1
        return _commit_outcome(lease)

    def renew(self, ref: LeaseRef) -> Outcome | Refused:
        """Restarts the TTL of an open lease."""
        lease = self._admit(ref)
        if isinstance(lease, Refused):
            return lease
        if lease.state.is_open:
            lease.renewed_at = self._clock()
        return Outcome(lease.state, lease.cause)

    def abort(self, ref: LeaseRef, cause: str) -> Outcome | Refused:
        """The sender gives an open lease back. After a commit it changes nothing and says so."""
        lease = self._admit(ref)
        if isinstance(lease, Refused):
            return lease
        if lease.state.is_open:
            self._end(lease, LeaseState.ABORTED, cause)
        return Outcome(lease.state, lease.cause)

    # ---- this worker's own

    def release(self, lease_id: bytes, cause: str = "") -> Outcome | Refused:
        """The decode service is done with a lease; one not yet committed is aborted."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return self._unknown(lease_id)
        self._end_by_owner(lease, cause)
        return Outcome(lease.state, lease.cause)

    def expire(self) -> list[bytes]:
        """Ends the open leases whose time is up, and returns their ids."""
        before = [lease for lease in self._leases.values() if lease.state.is_open]
        for lease in before:
            self._expire_if_due(lease)
        return [lease.lease_id for lease in before if lease.state is LeaseState.EXPIRED]

    def overdue(self) -> list[bytes]:
        """Committed leases past their request's deadline: the decode service ends those requests."""
        now = self._clock()
        committed = (lease for lease in self._leases.values() if lease.state is LeaseState.COMMITTED)
        return [lease.lease_id for lease in committed if now >= lease.deadline]

    def fence(self, new_epoch: int, cause: str = "FENCED") -> None:
        """Out of touch for too long: ends every lease and goes on as a new incarnation."""
        self.end_all(cause)
        self.epoch = new_epoch

    def end_all(self, cause: str) -> None:
        """Ends every lease, in whatever state it is."""
        for lease in list(self._leases.values()):
            self._end_by_owner(lease, cause)

    def drain_reclaimable(self) -> list[bytes]:
        """Leases whose memory may be freed now; each comes once."""
        drained, self._reclaimable = self._reclaimable, []
        for lease_id in drained:
            self._over[lease_id] = None
        while len(self._over) > self._remembered:
            self._forget(self._over.popitem(last=False)[0])
        return drained

    def take_landed(self, lease_id: bytes) -> tuple[Piece, ...]:
        """What had landed of a lease that is over, of the frames from number 0 on without a gap; once. No manifest
        vouches for them, so nothing at all where anything else was written to the same places, or of a lease that
        is forgotten already."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return ()
        numbers = list(takewhile(lease.landed.__contains__, count()))
        pieces = tuple(lease.landed.pop(number)[1] for number in numbers)
        others = [*(piece for _, piece in lease.spoiled), *(piece for _, piece in lease.landed.values())]
        lease.landed.clear()
        lease.spoiled.clear()
        is_sound = not any(piece.overlaps(other) for other in others for piece in pieces)
        return pieces if is_sound else ()

    def get(self, lease_id: bytes) -> Lease | None:
        """The lease as it stands, without looking at the clock."""
        return self._leases.get(lease_id)

    @property
    def num_held(self) -> int:
        """Leases that hold memory: not over, or over with memory that has not been drained yet."""
        return len(self._leases) - len(self._over)

    # ---- transitions

    def _admit(self, ref: LeaseRef) -> Lease | Refused:
        """The lease that a sender's message names, bound to its epoch, or why the message is refused."""
        lease = self._leases.get(ref.lease_id)
        if ref.receiver_epoch != self.epoch:
            self.counters.stale += 1
            return Refused(Refusal.STALE_EPOCH, "the receiver has started anew since it granted this lease")
        if lease is None:
            return self._unknown(ref.lease_id)
        if lease.attempt != ref.attempt:
            self.counters.stale += 1
            text = f"the lease is of attempt {lease.attempt}, the message of {ref.attempt}"
            return Refused(Refusal.STALE_ATTEMPT, text, lease.state)
        if lease.peer_epoch not in (None, ref.sender_epoch):
            self.counters.stale += 1
            return Refused(
                Refusal.STALE_EPOCH, "the lease is bound to another incarnation of the sender", lease.state
            )
        self._expire_if_due(lease)
        if lease.state.is_open:
            lease.peer_epoch = ref.sender_epoch
        return lease

    def _find_current(self, request: RequestId) -> Lease | None:
        lease = self._leases.get(self._current.get(request, b""))
        if lease is not None:
            self._expire_if_due(lease)
        return lease

    def _grant_again(self, lease: Lease, attempt: int) -> Grant | Refused:
        if attempt < lease.attempt:
            self.counters.stale += 1
            text = f"attempt {attempt} is older than attempt {lease.attempt}, which is known here"
            return Refused(Refusal.STALE_ATTEMPT, text, lease.state)
        if lease.state.is_over:
            self.counters.closed += 1
            return _closed(lease)
        self.counters.repeated += 1
        return Grant(lease.lease_id, attempt, lease.ttl_s, repeated=True)

    def _end_by_owner(self, lease: Lease, cause: str) -> None:
        if lease.state.is_open:
            self._end(lease, LeaseState.ABORTED, cause)
        elif lease.state is LeaseState.COMMITTED:
            self._end(lease, LeaseState.RELEASED, cause)

    def _expire_if_due(self, lease: Lease) -> None:
        now = self._clock()
        if lease.state.is_open and now >= lease.expires_at:
            self._end(lease, LeaseState.EXPIRED, "DEADLINE" if now >= lease.deadline else "TTL")

    def _end(self, lease: Lease, state: LeaseState, cause: str) -> None:
        lease.state = state
        lease.cause = cause
        match state:
            case LeaseState.RELEASED:
                self.counters.released += 1
            case LeaseState.EXPIRED:
                self.counters.expired += 1
            case _:
                self.counters.aborted += 1
        self.version += 1
        self._note_reclaimable(lease)

    def _note_reclaimable(self, lease: Lease) -> None:
        if lease.state.is_over and not lease.landing:
            self._reclaimable.append(lease.lease_id)

    def _leave_tombstone(self, request: RequestId, attempt: int) -> None:
        self._tombstones[request] = max(attempt, self._tombstones.pop(request, attempt))
        if len(self._tombstones) > self._remembered:
            self._tombstones.popitem(last=False)

    def _forget(self, lease_id: bytes) -> None:
        lease = self._leases.pop(lease_id)
        if self._current.get(lease.request) == lease_id:
            del self._current[lease.request]

    def _unknown(self, lease_id: bytes) -> Refused:
        self.counters.unknown += 1
        return Refused(Refusal.UNKNOWN_LEASE, f"no lease {lease_id.hex()} is known here")


def _closed(lease: Lease) -> Refused:
    text = f"the lease is {lease.state}" + (f" ({lease.cause})" if lease.cause else "")
    return Refused(Refusal.LEASE_CLOSED, text, lease.state)


def _is_written_over(lease: Lease) -> bool:
    """Whether a frame that did not land was written to where another one did."""
    pieces = [piece for _, piece in lease.landed.values()] if lease.spoiled else []
    return any(piece.overlaps(spoiled) for _, spoiled in lease.spoiled for piece in pieces)


def _commit_outcome(lease: Lease) -> Outcome:
    """A lease that was released had been committed: a repeated commit is told so."""
    if lease.state is LeaseState.RELEASED:
        return Outcome(LeaseState.COMMITTED)
    return Outcome(lease.state, lease.cause)
