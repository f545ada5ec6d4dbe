"""Which rows of logits draw which tokens: one each, and all of a request's first tokens from its prompt's end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine.request import Drawn
from engine.request import Sequence as EngineSequence
from engine.sampling import SampleFailure, SampleRow, sample
from engine.scheduler import StepRow


def draw(
    logits: np.ndarray, rows: Sequence[StepRow], max_context: int
) -> dict[int, list[Drawn | SampleFailure]]:
    """logits float32 [number of rows, vocabulary] → by sequence id, one token, or for a prompt's end one per choice."""
    sample_rows: list[SampleRow] = []
    sources: list[int] = []
    for index, row in enumerate(rows):
        for choice in _choices(row.sequence):
            sample_rows.append(_sample_row(row.sequence, choice, max_context))
            sources.append(index)
    if len(sources) > len(rows):
        logits = logits[sources]
    drawn: dict[int, list[Drawn | SampleFailure]] = {}
    for source, result in zip(sources, sample(logits, sample_rows), strict=True):
        drawn.setdefault(rows[source].sequence.sequence_id, []).append(result)
    return drawn


def _choices(sequence: EngineSequence) -> Iterable[int]:
    first_token = sequence.choice == 0 and sequence.num_generated == 0
    return range(sequence.sampling.n) if first_token else (sequence.choice,)


def _sample_row(sequence: EngineSequence, choice: int, max_context: int) -> SampleRow:
    return SampleRow(
        params=sequence.sampling,
        tokens=sequence.tokens,
        num_prompt=sequence.num_prompt,
        choice=choice,
        max_tokens_left=max_context - sequence.num_tokens,
    )
