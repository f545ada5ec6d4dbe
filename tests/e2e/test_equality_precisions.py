"""Disaggregated = colocated in every precision with itself: two workers, and one engine that computes as they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.engine import Engine, EngineOptions
from headrace import Client
from tests.e2e.conftest import Home
from tests.e2e.test_equality import cluster_answers, colocated_answers
from tests.real_prompts import real_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

PROFILE = """
version: 1
name: precisions
model: {path: smollm2-135m-instruct, precision: PRECISION, max_context: 2048}
prefill: {kv_memory: 256MiB, chunk: 128}
decode: {kv_memory: 256MiB}
router: {grpc: "127.0.0.1:0", policy: least-loaded}  # every prompt is handed over
"""
MOST_TOKENS = 700
EVERY = 3  # of the real prompts


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_answers_equal_the_colocated_engines(smollm2_home: Home, smollm2_dir: Path, precision: str) -> None:
    started = smollm2_home.up(PROFILE.replace("PRECISION", precision))
    assert started.returncode == 0, started.stderr
    with Client(smollm2_home.state().router_address) as client:
        tokens = [client.tokenize(text) for text in real_prompts()[::EVERY]]
        prompts = [prompt for prompt in tokens if len(prompt) <= MOST_TOKENS]
        there = [cluster_answers(client, prompts, seeded=seeded) for seeded in (False, True)]
    options = EngineOptions(
        precision=precision, max_context=2048, kv_bytes=512 << 20, chunk_tokens=256, num_threads=2
    )
    engine = Engine.open(smollm2_dir, options)
    assert engine.invariant
    assert there == [colocated_answers(engine, prompts, seeded=seeded) for seeded in (False, True)]
