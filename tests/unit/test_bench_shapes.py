"""The shapes' prompts, and what counts as in time."""

from __future__ import annotations

from itertools import islice

import pytest

from bench.replay_load import Asked
from bench.shapes_load import SHAPES, Limits, Seen, Shape, limits_of, mean_gap_s

pytestmark = pytest.mark.unit


def asked(ttft_s: float, *gaps_s: float) -> Asked:
    return Asked((1,), 0, 0, ttft_s, gaps_s, False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_prompts_are_within_their_lengths_and_share_what_they_should(shape: Shape) -> None:
    one, other, again = (list(islice(shape.prompts(seed), 20)) for seed in (1, 2, 1))
    assert one == again
    for prompt in (*one, *other):
        assert shape.shortest <= len(prompt) <= shape.longest
    for prompt, beside in zip(one, other, strict=True):
        num_shared = int(shape.shared_share * min(len(prompt), len(beside)))
        assert prompt[:num_shared] == beside[:num_shared]
        assert prompt[num_shared : num_shared + 20] != beside[num_shared : num_shared + 20]


def test_the_cached_shape_shares_nine_tenths() -> None:
    shape = next(shape for shape in SHAPES if shape.name == "cached")
    one, other = islice(shape.prompts(3), 2)
    assert one[:1350] == other[:1350]
    assert one[1350:1370] != other[1350:1370]


def test_goodput_counts_what_kept_both_limits() -> None:
    limits = Limits(ttft_s=1.0, itl_s=0.1)
    seen = Seen([asked(1.0, 0.1, 0.1), asked(1.1, 0.1), asked(0.5, 0.05, 0.2), asked(0.5)], took_s=4.0)
    assert seen.goodput(limits) == 0.5


def test_limits_are_multiples_of_medians_alone() -> None:
    idle = [asked(1.0, 0.1), asked(3.0, 0.2, 0.4), asked(2.0, 0.2)]
    assert limits_of(idle, 5.0, 3.0) == Limits(10.0, pytest.approx(0.6))
    assert mean_gap_s(asked(1.0)) == 0.0
