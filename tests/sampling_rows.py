"""Rows of logits and what is drawn from them, for tests of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.request import Drawn, SamplingParams
from engine.sampling import SampleFailure, SampleRow, sample

Logits = npt.NDArray[np.float32]


def make_row(
    tokens: Sequence[int] = (1, 2),
    num_prompt: int | None = None,
    choice: int = 0,
    left: int = 99,
    **params: Any,
) -> SampleRow:
    return SampleRow(
        params=SamplingParams(**{"max_tokens": 99, **params}),
        tokens=tokens,
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        choice=choice,
        max_tokens_left=left,
    )


def draw(logits: Logits, row: SampleRow) -> Drawn:
    (result,) = sample(logits[None], [row])
    assert isinstance(result, Drawn)
    return result


def failure(logits: Logits, row: SampleRow) -> SampleFailure:
    (result,) = sample(logits[None], [row])
    assert isinstance(result, SampleFailure)
    return result


def draws(logits: Logits, count: int, **row: Any) -> list[int]:
    """Tokens drawn from the same logits with `count` different seeds."""
    rows = [make_row(**(row | {"seed": seed})) for seed in range(count)]
    results = sample(np.repeat(logits[None], count, axis=0), rows)
    return [result.token_id for result in results if isinstance(result, Drawn)]


def random_logits(num_rows: int, vocabulary: int, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocabulary)) * 3).astype(np.float32)
