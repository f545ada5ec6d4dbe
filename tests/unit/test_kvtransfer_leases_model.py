"""The lease table under every interleaving that hypothesis finds.

A decode worker's table stands between a router, any number of senders and its own decode service.
Messages travel through a network that drops, duplicates, delays and reorders them, so that a frozen
sender's frames arrive after its attempt was replaced; landings end long after they began; the worker
fences itself and goes on as a new incarnation. A small model beside the table checks what must hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.frames import FrameRecord, LeaseRef
from kvtransfer.layouts import Piece
from kvtransfer.lease_types import Grant, Landing, LeaseState, Outcome, Ready, RequestId
from kvtransfer.leases import LeaseTable

pytestmark = pytest.mark.unit

TTL_S, REMAINING_S = 4.0, 20.0
MANIFEST = {number: FrameRecord(10, number) for number in range(2)}
G, F, C, R, A, E = LeaseState
STEPS = {G: {G, F, C, A, E}, F: {F, C, A, E}, C: {C, R}, R: {R}, A: {A}, E: {E}}

requests = st.sampled_from([RequestId("t", "a"), RequestId("t", "b"), RequestId("u", "a")])
offsets = st.sampled_from([1, 1, 1, 0, -1, 2])  # from the newest attempt
picks = st.integers(0, 5)  # from the newest


@dataclass
class Watched:
    """What the model knows of one granted lease."""

    request: RequestId
    ref: LeaseRef
    state: LeaseState
    deadline: float
    num_landings_open: int = 0
    num_commits: int = 0
    num_reclaims: int = 0
    landed: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Message:
    """In the network. `kind`: frame, commit, renew, abort or stale (a frame with one wrong fact)."""

    kind: str
    ref: LeaseRef
    number: int = 0


def _piece(number: int) -> Piece:
    """Each frame has a place of its own."""
    return Piece("k", range(1), range(1), range(number, number + 1))


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.num_ids = 0
        self.table = LeaseTable(1, lambda: self.now, self.new_id, remembered=10_000)
        self.leases: dict[bytes, Watched] = {}
        self.network: list[Message] = []
        self.landings: list[tuple[Landing, Message]] = []
        self.cancelled: dict[RequestId, int] = {}

    # ---- the router

    @rule(request=requests, offset=offsets, local=st.integers(0, 3), pushes=st.booleans())
    def reserve(self, request: RequestId, offset: int, local: int, pushes: bool) -> None:
        newest = self.newest_attempt(request)
        attempt = max(1, newest + offset)
        is_local = local == 3
        answer = self.table.grant(request, attempt, ttl_s=TTL_S, remaining_s=REMAINING_S, local=is_local)
        if not isinstance(answer, Grant):
            return
        assert attempt > self.cancelled.get(request, 0), "granted what was cancelled"
        if answer.repeated:
            assert self.leases[answer.lease_id].ref.attempt == attempt
            return
        assert attempt > newest, "granted an attempt that is not the newest"
        ref = LeaseRef(answer.lease_id, attempt, 1000 + self.num_ids, self.table.epoch)
        self.leases[answer.lease_id] = Watched(request, ref, C if is_local else G, self.now + REMAINING_S)
        if pushes:
            self.network += [*(Message("frame", ref, number) for number in MANIFEST), Message("commit", ref)]

    @rule(request=requests, offset=offsets, really=st.integers(0, 2))
    def cancel(self, request: RequestId, offset: int, really: int) -> None:
        if really:
            return  # or it would be most of what happens
        newest = self.newest_attempt(request)
        attempt = max(1, newest + offset)
        self.table.cancel(request, attempt, "CLIENT")
        if attempt < newest:
            return
        if attempt > newest:
            self.cancelled[request] = max(attempt, self.cancelled.get(request, 0))
        for watched in self.leases.values():
            if watched.request == request:
                assert self.look(watched.ref.lease_id).is_over, "a cancel left its lease alive"

    # ---- senders; a frozen one's messages wait in the network

    @precondition(lambda self: self.leases)
    @rule(
        pick=picks,
        kind=st.sampled_from(["frame", "frame", "commit", "renew", "abort", "stale"]),
        number=st.sampled_from(list(MANIFEST)),
        copies=st.integers(1, 2),
    )
    def send(self, pick: int, kind: str, number: int, copies: int) -> None:
        """Leases that are not over come first: interleavings with the dead alone find little."""
        watched = sorted(self.leases.values(), key=lambda w: not w.state.is_over)
        ref = watched[-1 - pick % len(watched)].ref
        self.network += [Message(kind, ref, number)] * copies

    # ---- the network

    @precondition(lambda self: self.network)
    @rule(pick=picks, fate=st.sampled_from(["arrives", "arrives", "arrives and again later", "is lost"]))
    def deliver(self, pick: int, fate: str) -> None:
        message = self.network.pop(-1 - pick % len(self.network))
        if fate == "is lost":
            return
        if fate == "arrives and again later":
            self.network.append(message)
        getattr(self, f"on_{message.kind}")(message)

    @precondition(lambda self: self.network)
    @rule(count=st.integers(1, 4), lands_at_once=st.booleans())
    def deliver_in_order(self, count: int, lands_at_once: bool) -> None:
        for message in self.network[:count]:
            getattr(self, f"on_{message.kind}")(message)
            if lands_at_once:
                self.finish_landings()
        del self.network[:count]

    def on_frame(self, message: Message) -> None:
        watched = self.leases[message.ref.lease_id]
        answer = self.table.begin_landing(message.ref, message.number, MANIFEST[message.number])
        if not isinstance(answer, Landing):
            return
        assert self.look(message.ref.lease_id) is F
        assert watched.state.is_open, "a frame was let into a lease that is committed or over"
        assert message.number not in watched.landed, "a frame lands twice"
        assert self.now < watched.deadline, "a frame was let in after the deadline"
        watched.num_landings_open += 1
        self.landings.append((answer, message))

    def on_commit(self, message: Message) -> None:
        watched = self.leases[message.ref.lease_id]
        verdict = self.table.check_commit(message.ref, MANIFEST)
        was = self.look(message.ref.lease_id)
        if isinstance(verdict, Ready):
            assert was.is_open
            assert watched.landed == set(MANIFEST)
            assert watched.num_landings_open == 0, "committed while a frame was being written"
            assert self.now < watched.deadline, "committed after its deadline"
            assert self.table.commit(message.ref.lease_id) == Outcome(C)
            watched.num_commits += 1
        elif isinstance(verdict, Outcome):
            assert not was.is_open
            assert verdict.state is (C if was is R else was)

    def on_renew(self, message: Message) -> None:
        self.table.renew(message.ref)

    def on_abort(self, message: Message) -> None:
        was = self.look(message.ref.lease_id)
        answer = self.table.abort(message.ref, "SENDER")
        if isinstance(answer, Outcome) and not was.is_open:
            assert answer.state is was, "an abort changed what had been decided"

    def on_stale(self, message: Message) -> None:
        """A message with one stale fact has no effect, and is counted."""
        ref = message.ref
        stale = [
            LeaseRef(ref.lease_id, ref.attempt - 1, ref.sender_epoch, ref.receiver_epoch),
            LeaseRef(ref.lease_id, ref.attempt, ref.sender_epoch, 0),
        ]
        lease = self.table.get(ref.lease_id)
        if lease is not None and lease.peer_epoch is not None:
            stale.append(LeaseRef(ref.lease_id, ref.attempt, 1, ref.receiver_epoch))
        counted, was = self.table.counters.stale, self.look(ref.lease_id)
        for wrong in stale:
            self.table.begin_landing(wrong, message.number, MANIFEST[message.number])
            self.table.check_commit(wrong, MANIFEST)
            self.table.abort(wrong, "ZOMBIE")
        assert self.table.counters.stale == counted + 3 * len(stale)
        assert self.look(ref.lease_id) is was

    # ---- the decode worker

    @precondition(lambda self: self.landings)
    @rule(pick=picks, landed=st.booleans())
    def finish_landing(self, pick: int, landed: bool) -> None:
        landing, message = self.landings.pop(pick % len(self.landings))
        watched = self.leases[landing.lease_id]
        assert watched.num_reclaims == 0, "memory was given back while a frame was being written into it"
        state = self.table.end_landing(
            landing, MANIFEST[message.number], _piece(message.number), landed=landed
        )
        watched.num_landings_open -= 1
        if landed and state.is_open:
            watched.landed.add(message.number)

    def finish_landings(self) -> None:
        while self.landings:
            self.finish_landing(pick=0, landed=True)

    @precondition(lambda self: any(w.state is C for w in self.leases.values()))
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        running = [lease_id for lease_id, w in self.leases.items() if w.state is C]
        lease_id = running[pick % len(running)]
        assert self.table.release(lease_id, "FINISHED") == Outcome(R, "FINISHED")

    @precondition(lambda self: self.leases)
    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 4.0, 25.0]), expire=st.booleans())
    def time_passes(self, seconds: float, expire: bool) -> None:
        self.now += seconds
        if not expire:
            return  # then it must be found out at use
        self.table.expire()
        for watched in self.leases.values():
            if self.now >= watched.deadline:
                assert not self.look(watched.ref.lease_id).is_open

    @precondition(lambda self: len(self.leases) > 3)
    @rule(really=st.integers(0, 3))
    def fence(self, really: int) -> None:
        if really:
            return
        self.table.fence(self.table.epoch + 1)
        assert all(self.look(lease_id).is_over for lease_id in self.leases)

    # ---- what always holds

    @invariant()
    def what_may_be_given_back_is_idle_and_over(self) -> None:
        for lease_id in self.table.drain_reclaimable():
            watched = self.leases[lease_id]
            assert watched.num_landings_open == 0
            assert self.look(lease_id).is_over
            watched.num_reclaims += 1

    @invariant()
    def states_only_move_forward(self) -> None:
        for lease_id, watched in self.leases.items():
            now = self.look(lease_id)
            assert now in STEPS[watched.state], f"{watched.state} became {now}"
            watched.state = now

    @invariant()
    def nothing_happens_twice(self) -> None:
        for watched in self.leases.values():
            assert watched.num_commits <= 1
            assert watched.num_reclaims <= 1

    @invariant()
    def one_attempt_of_a_request_is_alive(self) -> None:
        alive = [w.request for lease_id, w in self.leases.items() if not self.look(lease_id).is_over]
        assert len(alive) == len(set(alive))

    def teardown(self) -> None:
        """Quiescence: landings end, time passes, the decode service finishes. Nothing may be left."""
        self.finish_landings()
        self.now += REMAINING_S + TTL_S
        self.table.expire()
        for lease_id in self.table.overdue():
            self.table.release(lease_id, "DEADLINE")
        self.what_may_be_given_back_is_idle_and_over()
        assert [w.num_reclaims for w in self.leases.values()] == [1] * len(self.leases)
        assert self.table.num_held == 0
        counters = self.table.counters
        assert counters.granted == counters.released + counters.aborted + counters.expired

    # ---- helpers

    def new_id(self, num_bytes: int) -> bytes:
        self.num_ids += 1
        return self.num_ids.to_bytes(num_bytes, "big")

    def newest_attempt(self, request: RequestId) -> int:
        return max((w.ref.attempt for w in self.leases.values() if w.request == request), default=0)

    def look(self, lease_id: bytes) -> LeaseState:
        lease = self.table.get(lease_id)
        assert lease is not None
        return lease.state


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
