"""What steps take is learned from those that were."""

from __future__ import annotations

import random

import pytest

from engine.pace import StepPace

pytestmark = pytest.mark.unit


def test_nothing_is_known_before_a_step() -> None:
    pace = StepPace()
    assert (pace.answers_s(3), pace.row_s, pace.prompt_tokens_within(1.0)) == (0.0, 0.0, 0)


def test_rows_lie_on_a_line_whatever_the_noise() -> None:
    pace, rng = StepPace(), random.Random(1)
    for _ in range(400):
        rows = rng.randrange(1, 20)
        pace.observe(rows, 0, (0.010 + 0.001 * rows) * rng.uniform(0.8, 1.2))
    assert pace.row_s == pytest.approx(0.001, rel=0.35)
    assert pace.answers_s(10) == pytest.approx(0.020, rel=0.15)


def test_a_row_more_is_taken_to_be_cheap_until_one_was_tried() -> None:
    pace = StepPace()
    for _ in range(50):
        pace.observe(1, 0, 0.010)
    assert 0 < pace.row_s < 0.002
    for _ in range(50):  # trying shows that it is not
        pace.observe(1, 0, 0.010)
        pace.observe(5, 0, 0.050)
    assert pace.row_s > 0.009


def test_a_row_never_costs_more_than_a_step_of_one() -> None:
    pace = StepPace()
    pace.observe(1, 0, 0.001)
    pace.observe(2, 0, 1.0)
    assert pace.row_s <= pace.answers_s(2) / 2 + 1e-9


def test_prompts_take_what_a_step_took_beyond_its_answers() -> None:
    pace = StepPace()
    for _ in range(20):
        pace.observe(4, 0, 0.020)
    for _ in range(20):
        pace.observe(4, 100, 0.020 + 0.100)
    assert pace.prompt_tokens_within(0.050) == pytest.approx(50, abs=5)
    assert pace.prompt_tokens_within(-1.0) == 0


def test_it_forgets() -> None:
    pace = StepPace()
    for _ in range(100):
        pace.observe(2, 0, 1.0)
    for _ in range(300):
        pace.observe(2, 0, 0.010)
    assert pace.answers_s(2) == pytest.approx(0.010, rel=0.3)


def test_of_a_step_with_answers_in_it_prompts_took_the_rest() -> None:
    pace = StepPace()
    assert pace.observe(0, 100, 0.2) == 0.2
    assert pace.observe(4, 100, 0.2) == 0.0  # nobody knows what its answers took
    assert pace.observe(4, 0, 0.2) == 0.0
    for rows in (1, 4) * 50:
        pace.observe(rows, 0, 0.01 * rows)
    assert pace.observe(4, 100, 0.2) == pytest.approx(0.16, rel=0.05)
    assert pace.observe(4, 100, 0.001) == 0.0
