"""What the engine's thread makes of its steps."""

from __future__ import annotations

from typing import cast

import pytest

from engine.events import StepResult
from worker.engine_thread import COLD_STEPS, EngineListener, EngineThread

pytestmark = pytest.mark.unit


def after(*steps: StepResult) -> float:
    thread = EngineThread(lambda: pytest.fail("it is never started"), cast(EngineListener, object()))
    for step in steps:
        thread._count(step)
    return thread.counters.decode_step_s


def decoding(step_s: float, num_prefill_tokens: int = 0) -> StepResult:
    return StepResult(num_decode_rows=1, num_prefill_tokens=num_prefill_tokens, step_s=step_s)


def test_cold_steps_do_not_make_a_worker_look_slow() -> None:
    cold = [decoding(0.6)] * COLD_STEPS
    assert after(*cold) == 0.0
    assert after(*cold, decoding(0.02)) == pytest.approx(0.02)


def test_the_average_follows_steps_that_only_decode() -> None:
    warm = [decoding(0.02)] * (COLD_STEPS + 1)
    assert after(*warm, decoding(5.0, num_prefill_tokens=64)) == pytest.approx(0.02)
    assert 0.02 < after(*warm, decoding(0.04)) < 0.04
