"""A lease and its blocks end together, once, and never under somebody who reads them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace.v1 import kvtransfer_pb2
from kvtransfer.frames import LeaseRef
from kvtransfer.lease_types import Refusal, Refused, RequestId
from kvtransfer.leases import LeaseTable
from kvtransfer.transports.seam import HandoffRefused
from worker.leasing import NO_CAPACITY, LeaseKeeper, NotReserved

pytestmark = pytest.mark.unit

TTL_S = 5.0
CAPACITY = 4


class FakeEngine:
    """Counts leases as the engine does: reserve gives a place, release gives it back once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.open: set[bytes] = set()
        self.released: list[bytes] = []
        self.stopped: list[bytes] = []

    def reserve(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        num_choices: int,
        root_key: bytes,
        *,
        bound: int,
        tenant: str,
        is_computed_here: bool,
    ) -> int | None:
        if len(self.open) == CAPACITY:
            return None
        self.open.add(lease_id)
        return 0

    def stop(self, lease_id: bytes) -> None:
        self.stopped.append(lease_id)

    def release(self, lease_id: bytes) -> None:
        if lease_id in self.open:
            self.open.remove(lease_id)
            self.released.append(lease_id)

    def sealed_keys(self, lease_id: bytes) -> list[tuple[bytes, ...]]:
        """Those of a lease that still has its blocks."""
        return [(b"key of " + lease_id,)] if lease_id in self.open else []


class Bench:
    """A keeper on a fake engine and a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = FakeEngine()
        numbers = itertools.count(1)
        table = LeaseTable(1, lambda: self.now, lambda size: next(numbers).to_bytes(size, "big"))
        self.keeper = LeaseKeeper(table, self.engine, TTL_S)  # type: ignore[arg-type]
        self.lost: dict[bytes, str] = {}
        self.keeper.on_lost = self.lost.__setitem__
        self.cached: list[tuple[str, Sequence[bytes]]] = []
        self.keeper.on_cached = lambda tenant, keys: self.cached.append((tenant, keys))

    def open(
        self, request: str, attempt: int = 1, remaining_s: float = 60.0, local: bool = False
    ) -> bytes | None:
        """A lease with blocks, or None."""
        name = RequestId("tenant", request)
        lease_id = self.keeper.grant(name, attempt, remaining_s, local=local)
        if isinstance(lease_id, NotReserved):
            return None
        if self.keeper.reserve(lease_id, [1, 2, 3], 1, b"root") is None:
            self.keeper.release(lease_id, NO_CAPACITY)
            return None
        return lease_id


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_lease_without_room_holds_nothing(bench: Bench) -> None:
    opened = [bench.open(str(number)) for number in range(CAPACITY + 1)]
    assert opened[-1] is None
    assert bench.keeper.num_live == CAPACITY


def test_an_older_attempt_is_refused_without_a_word_on_the_newer_one(bench: Bench) -> None:
    newer = bench.open("a", attempt=2)
    older = bench.keeper.grant(RequestId("tenant", "a"), 1, 60.0, local=False)
    assert isinstance(older, NotReserved)
    assert older.cause == "STALE_ATTEMPT"
    assert bench.engine.open == {newer}


def test_a_newer_attempt_gives_the_older_ones_blocks_back(bench: Bench) -> None:
    older, newer = bench.open("a", attempt=1), bench.open("a", attempt=2)
    assert older is not None
    assert bench.engine.open == {newer}
    assert bench.lost == {older: "SUPERSEDED"}


def test_a_lease_that_nobody_renews_is_swept(bench: Bench) -> None:
    lease = bench.open("a")
    assert lease is not None
    bench.now = TTL_S - 0.1
    bench.keeper.sweep()
    assert not bench.lost
    bench.now = TTL_S
    bench.keeper.sweep()
    assert bench.lost == {lease: "TTL"}
    assert not bench.engine.open


def test_a_running_lease_ends_at_its_deadline_only(bench: Bench) -> None:
    lease = bench.open("a", remaining_s=20.0, local=True)
    assert lease is not None
    bench.now = 19.9
    bench.keeper.sweep()
    assert not bench.lost
    bench.now = 20.0
    bench.keeper.sweep()
    assert bench.lost == {lease: "DEADLINE_EXCEEDED"}


def test_blocks_that_are_read_are_given_back_when_they_are_let_go(bench: Bench) -> None:
    lease = bench.open("a", local=True)
    assert lease is not None
    bench.keeper.hold(lease)
    bench.keeper.release(lease, "CANCELLED")
    assert lease in bench.engine.stopped
    assert (bench.engine.open, bench.keeper.num_live) == ({lease}, 1)
    bench.keeper.unhold(lease)
    assert (bench.engine.open, bench.keeper.num_live) == (set(), 0)


def test_letting_go_of_a_running_lease_ends_nothing(bench: Bench) -> None:
    lease = bench.open("a", local=True)
    assert lease is not None
    bench.keeper.hold(lease)
    bench.keeper.unhold(lease)
    assert bench.engine.open == {lease}
    bench.keeper.release(lease)
    assert not bench.engine.open


def test_a_worker_that_does_not_decode_refuses_a_commit(bench: Bench) -> None:
    with pytest.raises(HandoffRefused, match="does not decode"):
        bench.keeper.commit(b"lease", kvtransfer_pb2.Handoff(), 0)


def test_a_lease_that_has_ended_gets_no_blocks(bench: Bench) -> None:
    name = RequestId("tenant", "a")
    lease = bench.keeper.grant(name, 1, 60.0, local=True)
    assert isinstance(lease, bytes)
    bench.keeper.cancel(name, 1, "CANCELLED")
    assert bench.keeper.reserve(lease, [1, 2, 3], 1, b"root") is None
    assert not bench.engine.open


@pytest.mark.parametrize("hold", [False, True])
def test_what_stays_cached_is_told_once_when_the_blocks_are_given_back(bench: Bench, hold: bool) -> None:
    lease = bench.open("a", local=True)
    assert lease is not None
    if hold:
        bench.keeper.hold(lease)
    bench.keeper.release(lease)
    assert len(bench.cached) == (0 if hold else 1)
    bench.keeper.unhold(lease)
    bench.keeper.release(lease)
    assert bench.cached == [("tenant", (b"key of " + lease,))]


def test_a_fetch_takes_frames_from_its_source_alone(bench: Bench) -> None:
    lease = bench.keeper.grant(RequestId("tenant", "fetch"), 1, 60.0, local=False, peer_epoch=77)
    assert isinstance(lease, bytes)
    with bench.keeper.desk.change() as table:
        refused = table.renew(LeaseRef(lease, 1, 78, 1))
        taken = table.renew(LeaseRef(lease, 1, 77, 1))
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.STALE_EPOCH
    assert not isinstance(taken, Refused)


class AnyInterleaving(RuleBasedStateMachine):
    """Grants, ends, holds and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.leases: list[bytes] = []
        self.held: set[bytes] = set()

    @rule(request=st.sampled_from("abc"), attempt=st.integers(1, 4), local=st.booleans(), hold=st.booleans())
    def open(self, request: str, attempt: int, local: bool, hold: bool) -> None:
        opened = self.bench.open(request, attempt, remaining_s=20.0, local=local)
        if opened is not None and opened not in self.leases:
            self.leases.append(opened)
            if hold:
                self.bench.keeper.hold(opened)
                self.held.add(opened)

    @rule(request=st.sampled_from("abc"), attempt=st.integers(1, 4))
    def cancel(self, request: str, attempt: int) -> None:
        self.bench.keeper.cancel(RequestId("tenant", request), attempt, "CANCELLED")

    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        if index < len(self.leases):
            self.bench.keeper.release(self.leases[index])

    @rule(index=st.integers(0, 20))
    def unhold(self, index: int) -> None:
        if index < len(self.leases):
            self.bench.keeper.unhold(self.leases[index])
            self.held.discard(self.leases[index])

    @rule(seconds=st.sampled_from([0.1, 3.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.bench.now += seconds
        self.bench.keeper.sweep()

    @invariant()
    def held_blocks_stay_and_the_others_go_once(self) -> None:
        engine = self.bench.engine
        assert self.held <= engine.open
        assert len(engine.released) == len(set(engine.released))
        assert self.bench.keeper.num_live == len(engine.open)

    def teardown(self) -> None:
        for lease_id in self.leases:
            self.bench.keeper.release(lease_id)
            self.bench.keeper.unhold(lease_id)
        assert (self.bench.engine.open, self.bench.keeper.num_live) == (set(), 0)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
