"""The tensors that a DeepSeek checkpoint has: names as published, and shapes.

Shapes are those of the numbers; how they are stored is the file's to say (engine/quantized.py). Layers that predict
further tokens may be there and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.models.deepseek.config import CSA_RATIO, NO_RATIO, MlaConfig, MoeConfig, V4Config

_SCALED_BITS = {"fp8": 8 + 8 / 128**2, "fp4": 4 + 8 / 32}
_FLOAT32 = ("hc_", ".ape", ".attn_sink", "gate.bias", "e_score_correction_bias", "k_norm")
_NOT_QUANTIZED = ("embed", "head", "compressor", "weights_proj", ".gate.weight")

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def is_left_out(config: MlaConfig | V4Config, name: str) -> bool:
    """Whether a tensor belongs to layers that predict further tokens."""
    if isinstance(config, V4Config):
        return name.startswith("mtp.")
    return name.startswith(f"model.layers.{config.num_layers}.")


def scale_name(name: str) -> str | None:
    """The tensor with the scales of `name`, in the names of V4 and in those of V3; None for what has none."""
    if name.startswith("model."):
        return f"{name}_scale_inv"
    return f"{name.removesuffix('.weight')}.scale" if name.endswith(".weight") else None


def stored_bits(config: MlaConfig | V4Config, name: str, shape: tuple[int, ...]) -> float:
    """Bits of each number of a tensor as it is published, its part of the scales included."""
    if name.endswith(".tid2eid"):
        return 64
    if any(part in name for part in _FLOAT32):
        return 32
    if len(shape) < 2 or any(part in name for part in _NOT_QUANTIZED):
        return 16
    is_fp4 = isinstance(config, V4Config) and ".experts." in name
    return _SCALED_BITS["fp4" if is_fp4 else "fp8"]


def v4_shapes(config: V4Config) -> Shapes:
    """Of DeepSeek-V4."""
    streams, hidden = config.hc_mult, config.hidden_size
    yield "embed.weight", (config.vocab_size, hidden)
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "head.weight", (config.vocab_size, hidden)
    yield "hc_head_fn", (streams, streams * hidden)
    yield "hc_head_base", (streams,)
    yield "hc_head_scale", (1,)
    for layer in range(config.num_layers):
        for name, shape in _v4_layer(config, layer):
            yield f"layers.{layer}.{name}", shape


def _v4_layer(config: V4Config, layer: int) -> Shapes:
    streams, hidden, ratio = config.hc_mult, config.hidden_size, config.ratios[layer]
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", (hidden,)
        yield f"hc_{part}_fn", ((2 + streams) * streams, streams * hidden)
        yield f"hc_{part}_base", ((2 + streams) * streams,)
        yield f"hc_{part}_scale", (3,)
    queries = config.num_heads * config.head_dim
    yield "attn.attn_sink", (config.num_heads,)
    yield "attn.q_norm.weight", (config.q_lora_rank,)
    yield "attn.kv_norm.weight", (config.head_dim,)
    yield "attn.wq_a.weight", (config.q_lora_rank, hidden)
    yield "attn.wq_b.weight", (queries, config.q_lora_rank)
    yield "attn.wkv.weight", (config.head_dim, hidden)
    yield "attn.wo_a.weight", (config.o_groups * config.o_lora_rank, queries // config.o_groups)
    yield "attn.wo_b.weight", (hidden, config.o_groups * config.o_lora_rank)
    if ratio != NO_RATIO:
        yield from _compressor("attn.compressor", config, ratio, config.head_dim)
    if ratio == CSA_RATIO:
        indexer = config.indexer
        yield from _compressor("attn.indexer.compressor", config, ratio, indexer.head_dim)
        yield "attn.indexer.wq_b.weight", (indexer.num_heads * indexer.head_dim, config.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", (indexer.num_heads, hidden)
    if layer < config.num_hash_layers:
        yield "ffn.gate.tid2eid", (config.vocab_size, config.moe.per_token)
    else:
        yield "ffn.gate.bias", (config.moe.num_experts,)
    yield from _experts("ffn", config.moe, hidden, ("w1", "w2", "w3"))


def _compressor(name: str, config: V4Config, ratio: int, width: int) -> Shapes:
    channels = 2 * width if ratio == CSA_RATIO else width
    yield f"{name}.ape", (ratio, channels)
    yield f"{name}.norm.weight", (width,)
    yield f"{name}.wkv.weight", (channels, config.hidden_size)
    yield f"{name}.wgate.weight", (channels, config.hidden_size)


def _experts(name: str, moe: MoeConfig, hidden: int, names: tuple[str, str, str]) -> Shapes:
    gate, down, up = names
    yield f"{name}.gate.weight", (moe.num_experts, hidden)
    widths = {f"experts.{expert}": moe.width for expert in range(moe.num_experts)}
    for at, width in (widths | {"shared_experts": moe.shared_width}).items():
        yield f"{name}.{at}.{gate}.weight", (width, hidden)
        yield f"{name}.{at}.{up}.weight", (width, hidden)
        yield f"{name}.{at}.{down}.weight", (hidden, width)


def mla_shapes(config: MlaConfig) -> Shapes:
    """Of DeepSeek-V3 and V3.2."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for name, shape in _mla_layer(config, layer):
            yield f"model.layers.{layer}.{name}", shape


def _mla_layer(config: MlaConfig, layer: int) -> Shapes:
    hidden, heads = config.hidden_size, config.num_heads
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    queries = heads * (config.nope_dim + config.rope_dim)
    if config.q_lora_rank is None:
        yield "self_attn.q_proj.weight", (queries, hidden)
    else:
        yield "self_attn.q_a_proj.weight", (config.q_lora_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", (queries, config.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (config.kv_lora_rank + config.rope_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (config.nope_dim + config.value_dim), config.kv_lora_rank)
    yield "self_attn.o_proj.weight", (hidden, heads * config.value_dim)
    if config.indexer is not None:
        assert config.q_lora_rank is not None
        indexer = config.indexer
        yield "self_attn.indexer.wq_b.weight", (indexer.num_heads * indexer.head_dim, config.q_lora_rank)
        yield "self_attn.indexer.wk.weight", (indexer.head_dim, hidden)
        yield "self_attn.indexer.k_norm.weight", (indexer.head_dim,)
        yield "self_attn.indexer.k_norm.bias", (indexer.head_dim,)
        yield "self_attn.indexer.weights_proj.weight", (indexer.num_heads, hidden)
    if layer < config.num_dense_layers:
        inner = config.intermediate_size
        for name in ("gate_proj", "up_proj"):
            yield f"mlp.{name}.weight", (inner, hidden)
        yield "mlp.down_proj.weight", (hidden, inner)
        return
    yield "mlp.gate.e_score_correction_bias", (config.moe.num_experts,)
    yield from _experts("mlp", config.moe, hidden, ("gate_proj", "down_proj", "up_proj"))
