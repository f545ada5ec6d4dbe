"""What the config.json of a DeepSeek model says: V3 and V3.2 (MLA), V4 (compressed attention). Knows no torch.

Keys as published with the checkpoints, and as transformers 5 writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.models.config_keys import Architecture, ConfigKeys, architecture_of
from engine.models.rope_config import RopeConfig, RopeType, rope_of

NO_RATIO, CSA_RATIO, HCA_RATIO = 0, 4, 128
"""Tokens in one compressed entry: none (a sliding window alone), compressed sparse, heavily compressed attention."""

_RATIO_OF_TYPE = {
    "sliding_attention": NO_RATIO,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_RATIO_KEYS = {
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_FP8_BLOCK = [128, 128]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A mixture of experts: `per_token` of `num_experts`, each of width `width`, besides one that all tokens take, of
    width `shared_width`. `num_groups` > 1: only the best `top_groups` groups are looked at. `limit`: see
    engine/models/deepseek/experts.py; infinity for none."""

    num_experts: int
    per_token: int
    width: int
    shared_width: int
    scoring: str
    normalized: bool
    scaling: float
    num_groups: int = 1
    top_groups: int = 1
    limit: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """The lightning indexer: which `top_k` entries a query reads."""

    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """DeepSeek-V3, or V3.2 where there is an indexer. The first `num_dense_layers` have an MLP of width
    `intermediate_size`, the others experts."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    num_dense_layers: int
    moe: MoeConfig
    indexer: IndexerConfig | None
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_interleaved: bool
    rope: RopeConfig

    @classmethod
    def read(cls, keys: ConfigKeys) -> MlaConfig:
        """Raises ModelConfigError for a key that is missing or wrong, or a model that is not served."""
        architecture = architecture_of(keys)
        _refuse_unsupported(keys)
        is_sparse = architecture is Architecture.DEEPSEEK_V32
        max_positions = keys.positive_int("max_position_embeddings")
        num_layers = keys.positive_int("num_hidden_layers")
        has_q_lora = is_sparse or keys.raw.get("q_lora_rank") is not None
        return cls(
            architecture=architecture,
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=keys.positive_int("hidden_size"),
            intermediate_size=keys.positive_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=keys.positive_int("num_attention_heads"),
            q_lora_rank=keys.positive_int("q_lora_rank") if has_q_lora else None,
            kv_lora_rank=keys.positive_int("kv_lora_rank"),
            nope_dim=keys.positive_int("qk_nope_head_dim"),
            rope_dim=_even(keys, "qk_rope_head_dim"),
            value_dim=keys.positive_int("v_head_dim"),
            num_dense_layers=min(_count(keys, "first_k_dense_replace", 3), num_layers),
            moe=_moe(keys, scoring="sigmoid", has_groups=True, scaling=2.5),
            indexer=_indexer(keys) if is_sparse else None,
            rms_norm_eps=keys.positive_number("rms_norm_eps"),
            max_position_embeddings=max_positions,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            rope_interleaved=is_sparse or keys.flag("rope_interleave", True),
            rope=rope_of(keys, max_positions),
        )

    @property
    def max_context(self) -> int:
        """The most tokens (prompt and answer) that the model's positions are good for."""
        return _max_context(self.max_position_embeddings, self.rope)


@dataclass(frozen=True, slots=True, kw_only=True)
class V4Config:
    """DeepSeek-V4 (arXiv:2606.19348). `ratios`: of each layer NO_RATIO, CSA_RATIO or HCA_RATIO. `rope`: of layers
    without compression, `compress_rope` of the others. The experts of the first `num_hash_layers` are looked up by
    token id."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    ratios: tuple[int, ...]
    window_tokens: int
    indexer: IndexerConfig
    hc_mult: int
    hc_iterations: int
    hc_eps: float
    moe: MoeConfig
    num_hash_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    compress_rope: RopeConfig

    @classmethod
    def read(cls, keys: ConfigKeys) -> V4Config:
        """Raises ModelConfigError for a key that is missing or wrong, or a model that is not served."""
        _refuse_unsupported(keys)
        max_positions = keys.positive_int("max_position_embeddings")
        num_layers = keys.positive_int("num_hidden_layers")
        rope, compress_rope = _v4_ropes(keys, max_positions)
        config = cls(
            architecture=architecture_of(keys),
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=keys.positive_int("hidden_size"),
            num_heads=keys.positive_int("num_attention_heads"),
            head_dim=keys.positive_int("head_dim"),
            rope_dim=_rope_dim(keys),
            q_lora_rank=keys.positive_int("q_lora_rank"),
            o_groups=keys.positive_int("o_groups"),
            o_lora_rank=keys.positive_int("o_lora_rank"),
            ratios=_ratios(keys, num_layers),
            window_tokens=keys.positive_int("sliding_window"),
            indexer=_indexer(keys),
            hc_mult=keys.positive_int("hc_mult"),
            hc_iterations=keys.positive_int("hc_sinkhorn_iters"),
            hc_eps=keys.positive_number("hc_eps"),
            moe=_moe(keys, scoring="sqrtsoftplus", has_groups=False, scaling=1.5),
            num_hash_layers=_num_hash_layers(keys, num_layers),
            rms_norm_eps=keys.positive_number("rms_norm_eps"),
            max_position_embeddings=max_positions,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            rope=rope,
            compress_rope=compress_rope,
        )
        if config.num_heads % config.o_groups:
            keys.fail("o_groups", f"{config.o_groups} does not divide {config.num_heads} heads")
        if keys.number("num_key_value_heads", 1) != 1:
            keys.fail("num_key_value_heads", "is not 1; keys of V4 are shared by all heads")
        return config

    @property
    def num_layers(self) -> int:
        """Layers of the main model, without those that predict further tokens."""
        return len(self.ratios)

    @property
    def max_context(self) -> int:
        """The most tokens (prompt and answer) that the model's positions are good for."""
        return _max_context(self.max_position_embeddings, self.compress_rope)


def _refuse_unsupported(keys: ConfigKeys) -> None:
    activation = keys.raw.get("hidden_act", "silu")
    if activation != "silu":
        keys.fail("hidden_act", f"{activation!r} is not supported; supported is silu")
    for key in ("attention_bias", "mlp_bias"):
        if keys.flag(key):
            keys.fail(key, "true is not supported; supported are projections without biases")
    if keys.number("moe_layer_freq", 1) != 1:
        keys.fail(
            "moe_layer_freq", "is not supported; supported is 1, experts in every layer after the dense ones"
        )
    quantization = keys.raw.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        keys.fail("quantization_config", f"is {quantization!r}; an object is needed")
    of = keys.child("quantization_config", quantization)
    for key, only in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", _FP8_BLOCK)):
        if quantization.get(key, only) != only:
            of.fail(key, f"is {quantization[key]!r}; supported is {only!r}, as the models are published")


def _max_context(max_positions: int, rope: RopeConfig) -> int:
    if rope.type is not RopeType.YARN:
        return max_positions
    return max(max_positions, int(rope.original_max_position_embeddings * rope.factor))


def _even(keys: ConfigKeys, key: str) -> int:
    value = keys.positive_int(key)
    if value % 2:
        keys.fail(key, f"is {value}; rotary embedding needs an even number")
    return value


def _count(keys: ConfigKeys, key: str, default: int) -> int:
    value = keys.number(key, default)
    if value != int(value) or value < 0:
        keys.fail(key, f"is {value}; a whole number of at least 0 is needed")
    return int(value)


def _indexer(keys: ConfigKeys) -> IndexerConfig:
    return IndexerConfig(
        num_heads=keys.positive_int("index_n_heads"),
        head_dim=keys.positive_int("index_head_dim"),
        top_k=keys.positive_int("index_topk"),
    )


def _moe(keys: ConfigKeys, *, scoring: str, has_groups: bool, scaling: float) -> MoeConfig:
    width = keys.positive_int("moe_intermediate_size")
    config = MoeConfig(
        num_experts=keys.positive_int("n_routed_experts"),
        per_token=keys.positive_int("num_experts_per_tok"),
        width=width,
        shared_width=width * keys.positive_int("n_shared_experts", 1),
        scoring=scoring,
        normalized=keys.flag("norm_topk_prob", True),
        scaling=keys.positive_number("routed_scaling_factor", scaling),
        num_groups=keys.positive_int("n_group", 1) if has_groups else 1,
        top_groups=keys.positive_int("topk_group", 1) if has_groups else 1,
        limit=keys.positive_number("swiglu_limit", 1e9) if not has_groups else float("inf"),
    )
    if keys.raw.get("scoring_func", scoring) != scoring:
        keys.fail("scoring_func", f"is {keys.raw['scoring_func']!r}; supported is {scoring}")
    if config.per_token > config.num_experts:
        keys.fail(
            "num_experts_per_tok", f"{config.per_token} of {config.num_experts} experts cannot be taken"
        )
    if config.num_experts % config.num_groups or config.top_groups > config.num_groups:
        keys.fail(
            "n_group",
            f"{config.num_experts} experts in {config.num_groups} groups, {config.top_groups} taken",
        )
    return config


def _ratios(keys: ConfigKeys, num_layers: int) -> tuple[int, ...]:
    rates = keys.raw.get("compress_rates") or _RATIO_KEYS
    if rates != _RATIO_KEYS:
        keys.fail("compress_rates", f"is {rates!r}; supported is {_RATIO_KEYS!r}")
    types, ratios = keys.raw.get("layer_types"), keys.raw.get("compress_ratios")
    if isinstance(types, list) and types and all(kind in _RATIO_OF_TYPE for kind in types):
        ratios = [_RATIO_OF_TYPE[kind] for kind in types]
    elif types is not None:
        keys.fail("layer_types", f"is {types!r}; a list of {', '.join(_RATIO_OF_TYPE)} is needed")
    known = (NO_RATIO, CSA_RATIO, HCA_RATIO)
    if not isinstance(ratios, list) or any(ratio not in known for ratio in ratios):
        # A default would be wrong for every model that there is.
        keys.fail("compress_ratios", f"is {ratios!r}; a list of {known}, one for each layer, is needed")
    if len(ratios) < num_layers:
        keys.fail("compress_ratios", f"has {len(ratios)} entries for {num_layers} layers")
    if not any(ratios[:num_layers]):
        keys.fail(
            "compress_ratios", "compresses nothing; supported are models with at least one layer that does"
        )
    return tuple(ratios[:num_layers])


def _num_hash_layers(keys: ConfigKeys, num_layers: int) -> int:
    types = keys.raw.get("mlp_layer_types")
    if types is None:
        return min(_count(keys, "num_hash_layers", 0), num_layers)
    count = types.count("hash_moe") if isinstance(types, list) else 0
    if types != ["hash_moe"] * count + ["moe"] * (num_layers - count):
        keys.fail(
            "mlp_layer_types", f"is {types!r}; hash_moe for the first layers and moe for all others is needed"
        )
    return count


def _rope_dim(keys: ConfigKeys) -> int:
    rope_dim = _even(keys, "qk_rope_head_dim")
    for key in ("head_dim", "index_head_dim"):
        if rope_dim > keys.positive_int(key):
            keys.fail("qk_rope_head_dim", f"is {rope_dim}, more than {key}")
    return rope_dim


def _v4_ropes(keys: ConfigKeys, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers without and with compression. YaRN does not scale attention here."""
    theta = keys.positive_number("rope_theta", 10000.0)
    compressed = rope_of(keys, max_positions, of="compress", is_partial=True)
    compressed = replace(compressed, theta=keys.positive_number("compress_rope_theta"))
    if compressed.type is RopeType.YARN:
        compressed = replace(compressed, attention_factor=1.0)
    return RopeConfig(theta=theta), compressed
