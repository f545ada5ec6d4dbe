"""Who may take a request, and what it is predicted to cost there: one pass over the workers, compiled.

The formulas are those of `costs`. Tables, figures and what is found are [what, row] in float64: a table as `columns`
lays it out, figures as `costs.Figures` does. A thousand workers take some microseconds; a few take less than one array
operation does.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtransfer.compiled import compiled
from router.core.columns import COLUMNS, Floats, Mask
from router.core.costs import harm_s

Slots = NDArray[np.intp]
Words = NDArray[np.uint64]

(
    _CREDITS, _NUM_SEQUENCES, _REFUSED_UNTIL_S, _TURN_TOKENS, _TOKENS_AHEAD, _NUM_BLOCKS, _MAX_SEQUENCES,
    _BLOCK_TOKENS, _MAX_CONTEXT, _IS_BOTH, _EMPTY_STEP_S, _ROW_S,
) = map(COLUMNS.index, (
    "credits", "num_sequences", "refused_until_s", "turn_tokens", "tokens_ahead", "num_blocks", "max_sequences",
    "block_tokens", "max_context", "is_both", "empty_step_s", "row_s",
))  # fmt: skip

STEP_S, ROW_S, DECODE_S_PER_TOKEN, KV_BYTES, CARRIED_S = range(5)
"""Of decode workers: a step of an empty batch, what a sequence adds to it, a prompt token; and a token's bytes, and
what they take over a link of the mean speed."""
PREFILL_S_PER_TOKEN, LINK_S_PER_BYTE, LINK_FIXED_S = range(3)
"""Of prefill workers; links are those that were not measured."""
NUM_DECODE_FINDINGS, NUM_PREFILL_FINDINGS = 7, 7
NO_WAY: Floats = np.empty((2, 0))
_WORD_BITS = 64

_harm_s = compiled(harm_s, counts_references=False)


def _weigh_decoders(
    table: Floats,
    figures: Floats,
    slots: Slots,
    cached: Floats,
    num_tokens: float,
    num_choices: float,
    max_total_tokens: float,
    now: float,
    landed_row: int,
    ttft_per_itl: float,
    regardless: bool,
    may: Mask,
    found: Floats,
) -> int:
    """How many may decode; `may` by row. `found` gets cost, step, itl, own, carried, and the prompt's tokens that are
    lacking and cached there. `cached` is by slot; to `landed_row` (-1: none) nothing needs to travel."""
    num_may = 0
    for row in range(slots.size):
        credits, size, running = table[_CREDITS, row], table[_NUM_BLOCKS, row], table[_NUM_SEQUENCES, row]
        num_blocks = np.ceil(num_tokens / table[_BLOCK_TOKENS, row]) + num_choices
        fits = table[_MAX_CONTEXT, row] >= max_total_tokens
        if regardless:
            fits = fits and size >= num_blocks and table[_MAX_SEQUENCES, row] >= num_choices
        else:
            fits = (
                fits
                and credits >= num_blocks
                and table[_MAX_SEQUENCES, row] - running >= num_choices
                and table[_REFUSED_UNTIL_S, row] <= now
            )
        may[row] = fits
        num_may += fits
        lacking = num_tokens - cached[slots[row]]
        step_s = figures[STEP_S, row] + figures[ROW_S, row] * (running + num_choices)
        used = 1.0 - (credits - num_blocks) / size
        itl_s = (1.0 + used) * step_s * ttft_per_itl
        own_s = table[_TOKENS_AHEAD, row] * figures[DECODE_S_PER_TOKEN, row]
        carried_s = 0.0 if row == landed_row else lacking * figures[CARRIED_S, row]
        found[0, row] = itl_s + own_s + carried_s
        found[1, row] = step_s
        found[2, row] = itl_s
        found[3, row] = own_s
        found[4, row] = carried_s
        found[5, row] = lacking
        found[6, row] = cached[slots[row]]
    return num_may


def _who_may_prefill(
    table: Floats, slots: Slots, cached: Floats, num_tokens: float, regardless: bool, may: Mask
) -> int:
    """How many may prefill; `may` by row."""
    num_may = 0
    for row in range(slots.size):
        has_turn = regardless or num_tokens - cached[slots[row]] <= table[_TURN_TOKENS, row]
        may[row] = has_turn and table[_MAX_CONTEXT, row] > num_tokens
        num_may += may[row]
    return num_may


def _weigh_prefillers(
    table: Floats,
    figures: Floats,
    slots: Slots,
    cached: Floats,
    way: Floats,
    num_tokens: float,
    num_bytes: float,
    step_s: float,
    itl_s: float,
    slo_itl_s: float,
    found: Floats,
) -> int:
    """The row that would be best if nothing were ahead of the prompt anywhere. `found` gets cost, ttft, queue, what it
    takes with nothing ahead (without the step), compute, transfer and the prompt's tokens cached there, for the decode
    worker whose step and itl are given and which `num_bytes` travel to; `way` is how fast, by slot, below 0 where not
    measured (`links`)."""
    best_row, least_s = 0, np.inf
    for row in range(slots.size):
        slot = slots[row]
        s_per_byte, fixed_s = figures[LINK_S_PER_BYTE, row], figures[LINK_FIXED_S, row]
        if slot < way.shape[1] and way[0, slot] >= 0:
            s_per_byte, fixed_s = way[0, slot], way[1, slot]
        s_per_token = figures[PREFILL_S_PER_TOKEN, row]
        queue_s = table[_TOKENS_AHEAD, row] * s_per_token
        compute_s = (num_tokens - cached[slot]) * s_per_token
        transfer_s = s_per_byte * num_bytes
        alone_s = max(compute_s, transfer_s) + fixed_s
        if alone_s < least_s:
            best_row, least_s = row, alone_s
        ttft_s = queue_s + alone_s + step_s
        cost_s = ttft_s + itl_s
        if table[_IS_BOTH, row]:
            running = table[_NUM_SEQUENCES, row]
            own_step_s = table[_EMPTY_STEP_S, row] + table[_ROW_S, row] * (running + 1.0)
            cost_s += _harm_s(compute_s, own_step_s, running, slo_itl_s)
        found[0, row] = cost_s
        found[1, row] = ttft_s
        found[2, row] = queue_s
        found[3, row] = alone_s
        found[4, row] = compute_s
        found[5, row] = transfer_s
        found[6, row] = cached[slot]
    return best_row


def _lowest(may: Mask, first: Floats, second: Floats, third: Floats, ruled_out: Floats) -> int:
    """The row with the lowest keys among those that may, the next key deciding among equals; -1 if there is none.
    `ruled_out` gets the first key, infinite for those that may not."""
    best_row = -1
    for row in range(may.size):
        ruled_out[row] = first[row] if may[row] else np.inf
        if ruled_out[row] == np.inf:
            continue
        is_lower = best_row < 0 or first[row] < first[best_row]
        if not is_lower and first[row] == first[best_row]:
            is_second_lower = second[row] < second[best_row]
            is_lower = is_second_lower or (second[row] == second[best_row] and third[row] < third[best_row])
        if is_lower:
            best_row = row
    return best_row


def _spread(masks: Words, tokens: Floats, most: float, by_slot: Floats) -> None:
    """`tokens` of each mask, at most so many, to the slots that are its bits; masks lie one after the other."""
    num_words = masks.size // tokens.size
    for number in range(tokens.size):
        for word in range(num_words):
            bits, slot = masks[number * num_words + word], word * _WORD_BITS
            while bits:
                if bits & np.uint64(1):
                    by_slot[slot] = min(tokens[number], most)
                bits >>= np.uint64(1)
                slot += 1


weigh_decoders = compiled(_weigh_decoders, counts_references=False)
who_may_prefill = compiled(_who_may_prefill, counts_references=False)
weigh_prefillers = compiled(_weigh_prefillers, counts_references=False)
lowest = compiled(_lowest, counts_references=False)
spread = compiled(_spread, counts_references=False)


def tokens_by_slot(cached: Sequence[tuple[int, int]], num_slots: int, most: int) -> Floats:
    """How many tokens each worker holds: cached prefixes as (mask of slots, tokens), masks disjoint.

    No number is above `most`; bits of slots that nobody has mean nothing.
    """
    num_words = -(-num_slots // _WORD_BITS)
    by_slot = np.zeros(num_words * _WORD_BITS)
    if cached and num_slots:
        masks, tokens = zip(*cached, strict=True)
        num_bytes = num_words * _WORD_BITS // 8
        try:
            bits = b"".join([mask.to_bytes(num_bytes, "little") for mask in masks])
        except OverflowError:
            known = (1 << num_slots) - 1
            bits = b"".join([(mask & known).to_bytes(num_bytes, "little") for mask in masks])
        spread(np.frombuffer(bits, np.uint64), np.array(tokens, np.float64), float(most), by_slot)
    return by_slot[:num_slots]
