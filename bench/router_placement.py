"""How long the router takes to choose workers for a prompt: prefix index and placement, in this process.

Prompts of 2,048 tokens, whose beginnings lie on a tenth of the workers, to a length of its own on each. Half
of the workers prefill, half decode; each has load, measured speeds and measured links. Whatever the number of
workers, a million blocks are indexed.
"""

from __future__ import annotations

import random
import secrets
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.report import percentile
from bench.router_settings import BLOCK_TOKENS, MAX_CONTEXT, new_secret
from headrace.v1 import worker_pb2
from kvtransfer.key_digest import key_digest
from kvtransfer.keys import KEY_BYTES
from router.core.fleet import Demand, Identity, LinkSpeed, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.index_feed import IndexFeed, KeyScheme
from router.core.placement import POLICIES, Placement, PlacementState
from router.core.tenants import DEFAULT_TENANT
from router.prompt_keys import KeyRoots, PromptKeys

NUM_BLOCKS = 1_000_000
PROMPT_TOKENS = 2048
NUM_PROMPTS = 256
HOLDERS_PART = 0.1
PAGE_KEYS = 4096
NUM_LINKS = 16
NUM_RUNNING = 64
NUM_PREFILLING = 4
VOCAB_SIZE = 49_152
SECONDS_BETWEEN = 0.001

_SCHEME = KeyScheme("bench", BLOCK_TOKENS)
_IDENTITY = Identity(
    weights_digest="bench", tokenizer_digest="bench", arithmetic="none", layout="none", handoff_major=1
)


@dataclass(slots=True)
class PlacementTimes:
    """Seconds of each prompt. `place_s` goes on from `match_s`."""

    hash_s: list[float] = field(default_factory=list)
    match_s: list[float] = field(default_factory=list)
    place_s: list[float] = field(default_factory=list)

    def metrics(self, num_workers: int) -> dict[str, float]:
        """In microseconds."""
        both_us = [
            1e6 * (match_s + place_s) for match_s, place_s in zip(self.match_s, self.place_s, strict=True)
        ]
        return {
            f"placement_us_{num_workers}": statistics.median(both_us),
            f"placement_p99_us_{num_workers}": percentile(both_us, 99),
            f"index_match_us_{num_workers}": 1e6 * statistics.median(self.match_s),
        }


class Fleet:
    """Workers as a router knows them, and prompts for them."""

    def __init__(self, num_workers: int, num_blocks: int = NUM_BLOCKS, seed: int = 0) -> None:
        """`num_blocks`: indexed in all.

        Raises:
            ValueError: fewer than two workers.
        """
        if num_workers < 2:
            raise ValueError(f"{num_workers} workers are no prefill and decode worker; at least 2 are needed")
        self._generator = random.Random(seed)
        self._state: PlacementState[int] = PlacementState(POLICIES["cost"], 1024)
        self._feed = IndexFeed()
        self._roots = KeyRoots(new_secret())
        self._prompts = [
            self._generator.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS) for _ in range(NUM_PROMPTS)
        ]
        self._running: deque[int] = deque()
        self._now = 0.0
        self._num_placed = 0
        self._refs = [WorkerRef(f"w{number}", number + 1) for number in range(num_workers)]
        self._join(num_blocks)

    @property
    def num_indexed(self) -> int:
        """Blocks that workers told of."""
        return self._feed.index.num_entries

    def place(self, num_prompts: int, times: PlacementTimes) -> None:
        """Places so many prompts, one after the other; `NUM_RUNNING` of them run at a
        time, of which at most `NUM_PREFILLING` are being prefilled.

        Raises:
            RuntimeError: a prompt found no place.
        """
        demand = Demand(num_prompt_tokens=PROMPT_TOKENS, max_total_tokens=PROMPT_TOKENS + 256)
        for _ in range(num_prompts):
            self._now += SECONDS_BETWEEN
            keys = self._keys(self._prompts[self._num_placed % NUM_PROMPTS])
            started = time.perf_counter()
            keys.keys(_SCHEME)
            hashed = time.perf_counter()
            cached = self._feed.cached(keys, self._now)
            matched = time.perf_counter()
            decision = self._state.place(demand, self._now, cached)
            placed = time.perf_counter()
            if not isinstance(decision, Placement):
                raise RuntimeError(f"a prompt found no place: {decision.reason}")
            times.hash_s.append(hashed - started)
            times.match_s.append(matched - hashed)
            times.place_s.append(placed - matched)
            self._dispatch(decision, demand, keys)

    def _dispatch(self, placement: Placement, demand: Demand, keys: PromptKeys) -> None:
        self._num_placed += 1
        self._state.charge(self._num_placed, placement, demand)
        for ref in placement.workers:
            self._feed.assume(ref, keys, self._now)
        self._running.append(self._num_placed)
        self._state.prefilled(self._num_placed - min(NUM_PREFILLING, len(self._refs) // 2))
        if len(self._running) > NUM_RUNNING:
            self._state.release(self._running.popleft())

    def _keys(self, token_ids: list[int]) -> PromptKeys:
        return PromptKeys(self._roots, DEFAULT_TENANT, token_ids)

    # --- the workers -------------------------------------------------------------------------------------

    def _join(self, num_blocks: int) -> None:
        held = self._held(num_blocks // len(self._refs))
        for number, (ref, keys) in enumerate(zip(self._refs, held, strict=True)):
            slot = self._feed.joined(ref, _SCHEME, self._now)
            facts = WorkerFacts(
                ref=ref,
                role=Role.DECODE if number % 2 else Role.PREFILL,
                identity=_IDENTITY,
                block_tokens=BLOCK_TOKENS,
                num_blocks=2 * len(keys) + MAX_CONTEXT,
                max_sequences=256,
                max_context=MAX_CONTEXT,
                kv_address=f"{ref.worker_id}:1",
                kv_bytes_per_token=1 << 15,
                key_identity=_SCHEME.identity,
            )
            self._state.add(facts, WorkerState.SERVING, slot)
            for page in _snapshot(keys):
                self._feed.take(ref, page, self._now)
        for number, ref in enumerate(self._refs):
            self._report(ref, prefills=number % 2 == 0)

    def _held(self, num_per_worker: int) -> list[list[bytes]]:
        """The blocks of each worker: beginnings of prompts, and others."""
        num_workers = len(self._refs)
        held: list[list[bytes]] = [[] for _ in self._refs]
        num_holders = max(1, round(HOLDERS_PART * num_workers))
        for prompt in self._prompts:
            keys = self._keys(prompt).keys(_SCHEME)
            for worker in self._generator.sample(range(num_workers), num_holders):
                held[worker] += keys[: self._generator.randint(1, len(keys))]
        for keys in held:
            del keys[num_per_worker:]
            keys += [secrets.token_bytes(KEY_BYTES) for _ in range(num_per_worker - len(keys))]
        return held

    def _report(self, ref: WorkerRef, *, prefills: bool) -> None:
        draw = self._generator
        worker = self._state.worker(ref)
        assert worker is not None
        links = {
            f"{other.worker_id}:1": LinkSpeed(draw.uniform(5e8, 2e9), draw.uniform(0.001, 0.01))
            for other in draw.sample(self._refs, min(NUM_LINKS, len(self._refs)))
        }
        self._state.report(
            ref,
            state=WorkerState.SERVING,
            free_blocks=worker.facts.num_blocks - draw.randrange(worker.facts.num_blocks // 2),
            num_sequences=0 if prefills else draw.randrange(128),
            queued_prefill_tokens=draw.randrange(4096) if prefills else 0,
            step_s=draw.uniform(0.01, 0.03),
            prefill_s_per_token=draw.uniform(0.0001, 0.0003),
            links=links if prefills else None,
        )


def measure(num_workers: int, num_prompts: int, num_blocks: int = NUM_BLOCKS) -> PlacementTimes:
    """Times of `num_prompts` placements, behind a tenth as many that are not counted."""
    fleet = Fleet(num_workers, num_blocks)
    fleet.place(max(1, num_prompts // 10), PlacementTimes())
    times = PlacementTimes()
    fleet.place(num_prompts, times)
    return times


def _snapshot(keys: list[bytes]) -> Iterator[worker_pb2.BlockEvents]:
    """As a worker tells of them: in pages, each with the number and the digest so far."""
    digest = 0
    for number, start in enumerate(range(0, max(1, len(keys)), PAGE_KEYS), start=1):
        page = keys[start : start + PAGE_KEYS]
        digest ^= key_digest(page)
        yield worker_pb2.BlockEvents(
            number=number,
            is_snapshot=True,
            continues=start + PAGE_KEYS < len(keys),
            changes=[worker_pb2.BlockChange(added=True, keys=b"".join(page))],
            num_blocks=start + len(page),
            digest=digest,
        )
