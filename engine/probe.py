"""Does the numeric contract (design §3.7) hold on this machine, with this build and these threads?

Computes one sequence whole, and again cut into chunks and single tokens beside another sequence, and compares
keys, values and logits bit for bit. Run at start, it doubles as the warm-up. It can show that the contract is
broken; that it holds for every shape is what the test suite adds.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from engine.request import SamplingParams, Sequence
from engine.runner import PROBE_TOKENS, ModelRunner
from engine.scheduler import StepPlan, StepRow, owner_of
from kvtransfer.layouts import pieces_for

_WHOLE, _CUT, _BESIDE = b"probe-whole", b"probe-cut", b"probe-beside"


def is_invariant(runner: ModelRunner) -> bool:
    """True where the same sequence gave the same bits both ways. Leaves the pool as it found it."""
    room_tokens = min(runner.max_context - 1, (runner.pool.num_blocks - 1) * runner.pool.block_tokens)
    num_tokens = min(PROBE_TOKENS, room_tokens)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, runner.config.vocab_size, num_tokens).tolist()
    whole = _run(runner, _WHOLE, tokens, [num_tokens])
    cut = _run(runner, _CUT, tokens, _cuts(num_tokens))
    return all(np.array_equal(one, other, equal_nan=True) for one, other in zip(whole, cut, strict=True))


def _cuts(num_tokens: int) -> list[int]:
    singles = min(3, num_tokens)
    first = min(17, num_tokens - singles)
    second = (num_tokens - singles - first) // 2
    rest = num_tokens - singles - first - second
    return [size for size in (first, second, rest) if size] + [1] * singles


def _run(runner: ModelRunner, owner: bytes, tokens: list[int], sizes: Rows[int]) -> list[np.ndarray]:
    """KV of every piece and the last logits of `tokens` computed in steps of `sizes`."""
    sequence = _sequence(owner, tokens)
    beside = _sequence(_BESIDE, tokens[:1])
    opened = [s for s in (sequence, beside) if s is sequence or len(sizes) > 1]
    for each in opened:
        runner.pool.open(owner_of(each), [], runner.pool.blocks_for(each.num_tokens))
    logits = np.empty(0, dtype=np.float32)
    start = 0
    for size in sizes:
        rows = [StepRow(sequence, start, size, draws=True)]
        if size == 1:
            rows.insert(0, StepRow(beside, 0, 1, draws=True))
        batch = runner.build(StepPlan(rows))
        logits = runner.forward(batch)[[row.sequence for row in batch.drawing].index(sequence)]
        start += size
    pieces = pieces_for(runner.layout, range(len(tokens)))
    bits = [runner.cache.gather(owner, p, runner.layout.plane(p.plane)).cpu().numpy() for p in pieces]
    for each in opened:
        runner.cache.scrub(runner.pool.close(owner_of(each)))
    return [*bits, logits]


def _sequence(owner: bytes, tokens: list[int]) -> Sequence:
    return Sequence(
        sequence_id=-1,
        lease_id=owner,
        choice=0,
        tokens=tokens,
        num_prompt=len(tokens),
        sampling=SamplingParams(),
    )
