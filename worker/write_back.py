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
from dataclasses import dataclass

import torch

from headrace.v1 import kvtransfer_pb2
from kvtransfer.codecs import Fidelity
from kvtransfer.keys import tenant_label
from kvtransfer.layouts import Piece, Plane
from kvtransfer.tiers.client import Declined, Granted, StoreClient
from kvtransfer.tiers.receiving import Offer
from kvtransfer.tiers.store_types import NotWanted
from kvtransfer.transports.grpc_push import PushSession
from kvtransfer.transports.push_books import PushOptions
from kvtransfer.transports.seam import HANDOFF_MAJOR, TransferError
from worker.kv import KvParts
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
        self._cache = _PacedCache(kv, is_computing)
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
        """Every part of a chain; False where the store or the cache lost it."""
        for start in range(0, len(chain.keys), BLOCKS_AT_A_TIME):
            left: Sequence[bytes] | None = chain.keys[start : start + BLOCKS_AT_A_TIME]
            give_up_at = self._kv.clock() + PUSH_TIMEOUT_S
            while left:
                if self._stopped.is_set() or self._kv.clock() >= give_up_at:
                    return False
                before, left = left, self._write_part(chain.tenant, left)
                if left == before:  # the store has no room for now
                    self._stopped.wait(BUSY_RETRY_S)
            if left is None:
                return False
        return True

    def _write_part(self, tenant: str, keys: Sequence[bytes]) -> Sequence[bytes] | None:
        """Offer and push one part; returns the keys that are left of it, or None where there is no use in going on."""
        owner = secrets.token_bytes(16)
        self._is_writing = True
        try:
            pinned = self._pin(owner, keys)
            if pinned is None:
                return None
            num_blocks, rank = pinned
            answer = self._store.offer(
                self._offer(tenant, keys[:num_blocks], rank),
                sender_epoch=self._current_epoch(),
                remaining_s=PUSH_TIMEOUT_S,
            )
            if isinstance(answer, Declined):
                return self._declined(answer, keys)
            pushed = self._push(self._open_push(owner, rank, answer), answer)
            return keys[answer.start_block + answer.num_blocks :] if pushed else None
        finally:
            self._kv.engine.release(owner)
            self._is_writing = False

    def _pin(self, owner: bytes, keys: Sequence[bytes]) -> tuple[int, int] | None:
        """The leading ones that are cached, as far as they are as good as the first: a part is stored under the
        worst rank in it, and what is exact shall stay so. None where there is none, or no room to pin it."""
        ranks = (fidelity.rank for fidelity in Fidelity)
        return next(filter(None, (self._kv.engine.pin(owner, keys, rank) for rank in ranks)), None)

    @staticmethod
    def _declined(answer: Declined, keys: Sequence[bytes]) -> Sequence[bytes] | None:
        if answer.cause == NotWanted.HELD:
            return ()
        return keys if answer.cause == NotWanted.BUSY else None

    def _offer(self, tenant: str, keys: Sequence[bytes], rank: int) -> Offer:
        layout = self._kv.engine.layout
        label = tenant_label(self._kv.config.cluster_secret, tenant)
        # A store keeps blocks one by one: where in the sequence they lie is all the same to it.
        return Offer(label, tuple(keys), 0, layout.block_tokens, layout, rank)

    def _open_push(self, owner: bytes, rank: int, granted: Granted) -> PushSession:
        layout = self._kv.engine.layout
        push = PushSession(
            channel=self._store.channel,
            lease=granted.lease,
            ttl_s=granted.ttl_s,
            remaining_s=PUSH_TIMEOUT_S,
            cache=self._cache,
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

    def _push(self, push: PushSession, granted: Granted) -> bool:
        """Send and commit; nothing reads the cache any more when this returns."""
        layout = self._kv.engine.layout
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


class _PacedCache:
    """The engine's cache, read at a bounded rate while the engine computes."""

    def __init__(self, kv: KvParts, is_computing: Callable[[], bool]) -> None:
        self._cache = kv.engine.cache
        self._pace = LandingPace(is_computing, BYTES_PER_S_WHILE_COMPUTING)

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._pace(wire.num_bytes(piece))
        return self._cache.gather(owner, piece, wire, out)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        self._cache.scatter(owner, piece, wire, data)

    def fence(self) -> None:
        self._cache.fence()
