"""Rotary tables against transformers' own, for each type of stretching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config import ModelConfig
from engine.rope import attention_scaling, inverse_frequencies, rope_tables

pytestmark = pytest.mark.integration

ORIGINAL_TOKENS = 512
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_TOKENS},
    "yarn_all_keys": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn_given_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_TOKENS,
        "attention_factor": 1.25,
    },
    # A base so small that the ramp between kept and stretched dimensions has no width.
    "yarn_no_ramp": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2,
    },
}


def make_configs(name: str, head_dim: int, theta: float = 10000.0) -> tuple[ModelConfig, LlamaConfig]:
    hf_config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=ORIGINAL_TOKENS,
        rope_parameters=ROPES[name] | {"rope_theta": theta},
    )
    return ModelConfig.parse(hf_config.to_dict()), hf_config


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", [name for name in ROPES if name != "default"])
def test_frequencies_and_scaling_are_those_of_transformers(name: str, head_dim: int) -> None:
    config, hf_config = make_configs(name, head_dim, theta=500000.0)
    expected, expected_scaling = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](hf_config)
    torch.testing.assert_close(inverse_frequencies(config.rope, head_dim), expected, rtol=3e-7, atol=0)
    assert attention_scaling(config.rope) == pytest.approx(expected_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_tables_are_those_of_transformers(name: str) -> None:
    config, hf_config = make_configs(name, head_dim=64)
    cos, sin = rope_tables(config, ORIGINAL_TOKENS)
    assert cos.shape == sin.shape == (ORIGINAL_TOKENS, 64)
    assert cos.dtype == sin.dtype == torch.float32
    positions = torch.arange(ORIGINAL_TOKENS)[None]
    expected_cos, expected_sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), positions)
    torch.testing.assert_close(cos, expected_cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, expected_sin[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROPES)
def test_a_position_turns_the_same_in_every_length_of_table(name: str) -> None:
    config, _ = make_configs(name, head_dim=64)
    long_cos, long_sin = rope_tables(config, ORIGINAL_TOKENS)
    for max_context in (1, 2, 63, 257):
        cos, sin = rope_tables(config, max_context)
        assert torch.equal(cos, long_cos[:max_context])
        assert torch.equal(sin, long_sin[:max_context])


def test_dynamic_ends_where_it_would_begin_to_change_earlier_keys() -> None:
    config, hf_config = make_configs("dynamic", head_dim=64)
    embedding = LlamaRotaryEmbedding(hf_config)
    within = embedding(torch.zeros(1), torch.arange(ORIGINAL_TOKENS)[None])[0]
    beyond = embedding(torch.zeros(1), torch.arange(ORIGINAL_TOKENS + 1)[None])[0]
    assert not torch.equal(within, beyond[:, :ORIGINAL_TOKENS])
    with pytest.raises(ValueError, match=f"a context of {ORIGINAL_TOKENS + 1} tokens"):
        rope_tables(config, ORIGINAL_TOKENS + 1)


def test_a_context_of_no_tokens_is_refused() -> None:
    config, _ = make_configs("default", head_dim=64)
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        rope_tables(config, 0)


def test_yarn_reaches_its_stretched_length() -> None:
    config, _ = make_configs("yarn", head_dim=64)
    assert len(rope_tables(config, 4 * ORIGINAL_TOKENS)[0]) == 4 * ORIGINAL_TOKENS
