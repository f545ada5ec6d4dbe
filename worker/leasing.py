"""Leases and their blocks, changed together: the lease table and the engine under the engine's lock.

Every way in which a lease ends comes through here, so that its blocks are given back exactly once, and not
while somebody still reads them (`hold`). Knows no request beyond its name and no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.v1 import kvtransfer_pb2
from kvtransfer.coverage import leading_tokens
from kvtransfer.desk import LeaseDesk
from kvtransfer.lease_types import LeaseState, Refused, RequestId
from kvtransfer.leases import LeaseTable
from kvtransfer.transports.seam import HandoffRefused

if TYPE_CHECKING:
    from engine.engine import Engine

DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
NO_CAPACITY = "NO_CAPACITY"
LOST_CAUSES = {"TTL": "LEASE_EXPIRED", "DEADLINE": DEADLINE_EXCEEDED}
"""Causes that the lease table gives, as a request's failure is told."""


@dataclass(frozen=True, slots=True)
class NotReserved:
    """Why there is no lease. `cause` is UPPER_SNAKE."""

    cause: str
    message: str


class LeaseKeeper:
    """One role's leases on one engine. Every method takes the engine's lock; any thread may call.

    The role sets two hooks, both called under the lock, on any thread. `on_lost(lease_id, cause)`: a lease's
    memory is given back; a role that ended the lease itself has forgotten it by then. `on_commit(lease_id,
    handoff, fidelity)`: all that a handoff names has landed; raises HandoffRefused where it does not fit. The
    worker sets a third, called likewise: `on_cached(tenant, keys)`: a lease's blocks stay behind under these keys.
    """

    def __init__(self, table: LeaseTable, engine: Engine, ttl_s: float) -> None:
        self.desk = LeaseDesk(table, engine.lock, self._reclaim)
        self.counters = table.counters
        self.on_lost: Callable[[bytes, str], None] = lambda _lease_id, _cause: None
        self.on_commit: Callable[[bytes, kvtransfer_pb2.Handoff, int], None] = _refuse_commit
        self.on_cached: Callable[[str, Sequence[bytes]], None] = lambda _tenant, _keys: None
        self.ttl_s = ttl_s
        self._table = table
        self._engine = engine
        self._held: set[bytes] = set()
        self._landing: dict[bytes, tuple[bytes, Sequence[int]]] = {}  # root key and tokens of what is to land
        self._due: set[bytes] = set()

    @property
    def num_live(self) -> int:
        """Leases that hold memory, or whose memory is still being read."""
        with self._engine.lock:
            return self._table.num_held + len(self._due)

    def grant(
        self,
        request: RequestId,
        attempt: int,
        remaining_s: float,
        *,
        local: bool,
        fidelity: int = 0,
        peer_epoch: int | None = None,
    ) -> bytes | NotReserved:
        """A lease id without blocks, for `reserve` or `open_prefix` to follow. `fidelity`: the worst rank that may
        land in it; `peer_epoch`: who alone may send into it, where that is known."""
        with self.desk.change() as table:
            granted = table.grant(
                request,
                attempt,
                ttl_s=self.ttl_s,
                remaining_s=remaining_s,
                peer_epoch=peer_epoch,
                local=local,
                fidelity=fidelity,
            )
        if isinstance(granted, Refused):
            return NotReserved(granted.refusal.value, granted.message)
        return granted.lease_id

    def reserve(
        self,
        lease_id: bytes,
        prompt: Sequence[int],
        num_choices: int,
        root_key: bytes,
        bound: int = 0,
        is_computed_here: bool = True,
    ) -> int | None:
        """Blocks for a granted lease; returns the prompt tokens found cached, or None without room. Not
        `is_computed_here`: its rest lands.

        None also for a lease that has ended while it waited for room: its blocks would never be given back.
        """
        with self.desk.change() as table:
            lease = table.get(lease_id)
            if lease is None or lease.state.is_over:
                return None
            tenant = lease.request.tenant
            cached_tokens = self._engine.reserve(
                lease_id,
                prompt,
                num_choices,
                root_key,
                bound=bound,
                tenant=tenant,
                is_computed_here=is_computed_here,
            )
            if cached_tokens is not None:
                table.hold_prefix(lease_id, cached_tokens)
                if not is_computed_here:
                    self._landing[lease_id] = (root_key, prompt)
            return cached_tokens

    def open_prefix(self, lease_id: bytes, keys: Sequence[bytes], bound: int) -> int | None:
        """Blocks for a granted lease that a fetch fills; returns how many of `keys` are cached, or None without
        room, or where the lease has ended."""
        with self.desk.change() as table:
            lease = table.get(lease_id)
            if lease is None or lease.state.is_over:
                return None
            num_hit = self._engine.open_prefix(lease_id, keys, bound, lease.request.tenant)
            if num_hit is not None:
                table.hold_prefix(lease_id, num_hit * self._engine.layout.block_tokens)
            return num_hit

    def open_empty(self, lease_id: bytes) -> bool:
        """A granted lease for something that is not of the blocks of a sequence; False where it has ended."""
        with self.desk.change() as table:
            lease = table.get(lease_id)
            if lease is None or lease.state.is_over:
                return False
            table.hold_prefix(lease_id, 0)
            return True

    def release(self, lease_id: bytes, cause: str = "") -> None:
        """End a lease in whatever state it is. Idempotent."""
        with self.desk.change() as table:
            table.release(lease_id, cause)
            self._engine.stop(lease_id)

    def cancel(self, request: RequestId, attempt: int, cause: str) -> None:
        """End an attempt, also one that is not known yet."""
        with self.desk.change() as table:
            table.cancel(request, attempt, cause)

    def take_over(self, lease_id: bytes, attempt: int) -> bool:
        """A committed lease goes on as a newer attempt; False where it cannot."""
        with self.desk.change() as table:
            lease = table.get(lease_id)
            return lease is not None and table.take_over(lease_id, attempt)

    def sweep(self) -> None:
        """End what is past its time."""
        with self.desk.change() as table:
            table.expire()
            for lease_id in table.overdue():
                table.release(lease_id, DEADLINE_EXCEEDED)

    def end_all(self, cause: str) -> None:
        """End every lease; the role hears of each as of one that was lost."""
        with self.desk.change() as table:
            table.end_all(cause)

    def fence(self, new_epoch: int) -> None:
        """End every lease with cause FENCED, and go on as a new incarnation."""
        with self.desk.change() as table:
            table.fence(new_epoch)

    def commit(self, lease_id: bytes, handoff: kvtransfer_pb2.Handoff, fidelity: int) -> None:
        """Pass a handoff on to the role, with the worst fidelity rank of what landed. Raises HandoffRefused."""
        self.on_commit(lease_id, handoff, fidelity)

    def hold(self, lease_id: bytes) -> None:
        """Keep a lease's blocks, however it ends, until `unhold`: another thread reads them."""
        with self._engine.lock:
            self._held.add(lease_id)

    def unhold(self, lease_id: bytes) -> None:
        """Nobody reads the lease's blocks any more."""
        with self._engine.lock:
            self._held.discard(lease_id)
            if lease_id in self._due:
                self._due.discard(lease_id)
                self._give_back(lease_id)

    def _reclaim(self, lease_ids: list[bytes]) -> None:
        for lease_id in lease_ids:
            lease = self._table.get(lease_id)
            self._salvage(lease_id)
            if lease_id in self._held:
                self._engine.stop(lease_id)
                self._due.add(lease_id)
            else:
                self._give_back(lease_id)
            self.on_lost(lease_id, lease.cause if lease else "")

    def _salvage(self, lease_id: bytes) -> None:
        """Cache what landed of a lease that was not committed: whoever takes the prompt over need not send it again."""
        lease, pieces = self._table.get(lease_id), self._table.take_landed(lease_id)
        root_key, prompt = self._landing.pop(lease_id, (b"", ()))
        if lease is None or lease.state is LeaseState.RELEASED or not pieces or not prompt:
            return
        layout = self._engine.layout
        num_tokens = leading_tokens(layout, pieces, lease.start_token, len(prompt))
        keys = self._engine.prefix_keys(root_key, prompt)
        num_blocks = min(num_tokens // layout.block_tokens, len(keys))
        self._engine.seal_prefix(lease_id, keys, num_blocks, lease.landed_fidelity)

    def _give_back(self, lease_id: bytes) -> None:
        lease = self._table.get(lease_id)
        if lease is not None:
            for keys in self._engine.sealed_keys(lease_id):
                self.on_cached(lease.request.tenant, keys)
        self._engine.release(lease_id)


def _refuse_commit(_lease_id: bytes, _handoff: kvtransfer_pb2.Handoff, _fidelity: int) -> None:
    raise HandoffRefused("WRONG_ROLE", "this worker does not decode")
