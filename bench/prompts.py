"""What benchmarks ask: tokens drawn at random, so that no prefix cache helps, and a text that people wrote."""

from __future__ import annotations

import random
from pydoc_data.topics import topics


def distinct_prompt(num_tokens: int, seed: int, vocab_size: int = 40_000) -> list[int]:
    """`num_tokens` token ids drawn by `seed`. Ids below 1,000 are left out: special tokens lie there."""
    rng = random.Random(seed)
    return [rng.randrange(1_000, vocab_size) for _ in range(num_tokens)]


def documentation() -> str:
    """The English that every Python installation carries, half a megabyte of it."""
    return "\n\n".join(topics[name] for name in sorted(topics))
