"""Copies cached blocks to the node's store, in the background, so that they outlive this worker's memory.

A chain of keys is noted when its lease ends. A thread of its own offers it to the store, a few blocks at a time,
and pushes what the store wants; while the engine computes, at a bounded rate. Nothing waits for it: what does not
fit into its queue, or is evicted before its turn, is not written.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from engine.windows import window_key
from headrace.v1 import kvtransfer_pb2
from kvtransfer.cache_store import CacheStore
from kvtransfer.codecs import Fidelity
from kvtransfer.keys import tenant_label
from kvtransfer.layouts import CacheLayout, Piece, Plane
from kvtransfer.tiers.client import Declined, Granted, StoreClient
from kvtransfer.tiers.receiving import Offer
from kvtransfer.tiers.store_types import NotWanted
from kvtransfer.transports.grpc_push import PushSession
from kvtransfer.transports.push_books import PushOptions
from kvtransfer.transports.seam import HANDOFF_MAJOR, TransferError
from worker.kv import KvParts
from worker.media import Medium, medium_of
from worker.pacing import LandingPace

logger = logging.getLogger(__name__)

MAX_CHAINS = 256
BLOCKS_AT_A_TIME = 16
"""Blocks that are pinned, and kept from being evicted, at one time."""
PUSH_TIMEOUT_S = 30.0
JOIN_S = 5.0
BUSY_RETRY_S = 0.25
BYTES_PER_S_WHILE_COMPUTING = 64 << 20


@dataclass(frozen=True, slots=True)
class _Chain:
    tenant: str
    keys: tuple[bytes, ...]


class WriteBack:
    """One per worker. `is_computing()`: whether the engine has work; `current_epoch()`: this incarnation."""

    def __init__(
        self,
        kv: KvParts,
        store: StoreClient,
        is_computing: Callable[[], bool],
        current_epoch: Callable[[], int],
    ) -> None:
        self.num_dropped = 0
        """Chains that were not written: too many waited, or the store took nothing."""
        self._kv = kv
        self._store = store
        pace = LandingPace(is_computing, BYTES_PER_S_WHILE_COMPUTING)
        self._blocks = _paced(kv.blocks, pace)
        self._records = _paced(medium_of(kv.records), pace) if kv.records is not None else None
        self._current_epoch = current_epoch
        self._cond = threading.Condition()
        self._waiting: deque[_Chain] = deque()
        self._is_busy = False  # with a chain
        self._is_writing = False
        self._push_in_hand: PushSession | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-write-back", daemon=True)

    @property
    def is_writing(self) -> bool:
        """Whether blocks are pinned for it now."""
        return self._is_writing

    @property
    def is_behind(self) -> bool:
        """Whether anything that was noted waits to be written, or is being written."""
        with self._cond:
            return bool(self._waiting) or self._is_busy

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Write what waits for up to `grace_s`, then cut short what is being written, and end."""
        with self._cond:
            self._cond.wait_for(lambda: not (self._waiting or self._is_busy), grace_s)
            self._stopped.set()
            push = self._push_in_hand
            self._cond.notify_all()
        if push is not None:
            push.abort("WORKER_STOPPED")
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def note(self, tenant: str, keys: Sequence[bytes]) -> None:
        """Blocks of these keys, the first of a sequence on, are cached. Any thread; returns at once."""
        if not keys:
            return
        with self._cond:
            if len(self._waiting) >= MAX_CHAINS:
                self._waiting.popleft()
                self.num_dropped += 1
            self._waiting.append(_Chain(tenant, tuple(keys)))
            self._cond.notify_all()

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while (chain := self._next()) is not None:
            try:
                written = self._write(chain)
            except Exception:
                # One chain's fault must not end the writing of all the others.
                logger.exception("writing blocks back failed")
                written = False
            self.num_dropped += not written

    def _next(self) -> _Chain | None:
        with self._cond:
            self._is_busy = False
            self._cond.notify_all()
            self._cond.wait_for(lambda: self._waiting or self._stopped.is_set())
            if self._stopped.is_set():
                return None
            self._is_busy = True
            return self._waiting.popleft()

    def _write(self, chain: _Chain) -> bool:
        """Every part of a chain, and the windows that are kept along it; False where the store or the cache lost it."""
        parts = [chain.keys[at : at + BLOCKS_AT_A_TIME] for at in range(0, len(chain.keys), BLOCKS_AT_A_TIME)]
        if not all(self._write_whole(chain.tenant, part, self._blocks) for part in parts):
            return False
        if self._records is None or self._kv.records is None:
            return True
        worst = max(fidelity.rank for fidelity in Fidelity)
        kept = [window_key(key) for key in chain.keys if self._kv.records.has(key, worst) is not None]
        return all(self._write_whole(chain.tenant, (key,), self._records) for key in kept)

    def _write_whole(self, tenant: str, keys: Sequence[bytes], medium: Medium) -> bool:
        """One part, however often the store has to be asked."""
        if keys:
            left: Sequence[bytes] | None = keys
            give_up_at = self._kv.clock() + PUSH_TIMEOUT_S
            while left:
                if self._stopped.is_set() or self._kv.clock() >= give_up_at:
                    return False
                before, left = left, self._write_part(tenant, left, medium)
                if left == before:  # the store has no room for now
                    self._stopped.wait(BUSY_RETRY_S)
            if left is None:
                return False
        return True

    def _write_part(self, tenant: str, keys: Sequence[bytes], medium: Medium) -> Sequence[bytes] | None:
        """Offer and push one part; returns the keys that are left of it, or None where there is no use in going on."""
        owner = secrets.token_bytes(16)
        self._is_writing = True
        try:
            pinned = self._pin(owner, keys, medium)
            if pinned is None:
                return None
            num_blocks, rank = pinned
            answer = self._store.offer(
                self._offer(tenant, keys[:num_blocks], rank, medium.layout),
                sender_epoch=self._current_epoch(),
                remaining_s=PUSH_TIMEOUT_S,
            )
            if isinstance(answer, Declined):
                return self._declined(answer, keys)
            pushed = self._push(self._open_push(owner, rank, answer, medium), answer, medium.layout)
            return keys[answer.start_block + answer.num_blocks :] if pushed else None
        finally:
            medium.release(owner)
            self._is_writing = False

    @staticmethod
    def _pin(owner: bytes, keys: Sequence[bytes], medium: Medium) -> tuple[int, int] | None:
        """The leading ones that are cached, as far as they are as good as the first: a part is stored under the
        worst rank in it, and what is exact shall stay so. None where there is none, or no room to pin it."""
        ranks = (fidelity.rank for fidelity in Fidelity)
        return next(filter(None, (medium.pin(owner, keys, rank) for rank in ranks)), None)

    @staticmethod
    def _declined(answer: Declined, keys: Sequence[bytes]) -> Sequence[bytes] | None:
        if answer.cause == NotWanted.HELD:
            return ()
        return keys if answer.cause == NotWanted.BUSY else None

    def _offer(self, tenant: str, keys: Sequence[bytes], rank: int, layout: CacheLayout) -> Offer:
        label = tenant_label(self._kv.config.cluster_secret, tenant)
        # A store keeps blocks one by one: where in the sequence they lie is all the same to it.
        return Offer(label, tuple(keys), 0, layout.block_tokens, layout, rank)

    def _open_push(self, owner: bytes, rank: int, granted: Granted, medium: Medium) -> PushSession:
        layout = medium.layout
        push = PushSession(
            channel=self._store.channel,
            lease=granted.lease,
            ttl_s=granted.ttl_s,
            remaining_s=PUSH_TIMEOUT_S,
            cache=medium.cache,
            layout=layout,
            chooser=self._kv.choosers.chooser_for(
                self._kv.config.codec,
                (Fidelity.EXACT,),  # a block in a tier is as good as it is here
                peer=(self._store.address, granted.lease.receiver_epoch),
                layout=layout,
                shares_memory=True,
            ),
            owner=owner,
            start_token=granted.start_block * layout.block_tokens,
            metadata=self._store.metadata,
            options=PushOptions(align_tokens=layout.block_tokens),
            clock=self._kv.clock,
        )
        push.declare_fidelity(rank)
        return push

    def _push(self, push: PushSession, granted: Granted, layout: CacheLayout) -> bool:
        """Send and commit; nothing reads the cache any more when this returns."""
        handoff = kvtransfer_pb2.Handoff(
            num_tokens=(granted.start_block + granted.num_blocks) * layout.block_tokens,
            layout=layout.identity(),
            handoff_major=HANDOFF_MAJOR,
        )
        with self._cond:
            self._push_in_hand = push
        cause = "WRITE_BACK_FAILED"
        try:
            if self._stopped.is_set():
                return False
            return push.commit(handoff, PUSH_TIMEOUT_S).is_committed
        except TransferError as error:
            logger.info("blocks were not written back: %s", error)
            cause = error.cause
            return False
        finally:
            push.abort(cause)  # nothing, once it is committed
            with self._cond:
                self._push_in_hand = None


def _paced(medium: Medium, pace: LandingPace) -> Medium:
    return replace(medium, cache=_PacedCache(medium.cache, pace))


class _PacedCache:
    """A cache, read at a bounded rate while the engine computes."""

    def __init__(self, cache: CacheStore, pace: LandingPace) -> None:
        self._cache = cache
        self._pace = pace

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._pace(wire.num_bytes(piece))
        return self._cache.gather(owner, piece, wire, out)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        self._cache.scatter(owner, piece, wire, data)

    def fence(self) -> None:
        self._cache.fence()
