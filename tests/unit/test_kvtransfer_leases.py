"""The lease table, message by message; the interleavings are in test_kvtransfer_leases_model.py."""

from collections.abc import Callable
from itertools import count

import pytest

from kvtransfer.frames import FrameRecord, LeaseRef
from kvtransfer.layouts import Piece
from kvtransfer.lease_types import (
    AlreadyLanded,
    Grant,
    Landing,
    LeaseState,
    Outcome,
    Ready,
    Refusal,
    Refused,
    RequestId,
    Waiting,
)
from kvtransfer.leases import LeaseTable

pytestmark = pytest.mark.unit

REQUEST = RequestId("tenant", "request")
RECORD = FrameRecord(100, 0xABCD)
OTHER_RECORD = FrameRecord(100, 0xDCBA)
PIECE = Piece("k", range(1), range(1), range(1))
OTHER_PIECE = Piece("k", range(1), range(1), range(1, 2))
SENDER, RECEIVER = 11, 22


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A table with one granted lease, and short words for what is done to it."""

    def __init__(self, *, local: bool = False, remembered: int = 4096) -> None:
        self.clock = Clock()
        ids = count(1)
        self.table = LeaseTable(RECEIVER, self.clock, lambda n: next(ids).to_bytes(n, "big"), remembered)
        self.grant = self.reserve(local=local)
        self.ref = LeaseRef(self.grant.lease_id, 1, SENDER, RECEIVER)

    def reserve(self, request: RequestId = REQUEST, attempt: int = 1, *, local: bool = False) -> Grant:
        grant = self.table.grant(request, attempt, ttl_s=5, remaining_s=60, local=local)
        assert isinstance(grant, Grant)
        return grant

    def land(self, number: int = 0) -> None:
        landing = self.table.begin_landing(self.ref, number, RECORD)
        assert isinstance(landing, Landing)
        self.table.end_landing(landing, RECORD, PIECE, landed=True)

    def commit(self) -> None:
        assert isinstance(self.table.check_commit(self.ref, {0: RECORD}), Ready)
        assert self.table.commit(self.ref.lease_id) == Outcome(LeaseState.COMMITTED)

    @property
    def state(self) -> LeaseState:
        lease = self.table.get(self.grant.lease_id)
        assert lease is not None
        return lease.state


def _granted(desk: Desk) -> None:
    del desk


def _filling(desk: Desk) -> None:
    desk.land()


def _committed(desk: Desk) -> None:
    desk.land()
    desk.commit()


def _released(desk: Desk) -> None:
    _committed(desk)
    desk.table.release(desk.grant.lease_id, "FINISHED")


def _aborted(desk: Desk) -> None:
    desk.table.abort(desk.ref, "BECAUSE")


def _expired(desk: Desk) -> None:
    desk.clock.now += 5
    assert desk.table.expire() == [desk.grant.lease_id]


REACH: dict[LeaseState, Callable[[Desk], None]] = {
    LeaseState.GRANTED: _granted,
    LeaseState.FILLING: _filling,
    LeaseState.COMMITTED: _committed,
    LeaseState.RELEASED: _released,
    LeaseState.ABORTED: _aborted,
    LeaseState.EXPIRED: _expired,
}


def _expire_late(desk: Desk) -> object:
    desk.clock.now += 100
    return desk.table.expire()


MESSAGES: dict[str, Callable[[Desk], object]] = {
    "frame": lambda d: d.table.begin_landing(d.ref, 9, RECORD),
    "commit": lambda d: d.table.check_commit(d.ref, {0: RECORD}),
    "renew": lambda d: d.table.renew(d.ref),
    "abort": lambda d: d.table.abort(d.ref, "BY_SENDER"),
    "cancel": lambda d: d.table.cancel(REQUEST, 1, "BY_ROUTER"),
    "release": lambda d: d.table.release(d.grant.lease_id, "BY_OWNER"),
    "expiry": _expire_late,
    "fence": lambda d: d.table.fence(99),
    "grant": lambda d: d.table.grant(REQUEST, 1, ttl_s=5, remaining_s=60),
    "grant, newer": lambda d: d.table.grant(REQUEST, 2, ttl_s=5, remaining_s=60),
    "grant, older": lambda d: d.table.grant(REQUEST, 0, ttl_s=5, remaining_s=60),
}

G, F, C, R, A, E = LeaseState
EFFECTS: dict[str, dict[LeaseState, LeaseState]] = {
    "frame": {G: F},
    "commit": {},  # check_commit decides, commit moves: see below
    "renew": {},
    "abort": {G: A, F: A},
    "cancel": {G: A, F: A, C: R},
    "release": {G: A, F: A, C: R},
    "expiry": {G: E, F: E},
    "fence": {G: A, F: A, C: R},
    "grant": {},
    "grant, newer": {G: A, F: A, C: R},
    "grant, older": {},
}


@pytest.mark.parametrize("state", LeaseState)
@pytest.mark.parametrize("message", MESSAGES)
def test_table_of_states_and_messages(message: str, state: LeaseState) -> None:
    desk = Desk()
    REACH[state](desk)
    assert desk.state is state
    MESSAGES[message](desk)
    assert desk.state is EFFECTS[message].get(state, state)


@pytest.mark.parametrize("message", ["frame", "commit", "renew", "abort", "release"])
def test_messages_for_a_lease_never_granted_are_refused(message: str) -> None:
    desk = Desk()
    desk.ref = LeaseRef(bytes(16), 1, SENDER, RECEIVER)
    desk.grant = Grant(bytes(16), 1, 5, repeated=False)
    answer = MESSAGES[message](desk)
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.UNKNOWN_LEASE
    assert desk.table.counters.unknown == 1


@pytest.mark.parametrize(
    ("state", "answer"),
    [(C, Outcome(C)), (R, Outcome(C)), (A, Outcome(A, "BECAUSE")), (E, Outcome(E, "TTL"))],
)
def test_a_late_commit_gets_the_outcome_that_came_first(state: LeaseState, answer: Outcome) -> None:
    desk = Desk()
    REACH[state](desk)
    assert desk.table.check_commit(desk.ref, {0: RECORD}) == answer
    assert desk.table.commit(desk.ref.lease_id) == answer
    assert desk.state is state


def test_a_late_abort_is_told_of_the_commit() -> None:
    desk = Desk()
    _committed(desk)
    assert desk.table.abort(desk.ref, "TOO_LATE") == Outcome(LeaseState.COMMITTED)


@pytest.mark.parametrize("message", ["frame", "commit", "renew", "abort"])
@pytest.mark.parametrize(
    ("attempt", "sender", "receiver", "refusal"),
    [
        (0, SENDER, RECEIVER, Refusal.STALE_ATTEMPT),
        (2, SENDER, RECEIVER, Refusal.STALE_ATTEMPT),
        (1, SENDER + 1, RECEIVER, Refusal.STALE_EPOCH),
        (1, SENDER, RECEIVER + 1, Refusal.STALE_EPOCH),
    ],
)
def test_another_attempt_or_epoch_is_refused_and_counted(
    message: str, attempt: int, sender: int, receiver: int, refusal: Refusal
) -> None:
    desk = Desk()
    desk.land()  # binds the lease to the sender's epoch
    desk.ref = LeaseRef(desk.grant.lease_id, attempt, sender, receiver)
    answer = MESSAGES[message](desk)
    assert isinstance(answer, Refused)
    assert answer.refusal is refusal
    assert desk.table.counters.stale == 1
    assert desk.state is LeaseState.FILLING


def test_a_grant_may_name_the_sender_beforehand() -> None:
    desk = Desk()
    grant = desk.table.grant(RequestId("t", "other"), 1, ttl_s=5, remaining_s=60, peer_epoch=77)
    assert isinstance(grant, Grant)
    answer = desk.table.renew(LeaseRef(grant.lease_id, 1, SENDER, RECEIVER))
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.STALE_EPOCH


def test_a_repeated_reserve_gets_the_same_lease() -> None:
    desk = Desk()
    again = desk.reserve()
    assert (again.lease_id, again.repeated) == (desk.grant.lease_id, True)


def test_a_reserve_of_an_attempt_that_is_over_is_refused() -> None:
    desk = Desk()
    _aborted(desk)
    answer = desk.table.grant(REQUEST, 1, ttl_s=5, remaining_s=60)
    assert isinstance(answer, Refused)
    assert (answer.refusal, answer.state) == (Refusal.LEASE_CLOSED, LeaseState.ABORTED)


def test_a_cancel_before_its_reserve_refuses_it_but_not_a_newer_attempt() -> None:
    desk = Desk()
    request = RequestId("tenant", "later")
    assert desk.table.cancel(request, 3, "CLIENT") == Outcome(LeaseState.ABORTED, "CLIENT")
    for attempt in (2, 3):
        answer = desk.table.grant(request, attempt, ttl_s=5, remaining_s=60)
        assert isinstance(answer, Refused)
        assert answer.refusal is Refusal.CANCELLED
    assert isinstance(desk.table.grant(request, 4, ttl_s=5, remaining_s=60), Grant)


def test_a_cancel_of_a_newer_attempt_ends_the_older_one_and_is_remembered() -> None:
    desk = Desk()
    desk.table.cancel(REQUEST, 2, "CLIENT")
    assert desk.state is LeaseState.ABORTED
    assert isinstance(desk.table.grant(REQUEST, 2, ttl_s=5, remaining_s=60), Refused)


def test_a_cancel_of_an_older_attempt_is_stale() -> None:
    desk = Desk()
    grant = desk.reserve(attempt=2)
    desk.table.cancel(REQUEST, 1, "ZOMBIE")
    lease = desk.table.get(grant.lease_id)
    assert lease is not None
    assert lease.state is LeaseState.GRANTED
    assert desk.table.counters.stale == 1


def test_commit_says_what_is_missing_until_nothing_is_being_written() -> None:
    desk = Desk()
    manifest = {0: RECORD, 1: RECORD}
    desk.land(0)
    landing = desk.table.begin_landing(desk.ref, 1, RECORD)
    assert isinstance(landing, Landing)
    assert desk.table.check_commit(desk.ref, manifest) == Waiting(LeaseState.FILLING, (1,), 1005.0)
    desk.table.end_landing(landing, RECORD, PIECE, landed=True)
    assert desk.table.check_commit(desk.ref, manifest) == Ready(desk.grant.lease_id, 0, (PIECE, PIECE))


def test_commit_waits_while_a_frame_that_the_manifest_lacks_is_being_written() -> None:
    desk = Desk()
    desk.land(0)
    landing = desk.table.begin_landing(desk.ref, 1, RECORD)
    assert isinstance(landing, Landing)
    assert desk.table.check_commit(desk.ref, {0: RECORD}) == Waiting(LeaseState.FILLING, (), 1005.0)
    desk.table.end_landing(landing, RECORD, OTHER_PIECE, landed=False)
    desk.commit()


def test_nothing_is_committed_or_kept_that_something_else_was_written_over() -> None:
    desk = Desk()
    desk.land(0)
    landing = desk.table.begin_landing(desk.ref, 7, RECORD)
    assert isinstance(landing, Landing)
    desk.table.end_landing(landing, RECORD, PIECE, landed=False)
    refused = desk.table.check_commit(desk.ref, {0: RECORD})
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.MANIFEST_MISMATCH
    desk.table.release(desk.grant.lease_id)
    assert desk.table.take_landed(desk.grant.lease_id) == ()


def test_what_was_written_before_a_frame_that_landed_over_it_does_not_matter() -> None:
    desk = Desk()
    landing = desk.table.begin_landing(desk.ref, 7, RECORD)
    assert isinstance(landing, Landing)
    desk.table.end_landing(landing, RECORD, PIECE, landed=False)
    desk.land(0)
    desk.commit()


def test_what_may_have_been_written_while_a_frame_landed_does() -> None:
    desk = Desk()
    stray = desk.table.begin_landing(desk.ref, 7, RECORD)
    assert isinstance(stray, Landing)
    good = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(good, Landing)
    desk.table.end_landing(stray, RECORD, PIECE, landed=False)
    desk.table.end_landing(good, RECORD, PIECE, landed=True)
    refused = desk.table.check_commit(desk.ref, {0: RECORD})
    assert isinstance(refused, Refused) and refused.refusal is Refusal.MANIFEST_MISMATCH


def test_what_landed_without_a_gap_is_taken_once_of_a_lease_that_is_over() -> None:
    desk = Desk()
    for number, piece in ((0, PIECE), (2, OTHER_PIECE)):
        landing = desk.table.begin_landing(desk.ref, number, RECORD)
        assert isinstance(landing, Landing)
        desk.table.end_landing(landing, RECORD, piece, landed=True)
    desk.table.release(desk.grant.lease_id)
    assert desk.table.take_landed(desk.grant.lease_id) == (PIECE,)
    assert desk.table.take_landed(desk.grant.lease_id) == ()


def test_a_failed_landing_is_missing_and_may_be_sent_again() -> None:
    desk = Desk()
    landing = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(landing, Landing)
    busy = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(busy, Refused)
    assert busy.refusal is Refusal.FRAME_LANDING
    desk.table.end_landing(landing, RECORD, PIECE, landed=False)
    answer = desk.table.check_commit(desk.ref, {0: RECORD})
    assert isinstance(answer, Waiting)
    assert answer.missing == (0,)
    desk.land(0)
    desk.commit()


def test_a_repeated_frame_lands_once_also_after_the_commit() -> None:
    desk = Desk()
    desk.land(0)
    assert desk.table.begin_landing(desk.ref, 0, RECORD) == AlreadyLanded()
    desk.commit()
    assert desk.table.begin_landing(desk.ref, 0, RECORD) == AlreadyLanded()
    assert desk.table.counters.repeated == 2


def test_the_same_number_with_other_bytes_is_refused() -> None:
    desk = Desk()
    desk.land(0)
    answer = desk.table.begin_landing(desk.ref, 0, OTHER_RECORD)
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.FRAME_CONFLICT


@pytest.mark.parametrize("manifest", [{}, {0: OTHER_RECORD}, {1: RECORD}])
def test_a_manifest_that_is_not_what_landed_is_refused(manifest: dict[int, FrameRecord]) -> None:
    desk = Desk()
    desk.land(0)
    answer = desk.table.check_commit(desk.ref, manifest)
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.MANIFEST_MISMATCH


def test_frames_and_renewals_restart_the_ttl_but_the_deadline_stands() -> None:
    desk = Desk()
    for number in range(11):
        desk.clock.now += 4.9
        if number % 2:
            desk.land(number)
        else:
            assert desk.table.renew(desk.ref) == Outcome(desk.state)
    assert desk.table.expire() == []
    desk.clock.now += 4.9
    assert desk.table.renew(desk.ref) == Outcome(LeaseState.FILLING)
    desk.clock.now = 1060.0
    assert desk.table.renew(desk.ref) == Outcome(LeaseState.EXPIRED, "DEADLINE")


@pytest.mark.parametrize("message", ["frame", "commit", "renew", "abort", "cancel", "grant"])
def test_expiry_is_checked_at_use(message: str) -> None:
    desk = Desk()
    desk.clock.now += 5
    MESSAGES[message](desk)
    assert desk.state is LeaseState.EXPIRED


def test_a_committed_lease_does_not_expire_but_is_overdue_at_its_deadline() -> None:
    desk = Desk()
    _committed(desk)
    desk.clock.now += 59.9
    assert (desk.table.expire(), desk.table.overdue()) == ([], [])
    desk.clock.now += 0.1
    assert (desk.table.expire(), desk.table.overdue()) == ([], [desk.grant.lease_id])
    assert desk.state is LeaseState.COMMITTED


def test_memory_is_given_back_once_and_not_while_a_frame_is_being_written() -> None:
    desk = Desk()
    landing = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(landing, Landing)
    desk.table.cancel(REQUEST, 1, "CLIENT")
    assert desk.table.drain_reclaimable() == []
    assert desk.table.num_held == 1
    assert desk.table.end_landing(landing, RECORD, PIECE, landed=True) is LeaseState.ABORTED
    lease = desk.table.get(desk.grant.lease_id)
    assert lease is not None
    assert lease.landed == {}
    assert desk.table.drain_reclaimable() == [desk.grant.lease_id]
    desk.table.cancel(REQUEST, 1, "AGAIN")
    assert desk.table.drain_reclaimable() == []
    assert desk.table.num_held == 0


def test_a_local_lease_is_born_committed_and_takes_no_frames() -> None:
    desk = Desk(local=True)
    assert desk.state is LeaseState.COMMITTED
    answer = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.LEASE_CLOSED
    desk.clock.now += 30
    assert desk.table.expire() == []
    desk.table.release(desk.grant.lease_id)
    assert desk.table.drain_reclaimable() == [desk.grant.lease_id]


def test_a_fence_ends_everything_and_older_messages_are_stale_from_then_on() -> None:
    desk = Desk()
    running = desk.reserve(RequestId("tenant", "running"), local=True)
    desk.table.fence(new_epoch=33)
    assert set(desk.table.drain_reclaimable()) == {desk.grant.lease_id, running.lease_id}
    answer = desk.table.renew(desk.ref)
    assert isinstance(answer, Refused)
    assert answer.refusal is Refusal.STALE_EPOCH


def test_what_is_over_is_remembered_within_a_bound() -> None:
    desk = Desk(remembered=10)
    for number in range(100):
        grant = desk.reserve(RequestId("tenant", str(number)))
        desk.table.release(grant.lease_id)
        desk.table.drain_reclaimable()
        desk.table.cancel(RequestId("tenant", f"early {number}"), 1, "CLIENT")
    early = [
        desk.table.grant(RequestId("tenant", f"early {n}"), 1, ttl_s=1, remaining_s=1) for n in range(100)
    ]
    assert sum(isinstance(answer, Refused) for answer in early) == 10
    known = [desk.table.get((n + 2).to_bytes(16, "big")) for n in range(100)]
    assert sum(lease is not None for lease in known) == 10
    assert desk.state is LeaseState.GRANTED


@pytest.mark.parametrize("times", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_lease_without_an_end_is_not_granted(times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Desk().table.grant(RequestId("t", "r"), 1, ttl_s=times[0], remaining_s=times[1])


def test_every_change_raises_the_version() -> None:
    desk = Desk()
    seen = [desk.table.version]
    for change in (desk.land, desk.commit, lambda: desk.table.release(desk.grant.lease_id)):
        change()
        seen.append(desk.table.version)
    assert seen == sorted(set(seen))


def test_a_lease_keeps_its_fidelity_bound_and_the_worst_that_landed() -> None:
    desk = Desk()
    grant = desk.table.grant(REQUEST, 2, ttl_s=5, remaining_s=60, fidelity=2)
    assert isinstance(grant, Grant)
    ref = LeaseRef(grant.lease_id, 2, SENDER, RECEIVER)
    for number, (fidelity, landed) in enumerate([(0, True), (1, True), (2, False)]):
        landing = desk.table.begin_landing(ref, number, RECORD)
        assert isinstance(landing, Landing)
        assert landing.fidelity == 2
        piece = Piece("k", range(1), range(1), range(number, number + 1))
        desk.table.end_landing(landing, RECORD, piece, landed=landed, fidelity=fidelity)
    ready = desk.table.check_commit(ref, {0: RECORD, 1: RECORD})
    assert isinstance(ready, Ready)
    assert ready.fidelity == 1  # the frame that was not written does not count


def test_a_lease_allows_nothing_but_exact_unless_it_says_so() -> None:
    desk = Desk()
    landing = desk.table.begin_landing(desk.ref, 0, RECORD)
    assert isinstance(landing, Landing)
    assert landing.fidelity == 0
