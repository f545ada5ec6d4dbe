"""The cache that each family of models fills. Knows no torch."""

from __future__ import annotations

from typing import Literal

from engine.models.config import ModelConfig
from engine.models.deepseek.config import MlaConfig
from engine.models.deepseek.layouts import FP8, mla_layout, v4_layout
from engine.models.families import AnyConfig
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane

BLOCK_TOKENS = 64
"""Of a block in memory and of a key block (design §4); 128 for DeepSeek-V4. A cache at the other end of a transfer may
have other blocks (kvtransfer/recut.py), since pieces travel by entry."""


def cache_layout(config: AnyConfig, kv_dtype: str) -> CacheLayout:
    """The planes of a model's cache, with numbers stored as `kv_dtype`."""
    if isinstance(config, ModelConfig):
        return gqa_layout(config.num_layers, config.num_kv_heads, config.head_dim, kv_dtype, BLOCK_TOKENS)
    if isinstance(config, MlaConfig):
        return mla_layout(config, kv_dtype, BLOCK_TOKENS)
    return v4_layout(config, kv_dtype)


def kv_dtypes(config: AnyConfig) -> tuple[str, ...]:
    """What a model's cache may be kept in."""
    if isinstance(config, ModelConfig):
        return "bfloat16", "float32"
    return "bfloat16", "float32", FP8


def gqa_layout(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: str, block_tokens: int
) -> CacheLayout:
    """Two paged planes, one entry a token: the cache of grouped-query attention."""

    def plane(name: str, scale_along: Literal["token", "channel"]) -> Plane:
        fields = (Field(name, head_dim, dtype),)
        return Plane(name, num_layers, Paged(1), num_kv_heads, fields, scale_along)

    return CacheLayout((plane("k", "channel"), plane("v", "token")), block_tokens)
