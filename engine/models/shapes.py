"""The tensors that a model has, by name and shape, and how many bytes they are as published. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.models.config import ModelConfig
from engine.models.deepseek.config import MlaConfig
from engine.models.deepseek.tensors import mla_shapes, stored_bits, v4_shapes
from engine.models.families import AnyConfig

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


def published_bytes(config: AnyConfig) -> int:
    """Of all weights, in the formats that the model is published in: DeepSeek's experts and projections in few bits,
    with their scales, the rest and dense models in bfloat16."""
    bits = (
        math.prod(shape) * (16 if isinstance(config, ModelConfig) else stored_bits(config, name, shape))
        for name, shape in expected_shapes(config).items()
    )
    return math.ceil(sum(bits) / 8)


def expected_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has, in the names that it is published with."""
    if isinstance(config, ModelConfig):
        return dict(_dense_shapes(config))
    return dict(mla_shapes(config) if isinstance(config, MlaConfig) else v4_shapes(config))


def _dense_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield OUTPUT, (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    num_query_rows, num_key_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, num_rows in (("q", num_query_rows), ("k", num_key_rows), ("v", num_key_rows)):
        yield f"self_attn.{name}_proj.weight", (num_rows, hidden)
        if config.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (num_rows,)
    yield "self_attn.o_proj.weight", (hidden, num_query_rows)
    if config.o_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
