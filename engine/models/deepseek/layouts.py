"""The caches of DeepSeek models, as planes (design §4)."""

from __future__ import annotations

from engine.models.deepseek.config import CSA_RATIO, HCA_RATIO, MlaConfig, V4Config
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane, Window

LATENT, INDEX = "latent", "index"
CSA, HCA = "csa", "hca"
SWA, CSA_TAIL, INDEX_TAIL, HCA_TAIL = "swa", "csa_tail", "index_tail", "hca_tail"
TAILS = (CSA_TAIL, INDEX_TAIL, HCA_TAIL)

V4_BLOCK_TOKENS = 128
"""The least common multiple of what V4's entries compress: 32 of CSA's and 1 of HCA's in a block."""

FP8 = "fp8"
"""The paper's storage: what is not rotated in 8 bits, what is in bfloat16, the indexer's keys of V4 in 4 bits."""

_FP8_GROUP, _FP4_GROUP = 64, 32
_LATENT_GROUP = 128


def mla_layout(config: MlaConfig, dtype: str, block_tokens: int) -> CacheLayout:
    """One latent for each token, shared by all heads, with its rotated part; V3.2 has a key for the indexer, too."""
    planes = [Plane(LATENT, config.num_layers, Paged(1), 1, _latent(config, dtype))]
    if config.indexer is not None:
        width = config.indexer.head_dim
        key = _scaled("key", width, width) if dtype == FP8 else (Field("key", width, dtype),)
        planes.append(Plane(INDEX, config.num_layers, Paged(1), 1, key))
    return CacheLayout(tuple(planes), block_tokens)


def v4_layout(config: V4Config, dtype: str) -> CacheLayout:
    """Compressed entries and the indexer's keys in pages; in windows the last tokens as they are, and what is not
    compressed yet: kv and gate of the compressors, before the position's bias, always float32. CSA's tail overlaps:
    entry j is made of tokens 4j - 4 … 4j + 3."""
    num_csa, num_hca = config.ratios.count(CSA_RATIO), config.ratios.count(HCA_RATIO)
    width, key_width = config.head_dim, config.indexer.head_dim
    entry = _entry(width - config.rope_dim, config.rope_dim, dtype)
    planes = [Plane(SWA, config.num_layers, Window(config.window_tokens, 1), 1, entry)]
    if num_csa:
        overlapping = Window(2 * CSA_RATIO, CSA_RATIO)
        planes += [
            Plane(CSA, num_csa, Paged(CSA_RATIO), 1, entry),
            Plane(INDEX, num_csa, Paged(CSA_RATIO), 1, _index_key(key_width, dtype)),
            Plane(CSA_TAIL, num_csa, overlapping, 1, _uncompressed(2 * width)),
            Plane(INDEX_TAIL, num_csa, overlapping, 1, _uncompressed(2 * key_width)),
        ]
    if num_hca:
        planes += [
            Plane(HCA, num_hca, Paged(HCA_RATIO), 1, entry),
            Plane(HCA_TAIL, num_hca, Window(HCA_RATIO, HCA_RATIO), 1, _uncompressed(width)),
        ]
    return CacheLayout(tuple(planes), V4_BLOCK_TOKENS)


def _latent(config: MlaConfig, dtype: str) -> tuple[Field, ...]:
    if dtype != FP8:
        return Field("latent", config.kv_lora_rank, dtype), Field("rope", config.rope_dim, dtype)
    latent, scale = _scaled("latent", config.kv_lora_rank, _LATENT_GROUP)
    return latent, Field("rope", config.rope_dim, "bfloat16"), scale


def _entry(nope: int, rope: int, dtype: str) -> tuple[Field, ...]:
    if dtype != FP8:
        return Field("nope", nope, dtype), Field("rope", rope, dtype)
    scales = Field("scale", -(-nope // _FP8_GROUP), "float8_e8m0")
    return Field("nope", nope, "float8_e4m3"), Field("rope", rope, "bfloat16"), scales


def _index_key(width: int, dtype: str) -> tuple[Field, ...]:
    if dtype != FP8:
        return (Field("key", width, dtype),)
    return Field("key", width // 2, "uint8"), Field("scale", -(-width // _FP4_GROUP), "float8_e8m0")


def _scaled(name: str, width: int, group: int) -> tuple[Field, Field]:
    """In 8 bits, with a scale for so many numbers."""
    return Field(name, width, "float8_e4m3"), Field("scale", -(-width // group), "float32")


def _uncompressed(width: int) -> tuple[Field, ...]:
    return Field("kv", width, "float32"), Field("gate", width, "float32")
