"""Which rows of logits draw which tokens: an answer's next one and those after the guesses that it confirms, and all
of a request's first tokens from its prompt's end.

A token is drawn from its own logits with its own key, whether its position was computed alone or behind guesses; the
guess after it counts only if it is that token. So an answer is the same with guesses and without (exact-match
verification; Leviathan et al., arXiv:2211.17192, draw otherwise and keep the distribution alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.request import Drawn
from engine.request import Sequence as EngineSequence
from engine.sampling import SampleFailure, SampleRow, sample
from engine.scheduler import StepRow

Result = Drawn | SampleFailure


def draw(logits: np.ndarray, rows: Sequence[StepRow], max_context: int) -> dict[int, list[Result]]:
    """logits float32 [draws of all rows, vocabulary] → by sequence id: of an answer its tokens in order, the last one
    the first that was not guessed; of a prompt's end one per choice."""
    drawn: dict[int, list[Result]] = {}
    at = 0
    for row in rows:
        end = at + 1 + len(row.drafts)
        drawn[row.sequence.sequence_id] = _draw_row(logits[at:end], row, max_context)
        at = end
    return drawn


def _draw_row(logits: np.ndarray, row: StepRow, max_context: int) -> list[Result]:
    sequence = row.sequence
    if sequence.is_head:
        choices = range(sequence.sampling.n)
        samples = [_sample_row(sequence, sequence.tokens, choice, max_context) for choice in choices]
        return sample(np.repeat(logits, len(choices), axis=0), samples)
    results: list[Result] = []
    tokens = sequence.tokens
    for number in range(1 + len(row.drafts)):
        if number:
            tokens = [*tokens, row.drafts[number - 1]]
        sample_row = _sample_row(sequence, tokens, sequence.choice, max_context)
        results += sample(logits[number : number + 1], [sample_row])
        last = results[-1]
        if not isinstance(last, Drawn) or last.finish is not None:
            break
        if number < len(row.drafts) and last.token_id != row.drafts[number]:
            break
    return results


def _sample_row(sequence: EngineSequence, tokens: Sequence[int], choice: int, max_context: int) -> SampleRow:
    return SampleRow(
        params=sequence.sampling,
        tokens=tokens,
        num_prompt=sequence.num_prompt,
        choice=choice,
        max_tokens_left=max_context - len(tokens),
    )
