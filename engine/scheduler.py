"""The one scheduler: which positions of which sequences the next step computes.

Pure: it knows sequences and the block pool, no tensors, no clock, no network. A sequence has
`num_tokens - num_computed` positions to go: 1 for an answer being written, more for a prompt, for a
resumed or for a preempted one; there is no other difference between prefill and decode. A step is one
budget of tokens: running answers first, one token each, then prompts in order of arrival, in chunks.

A running answer that finds no block takes the blocks of the sequence that arrived last (of those whose blocks
its tenant may have, engine/shares.py); that one starts again from its cached prefix when there is room, within
the fidelity that its request allows, and computes its tokens anew (under `exact` they come out the same).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.pool import BlockPool
from engine.request import Sequence, SequenceStatus
from kvtransfer.keys import block_key


@dataclass(frozen=True, slots=True)
class StepRow:
    """Compute positions [start, start + num_tokens) of a sequence; draw a token where `draws`."""

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool


@dataclass(slots=True)
class StepPlan:
    """What a step computes, decode rows first, and what had to give way for it."""

    rows: list[StepRow] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_decode_rows(self) -> int:
        """Rows of one token that end in a draw."""
        return sum(1 for row in self.rows if row.num_tokens == 1 and row.draws)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens in the other rows."""
        return sum(row.num_tokens for row in self.rows) - self.num_decode_rows


def owner_of(sequence: Sequence) -> bytes:
    """The pool's name for a sequence: its lease, and for choices after the first the choice too."""
    return choice_owner(sequence.lease_id, sequence.choice)


def choice_owner(lease_id: bytes, choice: int) -> bytes:
    """The pool's name for one choice of a lease."""
    return lease_id if choice == 0 else lease_id + choice.to_bytes(2, "little")


class Scheduler:
    """Holds every sequence that still computes. Not thread-safe; the engine's lock guards it."""

    def __init__(self, pool: BlockPool, chunk_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.chunk_tokens = chunk_tokens
        self.max_sequences = max_sequences
        self.num_preemptions = 0
        self._sequences: list[Sequence] = []  # in order of arrival

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Every sequence that still computes, in order of arrival."""
        return tuple(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences with blocks of their own."""
        return sum(1 for sequence in self._sequences if sequence.status is SequenceStatus.RUNNING)

    @property
    def num_waiting(self) -> int:
        """Sequences that were preempted and wait for room."""
        return len(self._sequences) - self.num_running

    @property
    def queued_prefill_tokens(self) -> int:
        """Positions still to compute, beyond the one per running answer."""
        return sum(max(0, s.num_tokens - s.num_computed - 1) for s in self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence whose owner is open in the pool, or a PREEMPTED one without blocks."""
        if sequence.status is not SequenceStatus.PREEMPTED:
            sequence.status = SequenceStatus.RUNNING
        self._sequences.append(sequence)

    def remove(self, sequence: Sequence, status: SequenceStatus) -> None:
        """Compute nothing more for a sequence; its blocks stay with its owner."""
        sequence.status = status
        self._sequences = [other for other in self._sequences if other is not sequence]

    def find(self, lease_id: bytes) -> list[Sequence]:
        """The lease's sequences that still compute."""
        return [sequence for sequence in self._sequences if sequence.lease_id == lease_id]

    # --- a step --------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step; empty where nothing can be computed now."""
        plan = StepPlan()
        self._plan_answers(plan)
        self._plan_prompts(plan)
        return plan

    def _plan_answers(self, plan: StepPlan) -> None:
        for sequence in self._sequences:
            if len(plan.rows) == self.max_sequences:
                return
            if (
                sequence.status is not SequenceStatus.RUNNING
                or sequence.num_tokens - sequence.num_computed != 1
            ):
                continue
            if self._make_room(sequence, sequence.num_tokens, plan):
                plan.rows.append(StepRow(sequence, sequence.num_computed, 1, draws=True))

    def _plan_prompts(self, plan: StepPlan) -> None:
        budget = self.chunk_tokens
        for sequence in self._sequences:
            if budget <= 0:
                return
            if sequence.status is SequenceStatus.PREEMPTED and not self._readmit(sequence, plan):
                continue
            remaining = sequence.num_tokens - sequence.num_computed
            if remaining <= 1:  # an answer: planned above, or in the next step
                continue
            num_tokens = min(remaining, budget)
            if not self.pool.grow(
                owner_of(sequence), self.pool.blocks_for(sequence.num_computed + num_tokens)
            ):
                continue
            budget -= num_tokens
            plan.rows.append(
                StepRow(sequence, sequence.num_computed, num_tokens, draws=num_tokens == remaining)
            )

    def _make_room(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Grow a running answer, taking blocks from later arrivals; False where it had to give way itself."""
        while not self.pool.grow(owner_of(sequence), self.pool.blocks_for(num_tokens)):
            if sequence.prefill_only:
                return False
            victim = self._last_running(sequence)
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    def _last_running(self, taker: Sequence) -> Sequence:
        """The last arrival whose blocks `taker` can use; at the latest itself."""
        # A prompt whose chunks are being pushed elsewhere keeps its blocks: the sender reads them.
        return next(
            s
            for s in reversed(self._sequences)
            if s.status is SequenceStatus.RUNNING
            and not s.prefill_only
            and self.pool.frees_for(owner_of(taker), owner_of(s))
        )

    def _preempt(self, victim: Sequence, plan: StepPlan) -> None:
        self.pool.close(owner_of(victim))
        victim.num_computed = 0
        victim.status = SequenceStatus.PREEMPTED
        self.num_preemptions += 1
        plan.preempted.append(victim)
        plan.rows = [row for row in plan.rows if row.sequence is not victim]

    def _readmit(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a preempted sequence blocks again where enough stay for the answers that run."""
        if sequence in plan.preempted:
            return False
        keys = self.prefix_keys(sequence.root_key, sequence.tokens)
        num_blocks = self.pool.blocks_for(sequence.num_tokens)
        num_hit = self.pool.open(
            owner_of(sequence), keys, num_blocks, self.num_running, sequence.bound, sequence.tenant
        )
        if num_hit is None:
            return False
        sequence.num_computed = num_hit * self.pool.block_tokens
        sequence.status = SequenceStatus.RUNNING
        return True

    def computed(self, row: StepRow) -> None:
        """Record that a row's positions are in the cache, and key the blocks that it filled."""
        sequence = row.sequence
        sequence.num_computed = row.start + row.num_tokens
        self.seal(sequence)

    def seal(self, sequence: Sequence) -> None:
        """Key every full block of a sequence that has no key yet."""
        size, owner = self.pool.block_tokens, owner_of(sequence)
        keys = self.pool.keys(owner)
        for index in range(len(keys), sequence.num_computed // size):
            parent = keys[-1] if keys else sequence.root_key
            self.pool.seal(owner, block_key(parent, sequence.tokens[index * size : (index + 1) * size]))

    def prefix_keys(self, root_key: bytes, tokens: Iterable[int]) -> list[bytes]:
        """Keys of the full blocks that may be taken from the cache: at least one token stays to be computed."""
        tokens = list(tokens)
        keys: list[bytes] = []
        for index in range((len(tokens) - 1) // self.pool.block_tokens):
            start = index * self.pool.block_tokens
            keys.append(
                block_key(keys[-1] if keys else root_key, tokens[start : start + self.pool.block_tokens])
            )
        return keys
