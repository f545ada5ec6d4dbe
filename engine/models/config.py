"""What the config.json of a dense decoder says, checked: shapes, biases, norms, rotary embedding.

What the engine cannot compute exactly is refused here, before a weight is read. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.config_keys import CONFIG_FILE, Architecture, ConfigKeys, architecture_of, read_config
from engine.models.rope_config import RopeConfig, RopeType, rope_of

DENSE = (Architecture.LLAMA, Architecture.QWEN2, Architecture.QWEN3)
_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder with grouped-query attention."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope: RopeConfig

    @classmethod
    def open(cls, model_dir: Path) -> ModelConfig:
        """Read `model_dir`/config.json.

        Raises:
            ModelConfigError: no such file, not a JSON object, or a model that is not supported.
        """
        return cls.read(read_config(model_dir))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
        """Check the parsed JSON of a config.json; `source` names it in errors.

        Raises:
            ModelConfigError: a key is missing or wrong, or the model is not supported.
        """
        return cls.read(ConfigKeys(raw, source))

    @classmethod
    def read(cls, keys: ConfigKeys) -> ModelConfig:
        """Raises ModelConfigError as `parse` does, and for an architecture that is not DENSE."""
        architecture = architecture_of(keys)
        if architecture not in DENSE:
            keys.fail("model_type", f"{architecture} is not one of {', '.join(DENSE)}")
        _refuse_unsupported(keys, architecture)
        hidden_size = keys.positive_int("hidden_size")
        num_heads = keys.positive_int("num_attention_heads")
        attention_bias = architecture is not Architecture.QWEN2 and keys.flag("attention_bias")
        max_position_embeddings = keys.positive_int("max_position_embeddings")
        config = cls(
            architecture=architecture,
            vocab_size=keys.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.positive_int("intermediate_size"),
            num_layers=keys.positive_int("num_hidden_layers"),
            num_heads=num_heads,
            # Llama came before grouped queries: its older configs do not have the key.
            num_kv_heads=keys.positive_int(
                "num_key_value_heads", num_heads if architecture is Architecture.LLAMA else None
            ),
            head_dim=_head_dim(keys, architecture, hidden_size, num_heads),
            rms_norm_eps=keys.positive_number("rms_norm_eps"),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=architecture is Architecture.QWEN2 or attention_bias,
            o_bias=attention_bias,
            qk_norm=architecture is Architecture.QWEN3,
            rope=rope_of(keys, max_position_embeddings),
        )
        if config.num_heads % config.num_kv_heads:
            keys.fail(
                "num_key_value_heads", f"{config.num_kv_heads} does not divide {config.num_heads} query heads"
            )
        return config

    @property
    def max_context(self) -> int:
        """The most tokens (prompt and answer) that the model's positions are good for.

        YaRN's stretched length counts even where `max_position_embeddings` still states the original one
        (Qwen2.5 does). Dynamic NTK ends where its stretching would begin: see `engine.rope`.
        """
        if self.rope.type is RopeType.YARN:
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings


def _refuse_unsupported(keys: ConfigKeys, architecture: Architecture) -> None:
    activation = keys.raw.get("hidden_act", "silu")
    if activation != "silu":
        keys.fail("hidden_act", f"{activation!r} is not supported; supported is silu")
    if keys.flag("mlp_bias"):
        keys.fail("mlp_bias", "true is not supported; supported are MLPs without biases")
    if keys.raw.get("quantization_config") is not None:
        keys.fail("quantization_config", "quantized checkpoints are not supported; take the original weights")
    window = _sliding_window(keys, architecture)
    if window is not None:
        keys.fail(
            window, "sliding-window attention is not supported; supported is full attention in every layer"
        )


def _sliding_window(keys: ConfigKeys, architecture: Architecture) -> str | None:
    """The key that switches a sliding window on, if one does."""
    layer_types = keys.raw.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            keys.fail("layer_types", f"is {layer_types!r}; a list is needed")
        if any(kind != "full_attention" for kind in layer_types):
            return "layer_types"
    # Llama has no sliding window, whatever its config says; Qwen has one from layer max_window_layers on.
    if architecture is Architecture.LLAMA or not keys.flag("use_sliding_window"):
        return None
    first_layer = keys.number("max_window_layers", 0)
    is_active = layer_types is None and keys.raw.get("sliding_window") is not None
    return "use_sliding_window" if is_active and first_layer < keys.number("num_hidden_layers") else None


def _head_dim(keys: ConfigKeys, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if keys.raw.get("head_dim") is not None:
        head_dim = keys.positive_int("head_dim")
    elif architecture is Architecture.QWEN3 and "head_dim" not in keys.raw:
        head_dim = _QWEN3_HEAD_DIM
    elif hidden_size % num_heads:
        keys.fail("head_dim", f"is missing, and {num_heads} heads do not divide hidden_size {hidden_size}")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        keys.fail("head_dim", f"is {head_dim}; rotary embedding needs an even number")
    return head_dim
