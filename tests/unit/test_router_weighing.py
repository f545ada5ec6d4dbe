"""The compiled loops against the formulas of `router/core/costs.py`, worker by worker in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.columns import WorkerTable
from router.core.costs import CostModel, figures_of
from router.core.fleet import Identity, Role, Worker, WorkerFacts, WorkerRef
from router.core.weighing import (
    NO_WAY,
    NUM_DECODE_FINDINGS,
    NUM_PREFILL_FINDINGS,
    lowest,
    weigh_decoders,
    weigh_prefillers,
    who_may_prefill,
)

pytestmark = pytest.mark.unit

IDENTITY = Identity(weights_digest="w", tokenizer_digest="t", arithmetic="a", layout="l", handoff_major=1)
WINDOW = 1024
MODEL = CostModel(2.0, 0.1)


@st.composite
def worker(draw: st.DrawFn, slot: int, role: Role) -> Worker:
    facts = WorkerFacts(
        ref=WorkerRef(f"w{slot}", slot),
        role=role,
        identity=IDENTITY,
        block_tokens=draw(st.sampled_from([16, 64])),
        num_blocks=draw(st.integers(1, 100)),
        max_sequences=draw(st.integers(1, 8)),
        max_context=draw(st.integers(100, 2000)),
        kv_bytes_per_token=draw(st.integers(0, 1 << 16)),
    )
    return Worker(
        facts,
        slot=slot,
        free_blocks=draw(st.integers(0, facts.num_blocks)),
        charged_blocks=draw(st.integers(0, 20)),
        charged_sequences=draw(st.integers(0, 8)),
        prefill_prompts=draw(st.integers(0, 4)),
        prefill_tokens=draw(st.integers(0, 2000)),
        refused_until_s=draw(st.sampled_from([0.0, 5.0])),
        empty_step_s=draw(st.floats(0.001, 0.1)),
        row_s=draw(st.floats(0.0, 0.01)),
        prefill_s_per_token=draw(st.floats(1e-5, 1e-2)),
        link_s_per_byte=draw(st.floats(1e-10, 1e-8)),
        link_fixed_s=draw(st.floats(0.0, 0.01)),
    )


@st.composite
def fleets(draw: st.DrawFn) -> tuple[WorkerTable, WorkerTable, np.ndarray]:
    """Decode workers, prefill workers (some do both), and the tokens cached by slot."""
    decoders, prefillers = WorkerTable(WINDOW), WorkerTable(WINDOW)
    roles = [
        Role.DECODE,
        Role.PREFILL,
        *draw(st.lists(st.sampled_from([Role.DECODE, Role.PREFILL, Role.BOTH]), max_size=5)),
    ]
    for slot, role in enumerate(roles):
        each = draw(worker(slot, role))
        if role is not Role.PREFILL:
            decoders.add(each)
        if role is not Role.DECODE:
            prefillers.add(each)
    cached = np.array(draw(st.lists(st.integers(0, 90), min_size=len(roles), max_size=len(roles))), float)
    return decoders, prefillers, cached


@settings(deadline=None)  # the first call compiles
@given(
    fleet=fleets(),
    num_tokens=st.integers(91, 1500),
    num_choices=st.integers(1, 3),
    landed_row=st.integers(-1, 1),
    regardless=st.booleans(),
)
def test_decode_workers_cost_what_the_formulas_say(fleet, num_tokens, num_choices, landed_row, regardless):
    table, prefillers, cached = fleet
    figures = figures_of(table, prefillers, 0)
    may = np.empty(len(table), np.bool_)
    found = np.empty((NUM_DECODE_FINDINGS, len(table)))
    num_may = weigh_decoders(
        table.rows, figures.decode, table.slots, cached, num_tokens, num_choices, num_tokens + 10, 1.0,
        landed_row, MODEL.ttft_per_itl, regardless, may, found,
    )  # fmt: skip
    assert num_may == may.sum()
    mean_s_per_byte = np.mean([each.link_s_per_byte for each in prefillers.workers])
    for row, each in enumerate(table.workers):
        facts = each.facts
        num_blocks = math.ceil(num_tokens / facts.block_tokens) + num_choices
        lacking = num_tokens - cached[each.slot]
        step_s = each.empty_step_s + each.row_s * (each.num_sequences + num_choices)
        used = 1 - (each.credits - num_blocks) / facts.num_blocks
        itl_s = step_s * (1 + used) * MODEL.slo_ttft_s / MODEL.slo_itl_s
        own_s = each.tokens_ahead * figures.decode[2, row]
        carried_s = 0.0 if row == landed_row else lacking * figures.decode[3, row] * mean_s_per_byte
        expected = [itl_s + own_s + carried_s, step_s, itl_s, own_s, carried_s, lacking, cached[each.slot]]
        assert found[:, row].tolist() == pytest.approx(expected)
        fits = facts.max_context >= num_tokens + 10
        if regardless:
            fits = fits and facts.num_blocks >= num_blocks and facts.max_sequences >= num_choices
        else:
            fits = fits and each.credits >= num_blocks and each.refused_until_s <= 1.0
            fits = fits and facts.max_sequences - each.num_sequences >= num_choices
        assert may[row] == fits


@settings(deadline=None)  # the first call compiles
@given(
    fleet=fleets(),
    num_tokens=st.integers(91, 1500),
    num_bytes=st.floats(0, 1e8),
    measured=st.lists(st.booleans(), max_size=7),
)
def test_prefill_workers_cost_what_the_formulas_say(fleet, num_tokens, num_bytes, measured):
    decoders, table, cached = fleet
    figures = figures_of(decoders, table, 0)
    step_s, itl_s = 0.02, 0.4
    way = NO_WAY
    if measured:
        way = np.array([[2e-9 if is_measured else -1.0 for is_measured in measured]] * 2)
    found = np.empty((NUM_PREFILL_FINDINGS, len(table)))
    best = weigh_prefillers(
        table.rows, figures.prefill, table.slots, cached, way, num_tokens, num_bytes, step_s, itl_s,
        MODEL.slo_itl_s, found,
    )  # fmt: skip
    alone = []
    for row, each in enumerate(table.workers):
        is_measured = each.slot < len(measured) and measured[each.slot]
        s_per_byte = 2e-9 if is_measured else each.link_s_per_byte
        fixed_s = 2e-9 if is_measured else each.link_fixed_s
        queue_s = each.tokens_ahead * figures.prefill[0, row]
        compute_s = (num_tokens - cached[each.slot]) * figures.prefill[0, row]
        alone.append(max(compute_s, s_per_byte * num_bytes) + fixed_s)
        ttft_s = queue_s + alone[-1] + step_s
        harm_s = 0.0
        if each.facts.role is Role.BOTH:
            own_step_s = each.empty_step_s + each.row_s * (each.num_sequences + 1)
            harm_s = MODEL.harm_s(compute_s, own_step_s, float(each.num_sequences))
        expected = [
            ttft_s + itl_s + harm_s, ttft_s, queue_s, alone[-1], compute_s, s_per_byte * num_bytes,
            cached[each.slot],
        ]  # fmt: skip
        assert found[:, row].tolist() == pytest.approx(expected)
    assert alone[best] == pytest.approx(min(alone))


@settings(deadline=None)  # the first call compiles
@given(fleet=fleets(), num_tokens=st.integers(91, 2500), regardless=st.booleans())
def test_who_may_prefill_has_a_turn_for_what_is_lacking_and_context_for_all(fleet, num_tokens, regardless):
    _, table, cached = fleet
    may = np.empty(len(table), np.bool_)
    assert who_may_prefill(table.rows, table.slots, cached, num_tokens, regardless, may) == may.sum()
    for row, each in enumerate(table.workers):
        has_turn = each.prefill_prompts < 2 or num_tokens - cached[each.slot] <= WINDOW - each.prefill_tokens
        assert may[row] == ((regardless or has_turn) and each.facts.max_context > num_tokens)


KEY = st.sampled_from([0.0, 1.0, 2.0, math.inf])


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.tuples(st.booleans(), KEY, KEY, KEY), max_size=30))
def test_the_lowest_is_that_of_the_tuples_and_among_equals_the_first(rows):
    may, *keys = (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.empty(0)] * 4
    ruled_out = np.empty(len(rows))
    row = lowest(may.astype(np.bool_), *(key.astype(np.float64) for key in keys), ruled_out)
    allowed = {place: row[1:] for place, row in enumerate(rows) if row[0] and row[1] < math.inf}
    assert row == (min(allowed, key=allowed.__getitem__) if allowed else -1)
    assert ruled_out.tolist() == [first if may else math.inf for may, first, _, _ in rows]
