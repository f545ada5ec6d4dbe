"""Loads a prompt's cached blocks, and the windows at their end, from one source into leases of their own.

On threads that may wait; whatever goes wrong costs a bounded time.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence

from engine.record_cache import RecordCache
from engine.windows import window_key
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.codecs import CODECS
from kvtransfer.fetching import FetchCause, FetchOutcome
from kvtransfer.frames import LeaseRef
from kvtransfer.layouts import CacheLayout
from kvtransfer.lease_types import RequestId
from kvtransfer.sources import FetchRequest
from kvtransfer.tiers.receiving import shape_of
from kvtransfer.transports.grpc_fetch import FetchSession
from worker.kv import KvParts
from worker.leasing import LeaseKeeper, NotReserved
from worker.prefix_sources import STORE, Source, Wanted

logger = logging.getLogger(__name__)

STALL_S = 2.0
UNMEASURED_S = 10.0
"""What a fetch may take where nothing says how long computing would."""
MOST_BOUNDARIES = 16
"""That windows are looked for at, from the end of what is cached on backwards."""


def request_for(
    reference: LeaseRef, layout: CacheLayout, keys: Sequence[bytes], first_block: int, bound: int
) -> FetchRequest:
    """For blocks of `layout`, in every codec that loses no more than `bound` allows."""
    return FetchRequest(
        lease=reference,
        keys=tuple(keys),
        first_block=first_block,
        block_tokens=layout.block_tokens,
        layout=layout.identity(),
        dtypes=layout.dtypes,
        fidelity=bound,
        codecs=tuple((each.name, each.version) for each in CODECS if each.fidelity.rank <= bound),
    )


class Loading:
    """Loads blocks into leases of one role; on threads that may wait."""

    def __init__(self, kv: KvParts, leases: LeaseKeeper, current_epoch: Callable[[], int]) -> None:
        self._kv = kv
        self._engine = kv.engine
        self._leases = leases
        self._target = kv.target(leases)
        self._records = WindowLoading(kv, leases, current_epoch) if kv.records is not None else None
        self._current_epoch = current_epoch

    def count(self, source: Source, num_tokens: int) -> None:
        """For the worker's reports."""
        self._kv.counters.note_fetch(STORE if source.name == STORE else "worker", num_tokens)

    def load(self, wanted: Wanted, source: Source, attach: Callable[[FetchSession], None]) -> tuple[int, str]:
        """Tokens that are cached here now, of those that `source` has, and why so many."""
        loaded = self._load_blocks(wanted, source, attach)
        if self._records is not None:
            self._records.load(wanted, source, attach)
        return loaded

    def _load_blocks(
        self, wanted: Wanted, source: Source, attach: Callable[[FetchSession], None]
    ) -> tuple[int, str]:
        limit_s = min(wanted.deadline - self._kv.clock(), self._worth_s(source))
        if limit_s <= 0:
            return 0, "the deadline has passed"
        request = RequestId(wanted.tenant, f"fetch:{secrets.token_hex(8)}")
        lease_id = self._leases.grant(
            request, 1, limit_s, local=False, fidelity=wanted.bound, peer_epoch=source.epoch
        )
        if isinstance(lease_id, NotReserved):
            return 0, f"{lease_id.cause}: {lease_id.message}"
        try:
            return self._load_into(lease_id, limit_s, wanted, source, attach)
        finally:
            self._leases.release(lease_id, "FETCH_OVER")

    def _load_into(
        self,
        lease_id: bytes,
        limit_s: float,
        wanted: Wanted,
        source: Source,
        attach: Callable[[FetchSession], None],
    ) -> tuple[int, str]:
        keys = wanted.keys[: source.end_block]
        num_hit = self._leases.open_prefix(lease_id, keys, wanted.bound)
        if num_hit is None:
            return 0, "no room to load into"
        if num_hit == len(keys):
            return 0, "all of it is here meanwhile"

        def on_fetched(lease_id: bytes, num_blocks: int, fidelity: int) -> None:
            self._engine.seal_prefix(lease_id, keys, num_hit + num_blocks, fidelity)

        reference = LeaseRef(lease_id, 1, source.epoch, self._current_epoch())
        session = FetchSession(
            channel=source.channel,
            request=request_for(reference, self._kv.blocks.layout, keys[num_hit:], num_hit, wanted.bound),
            target=self._target,
            on_fetched=on_fetched,
            remaining_s=limit_s,
            stall_s=STALL_S,
            metadata=cluster_metadata(self._kv.config.cluster_secret),
            clock=self._kv.clock,
        )
        attach(session)
        return self._result(source, session.run())

    def _result(self, source: Source, outcome: FetchOutcome) -> tuple[int, str]:
        if outcome.num_blocks:
            # A store is asked in bytes as it keeps them, a worker in bytes of the cache.
            num_bytes = outcome.wire_bytes if source.name == STORE else outcome.kv_bytes
            self._kv.speeds.note_load(source.name, num_bytes, outcome.fetch_s)
            return outcome.num_blocks * self._engine.layout.block_tokens, source.decision.reason
        logger.info("nothing fetched from %s: %s: %s", source.name, outcome.cause, outcome.message)
        if outcome.cause == FetchCause.PEER_UNAVAILABLE or outcome.fetch_s >= STALL_S:
            # So that the prompts after this one do not wait for it in vain as well.
            self._kv.speeds.note_load(source.name, source.num_bytes, max(outcome.fetch_s, STALL_S))
        return 0, f"{outcome.cause}: {outcome.message}"

    @staticmethod
    def _worth_s(source: Source) -> float:
        """A fetch that has taken as long as computing would is not worth waiting for any more."""
        predicted = source.decision.predicted_compute_s
        return UNMEASURED_S if predicted is None else max(STALL_S, predicted)


class WindowLoading:
    """Loads the record of the last boundary that a source has one for, into a record here."""

    def __init__(self, kv: KvParts, leases: LeaseKeeper, current_epoch: Callable[[], int]) -> None:
        assert kv.records is not None
        self._kv = kv
        self._leases = leases
        self._records: RecordCache = kv.records
        self._target = kv.record_target(leases, kv.records)
        self._current_epoch = current_epoch

    def load(self, wanted: Wanted, source: Source, attach: Callable[[FetchSession], None]) -> None:
        """Look from the last block that is cached here backwards, until one is found or is here already."""
        with self._kv.engine.lock:
            num_cached = self._kv.engine.pool.lookup(wanted.keys, wanted.bound)
        for block in reversed(wanted.keys[max(0, num_cached - MOST_BOUNDARIES) : num_cached]):
            if self._records.has(block, wanted.bound) is not None or self._kv.clock() >= wanted.deadline:
                return
            if self._may_have(source, block, wanted.bound) and self._fetch(wanted, source, block, attach):
                return

    def _may_have(self, source: Source, block: bytes, bound: int) -> bool:
        """A store is asked first, which is quick; a worker refuses a fetch as quickly."""
        if source.name != STORE or self._kv.store is None:
            return True
        layout = self._records.layout
        answer = self._kv.store.lookup([window_key(block)], bound, shape_of(layout, layout.block_tokens))
        return answer.found.num_blocks > 0

    def _fetch(
        self, wanted: Wanted, source: Source, block: bytes, attach: Callable[[FetchSession], None]
    ) -> bool:
        request = RequestId(wanted.tenant, f"windows:{secrets.token_hex(8)}")
        limit_s = min(wanted.deadline - self._kv.clock(), UNMEASURED_S)
        lease_id = self._leases.grant(
            request, 1, limit_s, local=False, fidelity=wanted.bound, peer_epoch=source.epoch
        )
        if isinstance(lease_id, NotReserved):
            return False
        try:
            if not self._leases.open_empty(lease_id) or not self._records.open(lease_id):
                return False
            reference = LeaseRef(lease_id, 1, source.epoch, self._current_epoch())
            session = FetchSession(
                channel=source.channel,
                request=request_for(reference, self._records.layout, [window_key(block)], 0, wanted.bound),
                target=self._target,
                on_fetched=lambda lease, _blocks, fidelity: self._records.seal(lease, block, fidelity),
                remaining_s=limit_s,
                stall_s=STALL_S,
                metadata=cluster_metadata(self._kv.config.cluster_secret),
                clock=self._kv.clock,
            )
            attach(session)
            return session.run().is_committed
        finally:
            self._leases.release(lease_id, "FETCH_OVER")
            self._records.release(lease_id)
