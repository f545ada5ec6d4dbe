"""SmolLM2-135M-Instruct against transformers on the same weights, teacher-forced over real text, in float32.

Stated tolerance: logits differ by at most LOGIT_TOLERANCE, and the likeliest token is the oracle's wherever the
oracle's two best logits are more than twice that apart. (The largest logits of this model are about 40.)
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from cluster.model_store import resolve
from engine.runner import EngineOptions, ModelRunner
from tests.oracle import compare, forced_logits, oracle_logits
from tests.real_prompts import ARTICLE_1, real_prompts

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m-instruct"
LOGIT_TOLERANCE = 1e-3
MIN_TOKENS, MAX_TOKENS = 500, 600


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve(MODEL)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> ModelRunner:
    options = EngineOptions(precision="float32", max_context=1024, kv_bytes=128 << 20, num_threads=1)
    return ModelRunner(model_dir, options)


TEXTS = {
    "prose_and_code": max(real_prompts(), key=len),
    "many_scripts": "\n".join(ARTICLE_1.values()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_logits_over_real_text_are_those_of_transformers(
    name: str, model_dir: Path, oracle: PreTrainedModel, runner: ModelRunner
) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = tokenizer.encode(TEXTS[name], add_special_tokens=False).ids[:MAX_TOKENS]
    assert len(tokens) >= MIN_TOKENS
    sizes = [256, len(tokens) - 256 - 4, 1, 3]
    agreement = compare(forced_logits(runner, tokens, sizes), oracle_logits(oracle, tokens))
    print(f"{name}: {agreement}")  # noqa: T201 - shown with -s, and where the test fails
    assert agreement.max_difference <= LOGIT_TOLERANCE
    assert agreement.widest_margin_lost <= 2 * LOGIT_TOLERANCE
    assert agreement.num_equal_argmax >= 0.999 * agreement.num_positions
