"""Who may have a prompt's cached blocks, and whether loading them beats computing them.

Asks the store, if there is one; moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvtransfer.sources import MAX_FETCH_KEYS
from kvtransfer.tiers.receiving import shape_of
from kvtransfer.worth import LoadDecision, PrefixPart, decide_parts
from worker.kv import KvParts

STORE = "store"


def pushes_to(address: str) -> str:
    """The name under which the speed of pushes to a worker is kept, beside that of fetches from it."""
    return f"pushes to {address}"


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker that has the prompt's first `cached_tokens` tokens cached, and a channel to its kv address."""

    address: str
    epoch: int
    cached_tokens: int
    channel: grpc.Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The full blocks of a prompt, by their keys. `bound`: the worst fidelity rank that it takes; `deadline`: of the
    request, on the worker's clock."""

    tenant: str
    keys: Sequence[bytes]
    bound: int
    deadline: float
    holders: Sequence[Holder] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """What one source would bring: the blocks up to `end_block` of those wanted, `num_bytes` to be moved."""

    name: str
    epoch: int
    channel: grpc.Channel
    end_block: int
    num_bytes: int
    decision: LoadDecision

    @property
    def merit(self) -> tuple[float, int]:
        """Seconds won; where they are not known, tokens."""
        load_s, compute_s = self.decision.predicted_load_s, self.decision.predicted_compute_s
        if load_s is None or compute_s is None:
            return 0.0, self.decision.num_tokens
        return compute_s - load_s, self.decision.num_tokens


class SourceFinder:
    """Finds the best source for each prompt of a worker. Any thread may call."""

    def __init__(self, kv: KvParts) -> None:
        self._kv = kv
        self._engine = kv.engine
        self._block_tokens = kv.engine.layout.block_tokens

    def anybody(self, holders: Sequence[Holder] = ()) -> bool:
        """Whether there is anybody to ask at all: without, no keys need to be made."""
        return bool(holders) or self._kv.store is not None

    def may_help(self, wanted: Wanted) -> bool:
        """Whether anybody may have blocks of the prompt that are not here; returns at once."""
        num_here = self._num_here(wanted)
        if num_here == len(wanted.keys):
            return False
        elsewhere = max((holder.cached_tokens for holder in wanted.holders), default=0) // self._block_tokens
        return self._kv.store is not None or elsewhere > num_here

    def find(self, wanted: Wanted) -> Source | None:
        """The source that is predicted to have the prompt computed soonest; None where computing all of it is.
        Waits for the store's answer, if there is a store."""
        num_here = self._num_here(wanted)
        found = [self._worker(holder, num_here, len(wanted.keys)) for holder in wanted.holders]
        found.append(self._store(wanted, num_here))
        worth = [source for source in found if source is not None and source.decision.load]
        return max(worth, key=lambda source: source.merit, default=None)

    def _num_here(self, wanted: Wanted) -> int:
        with self._engine.lock:
            return self._engine.pool.resumable(wanted.keys, wanted.bound)

    def _worker(self, holder: Holder, num_here: int, num_blocks: int) -> Source | None:
        end_block = min(holder.cached_tokens // self._block_tokens, num_blocks, num_here + MAX_FETCH_KEYS)
        if end_block <= num_here:
            return None
        name, layout = holder.address, self._kv.blocks.layout
        num_bytes = layout.num_bytes((end_block - num_here) * self._block_tokens)
        part = self._part(name, end_block, num_bytes, self._speed_of(holder))
        return self._judged(holder.epoch, holder.channel, part, num_here)

    def _speed_of(self, holder: Holder) -> float | None:
        """As fetches from it went; before the first one, as pushes to it went, in the other direction."""
        measured = self._kv.speeds.bytes_per_s(holder.address)
        return measured or self._kv.speeds.bytes_per_s(pushes_to(holder.address))

    def _store(self, wanted: Wanted, num_here: int) -> Source | None:
        store, keys = self._kv.store, wanted.keys[num_here : num_here + MAX_FETCH_KEYS]
        if store is None or not keys:
            return None
        answer = store.lookup(keys, wanted.bound, shape_of(self._kv.blocks.layout, self._block_tokens))
        runs = [run for run in answer.found.tiers if run.num_bytes]
        if not runs:
            return None
        num_bytes = sum(run.num_bytes for run in runs)
        if all(run.bytes_per_s for run in runs):
            speed: float | None = num_bytes / sum(run.num_bytes / run.bytes_per_s for run in runs)
        else:
            speed = self._kv.speeds.bytes_per_s(STORE)
        part = self._part(STORE, num_here + answer.found.num_blocks, num_bytes, speed)
        return self._judged(answer.epoch, store.channel, part, num_here)

    def _part(self, name: str, end_block: int, num_bytes: int, bytes_per_s: float | None) -> PrefixPart:
        end_token = end_block * self._block_tokens
        return PrefixPart(name, end_token, num_bytes, bytes_per_s, self._kv.speeds.fixed_s(name))

    def _judged(self, epoch: int, channel: grpc.Channel, part: PrefixPart, num_here: int) -> Source:
        decision = decide_parts(num_here * self._block_tokens, [part], self._kv.speeds.prefill_s_per_token)
        end_block = part.end_token // self._block_tokens
        return Source(part.source, epoch, channel, end_block, part.num_bytes, decision)
