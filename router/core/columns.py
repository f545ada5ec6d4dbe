"""The workers' figures as columns of numbers, so that a thousand of them are weighed in a few array operations.

A table has one row for each worker that may get requests now; `write` brings a row up to the worker's own
figures, which stay the truth. Rows are in no order that means anything; a worker that leaves is replaced by the last.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.core.fleet import Demand, Role, Worker

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_PREFILL_PROMPTS = 2  # the running prompt and one more
FEW_HOLDERS = 32  # up to so many, one at a time is faster than all slots at once

_CHARGED = (
    "credits", "used", "fullness", "room", "num_sequences", "load", "refused_until_s", "turn_tokens",
    "tokens_ahead", "last_placed", "last_prefilled",
)  # fmt: skip
_REPORTED = (
    "num_blocks", "per_block", "max_sequences", "per_sequence", "block_tokens", "max_context", "is_both",
    "empty_step_s", "row_s", "s_per_token", "kv_bytes_per_token", "link_s_per_byte", "link_fixed_s",
)  # fmt: skip
_COLUMNS = (*_CHARGED, *_REPORTED)
_NUM_CHARGED = len(_CHARGED)


def turn_tokens(worker: Worker, window_tokens: int) -> float:
    """How many tokens to prefill may be sent to a worker now. It holds the running prompt and one more, whatever their
    size, and any number of prompts that stay within the window together."""
    if worker.prefill_prompts < MAX_PREFILL_PROMPTS:
        return math.inf
    return window_tokens - worker.prefill_tokens


def charged_of(worker: Worker, window_tokens: int) -> tuple[float, ...]:
    """The first of a worker's columns: what changes with each request. `used` is the share of its blocks that is taken,
    `load` that of its sequences. `fullness` is a factor of a step's cost (`costs`)."""
    facts, credits, num_sequences = worker.facts, worker.credits, worker.num_sequences
    used = 1.0 - credits / max(1, facts.num_blocks)
    return (
        credits,
        used,
        1.0 + used,
        facts.max_sequences - num_sequences,
        num_sequences,
        num_sequences / max(1, facts.max_sequences),
        worker.refused_until_s,
        turn_tokens(worker, window_tokens),
        worker.tokens_ahead,
        worker.last_placed,
        worker.last_prefilled,
    )


def row_of(worker: Worker, window_tokens: int) -> tuple[float, ...]:
    """A worker's figures in the order of the columns. `per_block` and `per_sequence` are what one more adds to the
    share that is taken."""
    facts = worker.facts
    return (
        *charged_of(worker, window_tokens),
        facts.num_blocks,
        1.0 / max(1, facts.num_blocks),
        facts.max_sequences,
        1.0 / max(1, facts.max_sequences),
        facts.block_tokens,
        facts.max_context,
        facts.role is Role.BOTH,
        worker.empty_step_s,
        worker.row_s,
        worker.prefill_s_per_token,
        facts.kv_bytes_per_token,
        worker.link_s_per_byte,
        worker.link_fixed_s,
    )


class WorkerTable:
    """Columns over some workers; `workers[i]` has row i. The prefill window is in tokens. What is charged is brought up
    to date by `refresh`, before a choice, since it changes several times between two."""

    credits: Floats
    num_blocks: Floats
    used: Floats
    fullness: Floats
    per_block: Floats
    room: Floats
    num_sequences: Floats
    max_sequences: Floats
    load: Floats
    per_sequence: Floats
    block_tokens: Floats
    max_context: Floats
    refused_until_s: Floats
    turn_tokens: Floats
    tokens_ahead: Floats
    last_placed: Floats
    last_prefilled: Floats
    is_both: Floats
    empty_step_s: Floats
    row_s: Floats
    s_per_token: Floats
    kv_bytes_per_token: Floats
    link_s_per_byte: Floats
    link_fixed_s: Floats

    def __init__(self, window_tokens: int) -> None:
        self.workers: tuple[Worker, ...] = ()
        self._window_tokens = window_tokens
        self._places: dict[int, int] = {}
        self._stale: dict[int, Worker] = {}  # by slot
        self._rows: Floats = np.zeros((len(_COLUMNS), 0))
        self.latest_refusal_s = 0.0
        """No worker is kept from requests by a refusal later than this."""
        self._bind()

    def __len__(self) -> int:
        return len(self.workers)

    def place_of(self, slot: int) -> int | None:
        """The row of the worker with this slot."""
        return self._places.get(slot)

    def row(self, place: int) -> tuple[float, ...]:
        """A row as it stands, for those who compare it with `row_of`."""
        self.refresh()
        return tuple(self._rows[:, place].tolist())

    def add(self, worker: Worker) -> None:
        self._places[worker.slot] = len(self.workers)
        self.workers = (*self.workers, worker)
        self._rows = np.column_stack([self._rows, row_of(worker, self._window_tokens)])
        self.latest_refusal_s = max(self.latest_refusal_s, worker.refused_until_s)
        self._bind()

    def remove(self, worker: Worker) -> None:
        """Takes a worker out; one that is not in changes nothing."""
        place = self._places.pop(worker.slot, None)
        if place is None:
            return
        self._stale.pop(worker.slot, None)
        *workers, last = self.workers
        if last is not worker:
            workers[place] = last
            self._places[last.slot] = place
            self._rows[:, place] = self._rows[:, -1]
        self.workers = tuple(workers)
        self._rows = self._rows[:, :-1].copy()
        self._bind()

    def write(self, worker: Worker) -> None:
        """Brings a worker's row up to date; one that is not in changes nothing."""
        place = self._places.get(worker.slot)
        if place is not None:
            self._rows[:, place] = row_of(worker, self._window_tokens)
            self.latest_refusal_s = max(self.latest_refusal_s, worker.refused_until_s)
            self._stale.pop(worker.slot, None)

    def charged(self, worker: Worker) -> None:
        """What is charged to a worker has changed; `refresh` brings it into the columns."""
        if worker.slot in self._places:
            self._stale[worker.slot] = worker

    def refresh(self) -> None:
        """Brings the columns up to what was charged."""
        for slot, worker in self._stale.items():
            self._rows[:_NUM_CHARGED, self._places[slot]] = charged_of(worker, self._window_tokens)
            if worker.refused_until_s > self.latest_refusal_s:
                self.latest_refusal_s = worker.refused_until_s
        self._stale.clear()

    def blocks_of(self, demand: Demand) -> Floats | int:
        """Blocks that a request needs: one number where the workers' blocks are all of one size."""
        if self._common_block_tokens:
            return demand.num_blocks(self._common_block_tokens)
        return np.ceil(demand.num_prompt_tokens / self.block_tokens) + demand.num_choices

    def _bind(self) -> None:
        for name, column in zip(_COLUMNS, self._rows, strict=True):
            setattr(self, name, column)
        self.slots = np.array([worker.slot for worker in self.workers], dtype=np.intp)
        sizes = {worker.facts.block_tokens for worker in self.workers}
        self._common_block_tokens = sizes.pop() if len(sizes) == 1 else 0
        self.min_context = min((worker.facts.max_context for worker in self.workers), default=0)
        self.num_both = sum(worker.facts.role is Role.BOTH for worker in self.workers)


def tokens_by_slot(cached: Sequence[tuple[int, int]], num_slots: int, most: int) -> Floats:
    """How many tokens each worker holds: cached prefixes as (mask of slots, tokens), masks disjoint.

    No number is above `most`; bits of slots that nobody has mean nothing.
    """
    if not cached or not num_slots:
        return np.zeros(num_slots)
    if sum([mask.bit_count() for mask, _ in cached]) <= FEW_HOLDERS:
        return _one_by_one(cached, num_slots, most)
    num_bytes = -(-num_slots // 8)
    try:
        packed = b"".join([mask.to_bytes(num_bytes, "little") for mask, _ in cached])
    except OverflowError:
        known = (1 << num_slots) - 1
        packed = b"".join([(mask & known).to_bytes(num_bytes, "little") for mask, _ in cached])
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    rows, slots = np.divmod(bits.view(np.bool_).nonzero()[0], 8 * num_bytes)
    by_slot = np.zeros(8 * num_bytes)
    by_slot[slots] = np.array([float(min(tokens, most)) for _, tokens in cached])[rows]
    return by_slot[:num_slots]


def _one_by_one(cached: Sequence[tuple[int, int]], num_slots: int, most: int) -> Floats:
    by_slot = np.zeros(num_slots)
    known = (1 << num_slots) - 1
    for mask, tokens in cached:
        left = mask & known
        while left:
            slot = left.bit_length() - 1
            by_slot[slot] = min(tokens, most)
            left ^= 1 << slot
    return by_slot
