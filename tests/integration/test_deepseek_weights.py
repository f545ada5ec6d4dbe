"""Checkpoints in the formats that DeepSeek publishes, and configs as it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from engine.models.config_keys import ModelConfigError
from engine.models.deepseek.config import V4Config
from engine.models.families import open_config
from engine.quantized import dequantized
from engine.runner import EngineOptions, ModelRunner
from engine.weights import WeightsError, open_weights
from tests.deepseek_checkpoints import (
    V4_SIZES,
    make_oracle,
    quantized_fp4,
    quantized_fp8,
    rewrite_config,
    v3_config,
    v4_config,
    v32_config,
    write_published,
)
from tests.oracle import compare, forced_logits, oracle_logits

pytestmark = pytest.mark.integration

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "v3": lambda: v3_config(hidden_size=160),
    "v32": lambda: v32_config(hidden_size=160),
    "v4": lambda: v4_config(hidden_size=160, num_hidden_layers=3, compress_ratios=[0, 4, 128]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_checkpoint_computes_what_its_numbers_say(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    oracle = make_oracle(config, tmp_path)
    write_published(config, oracle, tmp_path)
    runner = ModelRunner(tmp_path, EngineOptions(max_context=512, kv_bytes=32 << 20, max_sequences=2))
    tokens = np.random.default_rng(1).integers(0, 96, 280).tolist()
    agreement = compare(forced_logits(runner, tokens, [270, *[1] * 10]), oracle_logits(oracle, tokens))
    assert agreement.max_difference <= 1e-5 * agreement.max_logit


@pytest.mark.parametrize("shape", [(1, 128), (128, 128), (129, 300), (5, 1000)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for powers_of_two in (True, False):
        codes, scales = quantized_fp8(weight, powers_of_two)
        found = dequantized(codes, scales)
        for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1)):
            exact = codes.float()[row, column] * scales.float()[row // 128, column // 128]
            assert found[row, column] == exact
        torch.testing.assert_close(found, weight, rtol=0.07, atol=0.02)


def test_mxfp4() -> None:
    weight = torch.randn((7, 96), generator=torch.Generator().manual_seed(0))
    codes, scales = quantized_fp4(weight)
    assert (codes.shape, scales.shape) == ((7, 48), (7, 3))
    torch.testing.assert_close(dequantized(codes, scales), weight, rtol=0.35, atol=0.3)
    every = torch.arange(-128, 128, dtype=torch.int8).view(1, 256).repeat(1, 1)[:, :16]
    low_first = dequantized(torch.tensor([[0x71, *[0] * 15]], dtype=torch.int8), torch.ones(1, 1))
    assert low_first[0, :2].tolist() == [0.5, 6.0]
    assert dequantized(every, torch.full((1, 1), 2.0)).abs().max() == 12.0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published")
    config = CONFIGS["v4"]()
    write_published(config, make_oracle(config, home), home, num_shards=1)
    return home


SHARD = "model-00001-of-00001.safetensors"
EXPERT = "layers.1.ffn.experts.0.w1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{EXPERT}.scale"), "lacks its scales"),
        (lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"][:, :1].clone()}), "needs [32, 5]"),
        (lambda t: t.update({f"{EXPERT}.scale": t[f"{EXPERT}.scale"].to(torch.bfloat16)}), "scales are"),
        (
            lambda t: t.update({f"{EXPERT}.weight": t[f"{EXPERT}.weight"][:, :-1].clone()}),
            "config.json needs",
        ),
        (lambda t: t.update({"layers.0.attn_norm.scale": torch.ones(1, 1)}), "is not quantized"),
        (lambda t: t.pop("layers.1.attn.compressor.ape"), "lack tensor layers.1.attn.compressor.ape"),
        (lambda t: t.update({"layers.9.attn_norm.weight": torch.ones(160)}), "not part of"),
        (lambda t: t.update({"layers.0.ffn.gate.tid2eid": torch.zeros(96, 2)}), "supported are I32, I64"),
        (lambda t: t.update({"norm.weight": torch.zeros(160, dtype=torch.int8)}), "supported are"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(
    published: Path, change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    tensors = load_file(published / SHARD)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=words.replace("[", r"\[").replace("]", r"\]")):
        open_weights(tmp_path, open_config(tmp_path))


def test_a_config_as_published_is_read(tmp_path: Path) -> None:
    sizes = V4_SIZES | {
        "model_type": "deepseek_v4",
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "expert_dtype": "fp4",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = open_config(tmp_path)
    assert isinstance(config, V4Config)
    v4_config().save_pretrained(tmp_path / "theirs")
    theirs = open_config(tmp_path / "theirs")
    assert config.ratios == (0, 128, 4, 128, 4, 4) == theirs.ratios  # type: ignore[union-attr]
    assert config.compress_rope == theirs.compress_rope  # type: ignore[union-attr]
    assert config.num_hash_layers == 2 == theirs.num_hash_layers  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": None}, "compress_ratios: is None"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 6}, "compresses nothing"),
        (
            {"compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}},
            "compress_rates",
        ),
        ({"scoring_func": "softmax"}, "supported is sqrtsoftplus"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"o_groups": 3}, "does not divide"),
        ({"num_key_value_heads": 2}, "shared by all heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method"),
        ({"qk_rope_head_dim": 64}, "more than head_dim"),
        ({"mlp_layer_types": ["moe", "hash_moe"]}, "mlp_layer_types"),
        ({"index_topk": None}, "index_topk: is missing"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    v4_config().save_pretrained(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ModelConfigError, match=words):
        open_config(tmp_path)
