"""Requests of many kinds, for tests that compute them in two ways and expect the same."""

from __future__ import annotations

import random

from engine.request import SamplingParams


def prompts(count: int, seed: int, longest: int = 700) -> list[list[int]]:
    """Random prompts of many lengths; every third shares a long prefix with the first of its kind."""
    rng = random.Random(seed)
    shared = [rng.randrange(4, 270) for _ in range(300)]
    made = []
    for index in range(count):
        length = rng.choice([1, 2, 5, 17, 63, 64, 65, 130, 255, 256, 257, rng.randrange(1, longest)])
        tokens = [rng.randrange(4, 270) for _ in range(length)]
        made.append(shared[: rng.randrange(100, 300)] + tokens[:50] if index % 3 == 0 else tokens)
    return made


def samplings(count: int) -> list[SamplingParams]:
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=90),
        SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=80),
        SamplingParams(temperature=1.1, top_k=20, min_p=0.01, seed=12, max_tokens=30, repetition_penalty=1.1),
        SamplingParams(temperature=0.7, seed=13, max_tokens=70, n=3, frequency_penalty=0.4),
    ]
    return [kinds[index % len(kinds)] for index in range(count)]
