"""Prompts of an exact length, each different from its first token on, so that no prefix cache helps."""

from __future__ import annotations

import random


def distinct_prompt(num_tokens: int, seed: int, vocab_size: int = 40_000) -> list[int]:
    """`num_tokens` token ids drawn by `seed`. Ids below 1,000 are left out: special tokens lie there."""
    rng = random.Random(seed)
    return [rng.randrange(1_000, vocab_size) for _ in range(num_tokens)]
