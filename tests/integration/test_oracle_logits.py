"""Logits against transformers', for small random models of every variant, whole and in chunks, in float32.

Tolerance: a logit differs by at most TOLERANCE times the largest logit. Weights, biases and norms are all random
and large enough for every part to matter; the last test shows that the tolerance tells near variants apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.runner import EngineOptions, ModelRunner
from tests.oracle import compare, forced_logits, oracle_logits

pytestmark = pytest.mark.integration

TOLERANCE = 2e-5
NUM_TOKENS = 300  # more than one tile of keys, and not a whole number of blocks
CHUNKS = [100, 1, 1, 64, 90, 2, 41, 1]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(architectures=["LlamaForCausalLM"], **(SIZES | changes))


def rope(kind: str, **settings: Any) -> PreTrainedConfig:
    return llama(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **settings})


VARIANTS: dict[str, PreTrainedConfig] = {
    "llama": llama(),
    "llama_one_kv_head_per_query": llama(num_key_value_heads=4),
    "llama_one_kv_head": llama(num_key_value_heads=1),
    "llama_groups_of_three": llama(hidden_size=96, num_attention_heads=6),
    "llama_wide_heads": llama(head_dim=32),
    "llama_narrow_heads": llama(head_dim=8),
    "llama_attention_bias": llama(attention_bias=True),
    "llama_tied": llama(tie_word_embeddings=True),
    "llama_other_eps": llama(rms_norm_eps=0.1),
    "qwen2": Qwen2Config(architectures=["Qwen2ForCausalLM"], **SIZES),
    "qwen2_tied": Qwen2Config(architectures=["Qwen2ForCausalLM"], **SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(architectures=["Qwen3ForCausalLM"], **SIZES, head_dim=32),
    "qwen3_attention_bias": Qwen3Config(
        architectures=["Qwen3ForCausalLM"], **SIZES, head_dim=16, attention_bias=True
    ),
    "rope_linear": rope("linear", factor=4.0),
    "rope_dynamic": rope("dynamic", factor=4.0),
    "rope_llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "rope_yarn": rope("yarn", factor=8.0, original_max_position_embeddings=64),
}


def make_model(config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """A model with every parameter random, saved to `directory`."""
    config._attn_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = 1.5 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(noise * gain + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(directory)
    return model


def open_runner(directory: Path) -> ModelRunner:
    return ModelRunner(
        directory, EngineOptions(precision="float32", max_context=512, kv_bytes=8 << 20, num_threads=1)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(VARIANTS[name], tmp_path)
    runner = open_runner(tmp_path)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], NUM_TOKENS).tolist()
    oracle = oracle_logits(model, tokens)
    for sizes in ([NUM_TOKENS], CHUNKS):
        agreement = compare(forced_logits(runner, tokens, sizes), oracle)
        print(name, agreement)  # noqa: T201 - shown with -s, and where the test fails
        assert agreement.max_difference <= TOLERANCE * agreement.max_logit
        assert agreement.widest_margin_lost <= 2 * TOLERANCE * agreement.max_logit


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.01}}),
        ("rope_yarn", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}),
    ],
)
def test_the_tolerance_tells_near_variants_apart(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(VARIANTS[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], NUM_TOKENS).tolist()
    agreement = compare(forced_logits(open_runner(tmp_path), tokens, CHUNKS), oracle_logits(model, tokens))
    print(name, changes, agreement)  # noqa: T201 - shown with -s, and where the test fails
    assert agreement.max_difference > 20 * TOLERANCE * agreement.max_logit
