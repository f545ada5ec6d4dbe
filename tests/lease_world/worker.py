"""One worker process: both roles on one memory, its clock, its incarnations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

from kvtransfer.frames import LeaseRef
from kvtransfer.lease_types import (
    AlreadyLanded,
    Landing,
    Lease,
    LeaseState,
    Outcome,
    Refusal,
    Refused,
    RequestId,
    Waiting,
)
from kvtransfer.leases import LeaseTable
from tests.lease_world.content import whole
from tests.lease_world.decode import Decode
from tests.lease_world.fetch import Fetch
from tests.lease_world.memory import Memory, Writer
from tests.lease_world.network import ROUTER, FrameMessage
from tests.lease_world.prefill import Prefill
from worker.fencing import FenceWatch
from worker.leasing import LeaseKeeper

if TYPE_CHECKING:
    from tests.lease_world.router import Router
    from tests.lease_world.world import World

Event: TypeAlias = tuple[str, Callable[[], None]]

TTL_S = 4.0
DEAD_AFTER_S = 6.0
G, F, C, R, A, E = LeaseState
STEPS = {G: {G, F, C, A, E}, F: {F, C, A, E}, C: {C, R}, R: {R}, A: {A}, E: {E}}


@dataclass(slots=True)
class Watched:
    """A lease as this worker's tables had it when it was last looked at."""

    role: str
    state: LeaseState


@dataclass(frozen=True, slots=True)
class Expected:
    """What a frame must meet, noted before the table is asked; `check` compares the table's answer."""

    ref: LeaseRef
    epoch: int
    now: float
    state: LeaseState | None
    attempt: int
    peer_epoch: int | None
    expires_at: float

    def check(self, answer: Landing | AlreadyLanded | Refused) -> None:
        if self.ref.receiver_epoch != self.epoch:
            assert isinstance(answer, Refused), "a frame for another incarnation was taken"
            assert answer.refusal is Refusal.STALE_EPOCH
        elif self.state is None:
            assert isinstance(answer, Refused)
            assert answer.refusal is Refusal.UNKNOWN_LEASE
        elif self.ref.attempt != self.attempt:
            assert isinstance(answer, Refused), "a frame of another attempt was taken"
            assert answer.refusal is Refusal.STALE_ATTEMPT
        elif self.peer_epoch not in (None, self.ref.sender_epoch):
            assert isinstance(answer, Refused), "a frame of another incarnation of the sender was taken"
            assert answer.refusal is Refusal.STALE_EPOCH
        elif not isinstance(answer, Refused) and not isinstance(answer, AlreadyLanded):
            assert self.state.is_open, f"a frame was let into a lease that is {self.state}"
            assert self.now < self.expires_at, "a frame was let into a lease whose time is up"


class Worker:
    def __init__(self, world: World, name: str, offset_s: float) -> None:
        self.world = world
        self.net = world.net
        self.name = name
        self.incarnation = 0
        self.frozen = False
        self._offset_s = offset_s
        self.boot()

    def boot(self) -> None:
        """Nothing is left of the incarnation before. Lease ids begin anew: only epochs tell them apart."""
        self.incarnation += 1
        self.down = False
        self.epoch = self.world.new_epoch()
        self.memory = Memory()
        self.loop: deque[Callable[[], None]] = deque()
        self.watched: dict[bytes, Watched] = {}  # leases that are not over
        self.over: list[bytes] = []
        self.cancelled: dict[tuple[str, RequestId], int] = {}
        self.adopted: set[bytes] = set()
        self.told: dict[bytes, LeaseState] = {}
        self.tables: dict[bytes, LeaseTable] = {}
        self.decode = Decode(self)
        self.prefill = Prefill(self)
        self.fetch = Fetch(self)
        self.watch = FenceWatch(DEAD_AFTER_S, self.clock, has_routers=True)
        self.world.joined(self)

    def clock(self) -> float:
        return self.world.now + self._offset_s

    def make_keeper(self, prefix: bytes) -> LeaseKeeper:
        numbers = count(1)
        table = self.tables[prefix] = LeaseTable(
            self.epoch,
            self.clock,
            lambda size: prefix + next(numbers).to_bytes(size - 1, "big"),
            self.world.remembered,
        )
        return LeaseKeeper(table, self.memory, TTL_S)  # type: ignore[arg-type]

    # --- what happens --------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        return not self.down and not self.frozen

    def events(self) -> Iterator[Event]:
        if self.loop:
            yield "a callback runs", lambda: self.loop.popleft()()
        yield from self.decode.events()
        yield from self.prefill.events()
        yield from self.fetch.events()

    def post_to_loop(self, action: Callable[[], None]) -> None:
        self.loop.append(action)

    def sweep(self) -> None:
        """The timer: fencing first, then what is past its time."""
        reason = self.watch.ask(in_touch=self.name not in self.world.cut)
        if reason is not None:
            self.fence()
        self.decode.keeper.sweep()
        self.prefill.keeper.sweep()
        self.prefill.admit_waiting()
        for lease_id, watched in self.watched.items():
            lease = self.lease(lease_id)
            if lease is not None and not lease.state.is_over:
                until = lease.expires_at if lease.state.is_open else lease.deadline
                assert self.clock() < until, f"a lease of {watched.role} outlives its time"

    def fence(self) -> None:
        self.epoch = self.world.new_epoch()
        for keeper in (self.decode.keeper, self.prefill.keeper):
            keeper.fence(self.epoch)
        self.check()
        assert not self.watched, "fenced, and a lease lives on"
        self.world.joined(self)

    def crash(self) -> None:
        self.down = True
        self.frozen = False
        for stream in [s for s in self.net.streams if self.name in (s.source, s.to)]:
            self.net.break_stream(stream, ghosts=stream.source == self.name and self.world.coin())

    # --- words to others -----------------------------------------------------------------------

    def tell(self, what: str, act: Callable[[Router], None]) -> None:
        self.net.post(self.name, ROUTER, what, act)

    def tell_failed(self, request: RequestId, attempt: int, _cause: str) -> None:
        self.tell("failed", lambda router: router.failed(request, attempt))

    def call(
        self, to: str, what: str, act: Callable[[Worker], Any], on_answer: Callable[[Any], None]
    ) -> None:
        """A unary call: the request may be lost or repeated, and so may the answer."""
        self.net.post(
            self.name, to, what, lambda peer: peer.answer(self, what, partial(on_answer, act(peer)))
        )

    def answer(self, caller: Worker, what: str, act: Callable[[], None]) -> None:
        """To whoever called; an incarnation that is gone does not hear it."""
        incarnation = caller.incarnation

        def deliver(worker: Worker) -> None:
            if worker.incarnation == incarnation:
                act()

        self.net.post(self.name, caller.name, f"answer to {what}", deliver)

    # --- what must hold ------------------------------------------------------------------------

    def lease(self, lease_id: bytes) -> Lease | None:
        return self.tables[lease_id[:1]].get(lease_id)

    def watch_lease(self, role: str, lease_id: bytes) -> None:
        lease = self.lease(lease_id)
        if lease is not None:
            self.watched[lease_id] = Watched(role, lease.state)
            if not self.world.forgets:
                cancelled = self.cancelled.get((role, lease.request), 0)
                assert lease.attempt > cancelled, "granted what was cancelled"

    def note_cancel(self, role: str, request: RequestId, attempt: int) -> None:
        self.cancelled[role, request] = max(attempt, self.cancelled.get((role, request), 0))

    def expect_frame(self, frame: FrameMessage) -> Expected:
        lease = self.tables[b"d"].get(frame.ref.lease_id)
        return Expected(
            ref=frame.ref,
            epoch=self.epoch,
            now=self.clock(),
            state=None if lease is None else lease.state,
            attempt=0 if lease is None else lease.attempt,
            peer_epoch=None if lease is None else lease.peer_epoch,
            expires_at=0.0 if lease is None else lease.expires_at,
        )

    def note_answer(self, ref: LeaseRef, answer: Outcome | Refused | Waiting) -> None:
        """Whoever asks what became of a lease is told the same, first and last."""
        if ref.receiver_epoch != self.epoch:
            assert isinstance(answer, Refused)
            assert answer.refusal is Refusal.STALE_EPOCH
            return
        lease = self.lease(ref.lease_id)
        if isinstance(answer, Waiting):
            assert lease is not None
            assert lease.state.is_open, "told to wait for a lease that is closed"
        if not isinstance(answer, Outcome) or not (answer.state.is_over or answer.state is C):
            return
        state = C if answer.state is R else answer.state
        first = self.told.setdefault(ref.lease_id, state)
        assert state is first, f"first told {first}, then {state}"
        assert (state is C) == (ref.lease_id in self.adopted), f"told {state}, which is not what happened"

    def check_own_bytes(self, lease_id: bytes, entries: range) -> None:
        """What a commit covers was written under this lease, by the one incarnation that it is bound to."""
        lease = self.lease(lease_id)
        assert lease is not None
        assert lease.peer_epoch is not None
        for piece in whole(entries) if entries else ():
            assert self.memory.writers(lease_id, piece) == {Writer(lease_id, lease.peer_epoch)}

    def check(self) -> None:
        """After every event."""
        self.memory.pool.check()
        alive: set[tuple[str, RequestId]] = set()
        for lease_id, watched in list(self.watched.items()):
            lease = self.lease(lease_id)
            if lease is not None:
                assert lease.state in STEPS[watched.state], f"{watched.state} became {lease.state}"
                watched.state = lease.state
            if lease is None or lease.state.is_over:
                del self.watched[lease_id]
                self.over.append(lease_id)
                continue
            name = watched.role, lease.request
            assert name not in alive, "two attempts of a request are alive"
            alive.add(name)
        pinned = {served.owner for served in self.fetch.serving}
        read = {prompt.lease_id for prompt in (*self.prefill.prompts.values(), *self.prefill.closing)}
        for owner in self.memory.owners - pinned - read:
            lease = self.lease(owner)
            assert lease is not None, "memory of a lease that is forgotten"
            assert not lease.state.is_over or lease.landing, f"memory of a lease that is {lease.state}"

    def check_idle(self) -> None:
        """After everything."""
        for lease_id in self.over:
            lease = self.lease(lease_id)
            assert lease is None or lease.state.is_over, "a lease came back from the dead"
        pool = self.memory.pool.stats()
        assert (pool.private, pool.pins, pool.owners) == (0, 0, 0)
        for keeper in (self.decode.keeper, self.prefill.keeper):
            assert keeper.num_live == 0
        for table in self.tables.values():
            assert len(table._tombstones) <= self.world.remembered
            assert len(table._leases) <= self.world.remembered
        assert not self.decode.answers
        assert not self.prefill.prompts
        assert not self.fetch.asked
