"""The one scheduler: which positions of which sequences the next step computes.

Pure: it knows sequences and the block pool, no tensors, no clock, no network. A sequence has
`num_tokens - num_computed` positions to go: 1 for an answer being written, more for a prompt, for a
resumed or for a preempted one; there is no other difference between prefill and decode. A step is one
budget of tokens: running answers first, one token each and as many guesses as pay (engine/drafter.py), then prompts
in chunks, which are shorter where answers would otherwise wait too long for their next token. The oldest prompt has
at least half of every chunk; short ones that arrived after it pass it in the other half.

A running answer that finds no block takes the blocks of the sequence that arrived last (of those whose blocks
its tenant may have, engine/shares.py); that one goes on, when there is room and before anybody new, from what of it
was set aside or is still cached, within the fidelity that its request allows, and computes the rest anew (under
`exact` its tokens come out the same).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from engine.drafter import worthwhile
from engine.pace import StepPace
from engine.pool import BlockPool
from engine.record_policy import RecordPolicy
from engine.request import Sequence, SequenceStatus, SetAside
from engine.windows import Filling, TakenUp
from kvtransfer.keys import block_key

MIN_CHUNK_TOKENS = 32  # of prompts in every step, whatever answers wait for it
CHUNK_STEP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Of one step: tokens of prompts and guesses; sequences that draw; guesses of each, 0 for none; positions of a
    sequence; and how long answers should wait for it, None for as long as it takes."""

    chunk_tokens: int
    max_sequences: int
    max_drafts: int = 0
    max_context: int = 1 << 30
    itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """Compute positions [start, start + num_tokens) of a sequence; draw a token where `draws`. The last ones are
    guesses, `drafts`, each of which is drawn after, too. `records`: of windows, to be filled on the way."""

    sequence: Sequence
    start: int
    num_tokens: int
    draws: bool
    drafts: tuple[int, ...] = ()
    records: tuple[Filling, ...] = ()

    @property
    def is_answer(self) -> bool:
        """Whether it is one known token, at the end of what is known."""
        return self.draws and self.num_tokens == 1 + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence that gave way, and the blocks and the window slot with what is cached of its first `num_tokens`
    positions, of that fidelity rank, which are whole until the step computes."""

    sequence: Sequence
    blocks: tuple[int, ...]
    slot: int
    num_tokens: int
    rank: int


@dataclass(frozen=True, slots=True)
class BroughtBack:
    """What was set aside of a sequence, from its block number `first_block` on, for these blocks and this slot."""

    kept: SetAside
    first_block: int
    blocks: tuple[int, ...]
    slot: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """A sequence takes up a cached prefix of `num_tokens`: its window slot is to be filled from a record."""

    record: int
    slot: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What a step computes, answers first, what had to give way for it, and what comes back before it computes."""

    rows: list[StepRow] = field(default_factory=list)
    preempted: list[Preempted] = field(default_factory=list)
    brought_back: list[BroughtBack] = field(default_factory=list)
    resumed: list[Resumed] = field(default_factory=list)

    @property
    def num_decode_rows(self) -> int:
        """Answers that go on."""
        return sum(row.is_answer for row in self.rows)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens in those rows, guesses included."""
        return sum(row.num_tokens for row in self.rows if row.is_answer)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens in the other rows."""
        return sum(row.num_tokens for row in self.rows if not row.is_answer)


def owner_of(sequence: Sequence) -> bytes:
    """The pool's name for a sequence: its lease, and for choices after the first the choice too."""
    return choice_owner(sequence.lease_id, sequence.choice)


def choice_owner(lease_id: bytes, choice: int) -> bytes:
    """The pool's name for one choice of a lease."""
    return lease_id if choice == 0 else lease_id + choice.to_bytes(2, "little")


class Scheduler:
    """Holds every sequence that still computes. Not thread-safe; the engine's lock guards it."""

    def __init__(
        self,
        pool: BlockPool,
        limits: StepLimits,
        pace: StepPace | None = None,
        record_policy: RecordPolicy | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self._record_policy = record_policy or RecordPolicy()
        self.pace = pace or StepPace()
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
    def spare_blocks(self) -> int:
        """Blocks that nobody new may take: one for each running answer to grow into, and those that the preempted
        wait for."""
        waiting = (s for s in self._sequences if s.status is SequenceStatus.PREEMPTED)
        return self.num_running + sum(self.pool.blocks_for(s.num_tokens) for s in waiting)

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
        num_drafts = self._plan_drafts(plan)
        self._readmit_preempted(plan)
        self._plan_prompts(plan, min(self.limits.chunk_tokens - num_drafts, self._within_itl(plan)))
        if self.pool.windows is not None:
            plan.rows = [replace(row, records=self._records(row)) for row in plan.rows]
        return plan

    def _plan_answers(self, plan: StepPlan) -> None:
        for sequence in self._sequences:
            if len(plan.rows) == self.limits.max_sequences:
                return
            if (
                sequence.status is not SequenceStatus.RUNNING
                or sequence.num_tokens - sequence.num_computed != 1
            ):
                continue
            if self._make_room(sequence, sequence.num_tokens, plan):
                plan.rows.append(StepRow(sequence, sequence.num_computed, 1, draws=True))

    def _plan_drafts(self, plan: StepPlan) -> int:
        """Lengthen answers by the guesses that pay; returns how many."""
        guesses = [self._guess(row.sequence) for row in plan.rows]
        if not any(guesses):
            return 0
        counts = worthwhile(
            [row.sequence.drafter.hit_rate if row.sequence.drafter else 0.0 for row in plan.rows],
            [len(drafts) for drafts in guesses],
            self.pace.answers_s(len(plan.rows)),
            self.pace.row_s,
            self.limits.chunk_tokens - MIN_CHUNK_TOKENS,
        )
        plan.rows = [
            replace(row, num_tokens=1 + count, drafts=tuple(drafts[:count]))
            for row, drafts, count in zip(plan.rows, guesses, counts, strict=True)
        ]
        return sum(counts)

    def _guess(self, sequence: Sequence) -> list[int]:
        """Guesses that could be kept, and that fit into the blocks which the sequence has."""
        if sequence.drafter is None or sequence.is_head:
            return []
        room_tokens = len(self.pool.blocks(owner_of(sequence))) * self.pool.block_tokens
        end = min(room_tokens, self.limits.max_context)
        left = sequence.sampling.max_tokens - sequence.num_generated - 1
        return sequence.drafter.draft(max(min(self.limits.max_drafts, left, end - sequence.num_tokens), 0))

    def _within_itl(self, plan: StepPlan) -> int:
        """Tokens of prompts for which the step's answers can wait."""
        itl_s = self.limits.itl_s
        if itl_s is None or not plan.rows:
            return self.limits.chunk_tokens
        left_s = itl_s - self.pace.answers_s(plan.num_answer_tokens)
        within = self.pace.prompt_tokens_within(left_s) // CHUNK_STEP_TOKENS * CHUNK_STEP_TOKENS
        return max(within, MIN_CHUNK_TOKENS)

    def _readmit_preempted(self, plan: StepPlan) -> None:
        gave_way = {each.sequence.sequence_id for each in plan.preempted}
        for sequence in self._sequences:
            if sequence.status is SequenceStatus.PREEMPTED and sequence.sequence_id not in gave_way:
                self._readmit(sequence, plan)

    def _plan_prompts(self, plan: StepPlan, budget: int) -> None:
        waiting = [
            s
            for s in self._sequences
            # With one token to go it is an answer: planned above, or in the next step.
            if s.status is SequenceStatus.RUNNING and s.num_tokens - s.num_computed > 1
        ]
        if not waiting:
            return
        passing = []
        if waiting[0].num_tokens - waiting[0].num_computed > budget:
            left = budget // 2
            for sequence in waiting[1:]:
                if sequence.num_tokens - sequence.num_computed <= left:
                    passing.append(sequence)
                    left -= sequence.num_tokens - sequence.num_computed
        for sequence in (*passing, *(s for s in waiting if s not in passing)):
            budget -= self._plan_chunk(sequence, budget, plan)

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """As much of a prompt as the budget has; returns how much."""
        remaining = sequence.num_tokens - sequence.num_computed
        num_tokens = min(remaining, budget)
        end = self.pool.blocks_for(sequence.num_computed + num_tokens)
        if num_tokens <= 0 or not self.pool.grow(owner_of(sequence), end):
            return 0
        draws = num_tokens == remaining
        plan.rows.append(StepRow(sequence, sequence.num_computed, num_tokens, draws))
        return num_tokens

    def _records(self, row: StepRow) -> tuple[Filling, ...]:
        """Of the boundaries that a row reaches, those whose windows are to be kept."""
        sequence, owner = row.sequence, owner_of(row.sequence)
        end, junction = row.start + row.num_tokens, self.pool.junction(owner)
        boundaries = self._record_policy.wanted(
            row.start, end, self.pool.block_tokens, sequence.num_prompt, junction
        )
        fillings = (self.pool.fill_record(owner, boundary) for boundary in boundaries)
        return tuple(filling for filling in fillings if filling is not None)

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
        owner = owner_of(victim)
        blocks = tuple(self.pool.blocks(owner)[: self.pool.blocks_for(victim.num_computed)])
        slot, rank = self.pool.slot(owner), self.pool.rank(owner)
        plan.preempted.append(Preempted(victim, blocks, slot, victim.num_computed, rank))
        self.pool.close(owner)
        victim.num_computed = 0
        victim.status = SequenceStatus.PREEMPTED
        self.num_preemptions += 1
        plan.rows = [row for row in plan.rows if row.sequence is not victim]

    def _readmit(self, sequence: Sequence, plan: StepPlan) -> None:
        """Give a preempted sequence blocks again where enough stay for the answers that run."""
        owner, kept = owner_of(sequence), sequence.set_aside
        keys = self.prefix_keys(sequence.root_key, sequence.tokens)
        num_blocks = self.pool.blocks_for(sequence.num_tokens)
        num_hit = self.pool.open(owner, keys, num_blocks, self.num_running, sequence.bound, sequence.tenant)
        if num_hit is None:
            return
        sequence.status, sequence.set_aside = SequenceStatus.RUNNING, None
        taken_up = self.pool.taken_up(owner)
        sequence.take_up(taken_up)
        if kept is not None and kept.num_tokens > num_hit * self.pool.block_tokens:
            blocks = tuple(self.pool.blocks(owner)[num_hit : self.pool.blocks_for(kept.num_tokens)])
            plan.brought_back.append(BroughtBack(kept, num_hit, blocks, self.pool.slot(owner)))
            self.pool.worsen(owner, kept.rank)
            sequence.take_up(TakenUp(kept.num_tokens))
        elif taken_up.record is not None:
            plan.resumed.append(Resumed(taken_up.record, self.pool.slot(owner), taken_up.num_tokens))

    def computed(self, row: StepRow, num_drafts_kept: int = 0) -> None:
        """Record that a row's positions are in the cache, and key the blocks that it filled. Of its guesses the first
        `num_drafts_kept` are the sequence's tokens by now."""
        sequence = row.sequence
        sequence.num_computed = row.start + row.num_tokens - len(row.drafts) + num_drafts_kept
        self.seal(sequence)
        if row.records:
            self.pool.settle_records(
                owner_of(sequence),
                sequence.num_computed,
                lambda boundary: self._record_policy.supersedes(boundary, sequence.num_prompt),
            )

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
