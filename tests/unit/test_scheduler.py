"""The scheduler computes every position of every sequence once it has room, answers first."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafter import Drafter
from engine.pool import BlockPool
from engine.request import SamplingParams, Sequence, SequenceStatus
from engine.scheduler import Scheduler, StepLimits, StepPlan, owner_of

pytestmark = pytest.mark.unit

BLOCK = 4


@dataclass(frozen=True)
class Kept:
    """An engine.request.SetAside without its planes."""

    num_tokens: int
    rank: int


def make(
    num_blocks: int, chunk_tokens: int = 8, max_sequences: int = 8, tenant_share: float = 1.0
) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK, tenant_share), StepLimits(chunk_tokens, max_sequences))


def admit(
    scheduler: Scheduler, name: str, num_prompt: int, seed: int = 0, bound: int = 0, tenant: str = ""
) -> Sequence:
    rng = random.Random(seed)
    tokens = [rng.randrange(100) for _ in range(num_prompt)]
    sequence = Sequence(
        0,
        name.encode(),
        0,
        tokens,
        num_prompt,
        SamplingParams(),
        root_key=b"root",
        bound=bound,
        tenant=tenant,
    )
    keys = scheduler.prefix_keys(b"root", tokens)
    num_blocks = scheduler.pool.blocks_for(num_prompt + 1)
    hit = scheduler.pool.open(owner_of(sequence), keys, num_blocks, bound=bound, tenant=tenant)
    assert hit is not None
    sequence.num_computed = hit * BLOCK
    scheduler.add(sequence)
    return sequence


def run(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the engine does with a plan, drawing a token that depends on the position alone."""
    for row in plan.rows:
        scheduler.computed(row)
        if row.draws:
            row.sequence.tokens.append(row.sequence.num_tokens % 97)


def rows(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(row.sequence.lease_id.decode(), row.start, row.num_tokens) for row in plan.rows]


def test_a_prompt_is_cut_into_chunks_and_draws_at_its_end() -> None:
    scheduler = make(8)
    admit(scheduler, "a", 13)
    first = scheduler.schedule()
    run(scheduler, first)
    second = scheduler.schedule()
    assert rows(first) == [("a", 0, 8)]
    assert rows(second) == [("a", 8, 5)]
    assert [row.draws for row in (*first.rows, *second.rows)] == [False, True]


def test_answers_go_before_prompts_and_do_not_eat_their_budget() -> None:
    scheduler = make(16)
    admit(scheduler, "a", 3)
    run(scheduler, scheduler.schedule())
    admit(scheduler, "b", 20, seed=1)
    assert rows(scheduler.schedule()) == [("a", 3, 1), ("b", 0, 8)]


def test_short_prompts_share_a_chunk_in_order_of_arrival() -> None:
    scheduler = make(16)
    for index, name in enumerate("abc"):
        admit(scheduler, name, 3, seed=index)
    assert rows(scheduler.schedule()) == [("a", 0, 3), ("b", 0, 3), ("c", 0, 2)]


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    scheduler = make(16)
    first = admit(scheduler, "a", 9, seed=5)
    run(scheduler, scheduler.schedule())
    run(scheduler, scheduler.schedule())
    scheduler.remove(first, SequenceStatus.FINISHED)
    scheduler.pool.close(owner_of(first))
    again = admit(scheduler, "b", 8, seed=5)
    assert again.num_computed == 4
    assert rows(scheduler.schedule()) == [("b", 4, 4)]


def test_an_answer_without_room_takes_the_last_arrivals_blocks() -> None:
    scheduler = make(4)
    older = admit(scheduler, "a", 7)
    run(scheduler, scheduler.schedule())
    newer = admit(scheduler, "b", 6, seed=1)
    run(scheduler, scheduler.schedule())
    while newer.status is SequenceStatus.RUNNING:
        run(scheduler, scheduler.schedule())
    assert older.status is SequenceStatus.RUNNING
    assert newer.status is SequenceStatus.PREEMPTED
    assert newer.num_computed == 0
    assert scheduler.num_preemptions == 1
    scheduler.remove(older, SequenceStatus.FINISHED)
    scheduler.pool.close(owner_of(older))
    assert [row.sequence for row in scheduler.schedule().rows] == [newer]


@pytest.mark.parametrize(("bound", "resumes_at", "rank"), [(0, 0, 0), (1, 4, 1)])
def test_a_preempted_sequence_comes_back_within_its_bound(bound: int, resumes_at: int, rank: int) -> None:
    scheduler = make(8)
    sequence = admit(scheduler, "a", 6, bound=bound)
    run(scheduler, scheduler.schedule())
    scheduler.pool.close(owner_of(sequence), forget=True)
    sequence.num_computed, sequence.status = 0, SequenceStatus.PREEMPTED
    scheduler.pool.open(b"landed", [], 1)
    scheduler.pool.worsen(b"landed", 1)
    scheduler.pool.seal(b"landed", scheduler.prefix_keys(b"root", sequence.tokens)[0])
    assert rows(scheduler.schedule())[0] == ("a", resumes_at, 7 - resumes_at)
    assert scheduler.pool.rank(owner_of(sequence)) == rank


def test_a_tenant_at_its_share_makes_room_among_its_own() -> None:
    scheduler = make(8, tenant_share=0.5)
    first, second = (admit(scheduler, f"red{i}", 6, seed=i, tenant="red") for i in range(2))
    other = admit(scheduler, "green", 14, seed=2, tenant="green")
    while second.status is SequenceStatus.RUNNING:
        run(scheduler, scheduler.schedule())
    assert scheduler.num_preemptions == 1
    assert [first.status, other.status] == [SequenceStatus.RUNNING] * 2


def drafting(scheduler: Scheduler, sequence: Sequence) -> Drafter:
    """Give a sequence a drafter that expects its tokens to go on 0, 1, 2, 0, 1, 2, …"""
    sequence.tokens += [0, 1, 2] * 4
    scheduler.pool.grow(owner_of(sequence), scheduler.pool.blocks_for(sequence.num_tokens + 3))
    sequence.num_computed = sequence.num_tokens - 1
    scheduler.seal(sequence)
    sequence.drafter = Drafter(sequence.tokens)
    return sequence.drafter


def with_drafts(**limits: int) -> Scheduler:
    scheduler = Scheduler(
        BlockPool(32, BLOCK),
        StepLimits(**{"chunk_tokens": 64, "max_sequences": 8, "max_drafts": 6, **limits}),
    )
    for num_rows in (1, 7):  # a row more costs nothing
        scheduler.pace.observe(num_rows, 0, 1.0)
    return scheduler


def test_guesses_lengthen_an_answer_as_far_as_its_blocks_reach() -> None:
    scheduler = with_drafts()
    sequence = admit(scheduler, "a", 3)
    sequence.sampling = SamplingParams(max_tokens=100)
    drafting(scheduler, sequence)
    (row,) = scheduler.schedule().rows
    room = len(scheduler.pool.blocks(b"a")) * BLOCK - sequence.num_tokens
    assert row.drafts == (0, 1, 2, 0, 1, 2)[:room]
    assert (row.start, row.num_tokens, row.is_answer) == (sequence.num_computed, 1 + room, True)
    sequence.tokens += [0, 9]
    scheduler.computed(row, num_drafts_kept=1)
    assert sequence.num_computed == sequence.num_tokens - 1
    assert len(scheduler.pool.keys(b"a")) == sequence.num_computed // BLOCK


@pytest.mark.parametrize("limits", [{"max_context": 16}, {"max_drafts": 1}, {"chunk_tokens": 33}])
def test_guesses_stay_within_every_limit(limits: dict[str, int]) -> None:
    scheduler = with_drafts(**limits)
    sequence = admit(scheduler, "a", 3)
    sequence.sampling = SamplingParams(max_tokens=100)
    drafting(scheduler, sequence)
    (row,) = scheduler.schedule().rows
    assert len(row.drafts) == 1


def test_an_answer_that_ends_with_the_next_token_gets_no_guesses() -> None:
    scheduler = with_drafts()
    sequence = admit(scheduler, "a", 3)
    sequence.sampling = SamplingParams(max_tokens=13)
    drafting(scheduler, sequence)
    assert scheduler.schedule().rows[0].drafts == ()


def test_prompts_have_what_guesses_leave_of_the_budget() -> None:
    scheduler = with_drafts(chunk_tokens=40)
    sequence = admit(scheduler, "a", 3)
    sequence.sampling = SamplingParams(max_tokens=100)
    drafting(scheduler, sequence)
    admit(scheduler, "b", 60, seed=1)
    answer, prompt = scheduler.schedule().rows
    assert answer.drafts
    assert prompt.num_tokens == 40 - len(answer.drafts)


def test_chunks_beside_answers_are_as_long_as_these_can_wait() -> None:
    limits = StepLimits(chunk_tokens=512, max_sequences=8, itl_s=0.1)
    scheduler = Scheduler(BlockPool(1024, BLOCK), limits)
    answer = admit(scheduler, "a", 3)
    run(scheduler, scheduler.schedule())
    admit(scheduler, "b", 3000, seed=1)
    assert rows(scheduler.schedule())[1] == ("b", 0, 32)  # nothing is known of prompts yet
    scheduler.pace.observe(1, 0, 0.020)
    scheduler.pace.observe(1, 100, 0.020 + 0.050)
    assert rows(scheduler.schedule())[1] == ("b", 0, 160)  # 80 ms at 2,000 tokens/s
    for _ in range(20):
        scheduler.pace.observe(1, 100, 5.0)
    assert rows(scheduler.schedule())[1] == ("b", 0, 32)  # never nothing
    scheduler.remove(answer, SequenceStatus.FINISHED)
    assert rows(scheduler.schedule()) == [("b", 0, 512)]


def test_short_prompts_pass_a_long_one_that_keeps_half_of_every_chunk() -> None:
    scheduler = Scheduler(BlockPool(256, BLOCK), StepLimits(chunk_tokens=16, max_sequences=64))
    long = admit(scheduler, "long", 160)
    names = iter(range(100))
    for _ in range(20):
        while sum(s.num_tokens - s.num_computed for s in scheduler.sequences if s is not long) < 24:
            admit(scheduler, f"s{(number := next(names))}", 5, seed=number)
        before = long.num_computed
        plan = scheduler.schedule()
        of_long = sum(row.num_tokens for row in plan.rows if row.sequence is long)
        assert of_long >= min(8, long.num_tokens - long.num_computed)
        assert sum(row.num_tokens for row in plan.rows) <= 16
        assert any(row.sequence is not long and row.draws for row in plan.rows)
        run(scheduler, plan)
        assert long.num_computed == before + of_long
        for sequence in [s for s in scheduler.sequences if s is not long and s.num_generated]:
            scheduler.remove(sequence, SequenceStatus.FINISHED)
            scheduler.pool.close(owner_of(sequence))
        if long.num_generated:
            break
    assert long.num_generated == 1


def test_what_was_set_aside_comes_back_behind_what_is_still_cached() -> None:
    scheduler = make(6)
    older, newer = admit(scheduler, "a", 10), admit(scheduler, "b", 9, seed=1)
    gave_way = []
    while not gave_way:
        plan = scheduler.schedule()
        gave_way = plan.preempted
        run(scheduler, plan)
    (preempted,) = gave_way
    assert preempted.sequence is newer
    assert preempted.num_tokens == newer.num_tokens - 1
    assert len(preempted.blocks) == scheduler.pool.blocks_for(preempted.num_tokens)
    newer.set_aside = Kept(preempted.num_tokens, rank=2)
    assert scheduler.spare_blocks == 1 + scheduler.pool.blocks_for(newer.num_tokens)
    scheduler.remove(older, SequenceStatus.FINISHED)
    scheduler.pool.close(owner_of(older))
    plan = scheduler.schedule()
    (back,) = plan.brought_back
    assert back.blocks == tuple(scheduler.pool.blocks(b"b")[back.first_block : len(preempted.blocks)])
    assert scheduler.pool.rank(b"b") == 2
    assert newer.set_aside is None
    run(scheduler, scheduler.schedule())  # as an answer, from the next step on
    assert newer.num_computed == newer.num_tokens - 1


def test_a_prompt_that_is_pushed_elsewhere_keeps_its_blocks() -> None:
    scheduler = make(3, chunk_tokens=4)
    answer = admit(scheduler, "a", 3)
    run(scheduler, scheduler.schedule())
    prompt = admit(scheduler, "b", 6, seed=1)
    prompt.prefill_only = True
    while answer.status is SequenceStatus.RUNNING:
        run(scheduler, scheduler.schedule())
    assert prompt.status is SequenceStatus.RUNNING


@settings(max_examples=80, deadline=None)
@given(
    num_blocks=st.integers(4, 12),
    arrivals=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 6)), min_size=1, max_size=6),
    chunk_tokens=st.integers(1, 9),
    divided=st.booleans(),
)
def test_every_sequence_ends_whatever_is_preempted(
    num_blocks: int, arrivals: list[tuple[int, int]], chunk_tokens: int, divided: bool
) -> None:
    # A share holds the longest sequence here: 17 tokens, and the block to grow into.
    scheduler = (
        make(num_blocks + 7, chunk_tokens, tenant_share=0.5) if divided else make(num_blocks, chunk_tokens)
    )
    waiting = [(f"s{i}", prompt, answer) for i, (prompt, answer) in enumerate(arrivals)]
    ends: dict[str, int] = {}
    alive: list[Sequence] = []
    for _ in range(800):
        tenant = ("red", "green", "blue")[len(waiting) % 3]
        if waiting and scheduler.pool.room(tenant) > scheduler.pool.blocks_for(waiting[0][1] + 1):
            name, num_prompt, num_answer = waiting.pop(0)
            ends[name] = num_prompt + num_answer
            alive.append(admit(scheduler, name, num_prompt, seed=len(waiting), tenant=tenant))
        plan = scheduler.schedule()
        assert sum(row.num_tokens for row in plan.rows if row.num_tokens > 1) <= chunk_tokens
        run(scheduler, plan)
        scheduler.pool.check()
        for sequence in [s for s in alive if s.num_tokens >= ends[s.lease_id.decode()]]:
            alive.remove(sequence)
            scheduler.remove(sequence, SequenceStatus.FINISHED)
            if scheduler.pool.owns(owner_of(sequence)):
                scheduler.pool.close(owner_of(sequence))
        if not waiting and not alive:
            break
    assert not waiting
    assert not alive
    assert scheduler.pool.stats().private == 0
    assert scheduler.pool.stats().pins == 0
