"""The project's conscience: disaggregated = colocated, token for token, on a real model and a real cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.engine import Engine, EngineOptions
from engine.request import SamplingParams
from headrace import Client
from tests.engine_driver import Driver
from tests.real_prompts import real_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ANSWER_TOKENS = 24
CONCURRENCY = 8
TOLERANCE = 1e-3  # of a logit: below it the reference's own summation order decides


class Extent(NamedTuple):
    """How much of the prompts: those of at most so many tokens; every so manieth of them seeded, and beside the
    reference."""

    max_tokens: int
    every: int


SHORT = Extent(500, 3)  # the longest prompts take longer than all the others
WHOLE = Extent(4000, 1)


@pytest.fixture(
    scope="module",
    params=[pytest.param(SHORT, id="short"), pytest.param(WHOLE, id="whole", marks=pytest.mark.slow)],
)
def extent(request: pytest.FixtureRequest) -> Extent:
    found: Extent = request.param
    return found


@pytest.fixture(scope="module")
def prompts(extent: Extent, laptop_address: str) -> list[list[int]]:
    with Client(laptop_address) as client:
        tokens = [client.tokenize(text) for text in real_prompts()]
    return [prompt for prompt in tokens if len(prompt) <= extent.max_tokens]


@pytest.fixture(scope="module")
def colocated(smollm2_dir: Path) -> Engine:
    return Engine.open(
        smollm2_dir, EngineOptions(max_context=4096, kv_bytes=2 << 30, chunk_tokens=256, num_threads=2)
    )


def sampling(number: int, *, seeded: bool) -> dict[str, object]:
    if not seeded:
        return {"temperature": 0.0}
    return {"temperature": 0.8, "top_p": 0.95, "seed": 1000 + number, "repetition_penalty": 1.05}


def colocated_answers(engine: Engine, prompts: list[list[int]], *, seeded: bool) -> list[list[int]]:
    """All prompts on one engine, as many at once as it takes."""
    driver = Driver(engine)
    waiting = list(enumerate(prompts))
    while waiting or engine.has_work():
        while waiting and len(engine.scheduler.sequences) < CONCURRENCY:
            number, prompt = waiting[0]
            params = SamplingParams(
                max_tokens=ANSWER_TOKENS, ignore_eos=True, **sampling(number, seeded=seeded)
            )
            if not driver.start(number, prompt, params):
                break
            waiting.pop(0)
        driver.step()
    return [driver.outcomes[number][0].token_ids for number in range(len(prompts))]


def cluster_answers(client: Client, prompts: list[list[int]], *, seeded: bool) -> list[list[int]]:
    def one(item: tuple[int, list[int]]) -> list[int]:
        number, prompt = item
        answer = client.generate(
            prompt,
            max_tokens=ANSWER_TOKENS,
            ignore_eos=True,
            timeout_s=600,
            **sampling(number, seeded=seeded),
        )
        return list(answer.token_ids)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(one, enumerate(prompts)))


@pytest.fixture(scope="module")
def greedy_answers(laptop_address: str, prompts: list[list[int]]) -> list[list[int]]:
    with Client(laptop_address) as client:
        return cluster_answers(client, prompts, seeded=False)


def test_greedy_answers_equal_the_colocated_engines(
    colocated: Engine, prompts: list[list[int]], greedy_answers: list[list[int]]
) -> None:
    assert colocated.invariant
    assert greedy_answers == colocated_answers(colocated, prompts, seeded=False)


def test_seeded_answers_equal_the_colocated_engines(
    laptop_client: Client, colocated: Engine, prompts: list[list[int]], extent: Extent
) -> None:
    """After the greedy ones, so that their prompts hit the caches."""
    some = prompts[:: extent.every]
    found = cluster_answers(laptop_client, some, seeded=True)
    assert found == colocated_answers(colocated, some, seeded=True)


def test_greedy_answers_are_the_references_wherever_it_is_sure(
    smollm2_dir: Path, prompts: list[list[int]], greedy_answers: list[list[int]], extent: Extent
) -> None:
    some = prompts[:: extent.every]
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    num_sure = 0
    for prompt, answer in zip(some, greedy_answers[:: extent.every], strict=True):
        given = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.inference_mode():
            logits = reference(given, logits_to_keep=len(answer)).logits[0]
        best = logits.topk(2, dim=-1)
        sure = (best.values[:, 0] - best.values[:, 1] > TOLERANCE).tolist()
        likeliest = best.indices[:, 0].tolist()
        num_sure += sum(sure)
        assert [t for t, ok in zip(answer, sure, strict=True) if ok] == [
            t for t, ok in zip(likeliest, sure, strict=True) if ok
        ]
    assert num_sure > 0.99 * len(some) * ANSWER_TOKENS
