"""What a model's config.json says, checked: shapes, biases, norms, rotary embedding.

Reads both spellings of the rotary embedding, `rope_theta` with `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5). What the engine cannot compute exactly is refused here, before a weight is
read. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

CONFIG_FILE = "config.json"


class ModelConfigError(ValueError):
    """A config.json that cannot be served; the message names the file, the key and what is supported."""


class Architecture(StrEnum):
    """Model families, as `model_type` spells them."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


class RopeType(StrEnum):
    """How rotary frequencies are stretched, as `rope_type` spells it."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


_CLASS_NAMES = {
    "LlamaForCausalLM": Architecture.LLAMA,
    "Qwen2ForCausalLM": Architecture.QWEN2,
    "Qwen3ForCausalLM": Architecture.QWEN3,
}
_QWEN3_HEAD_DIM = 128
_DEFAULT_ROPE_THETA = 10000.0
_LARGEST_NUMBER = 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. Lengths in tokens; fields that a type does not use keep their defaults.

    `attention_factor` None is what the YaRN paper computes from `factor` (and from both mscales where they
    are set).
    """

    type: RopeType = RopeType.DEFAULT
    theta: float = _DEFAULT_ROPE_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


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
        path = model_dir / CONFIG_FILE
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelConfigError(
                f"{path}: cannot be read ({error.strerror}); is it a prepared model?"
            ) from error
        except ValueError as error:
            raise ModelConfigError(f"{path}: not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise ModelConfigError(f"{path}: holds a JSON {type(raw).__name__}; an object is needed")
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
        """Check the parsed JSON of a config.json; `source` names it in errors.

        Raises:
            ModelConfigError: a key is missing or wrong, or the model is not supported.
        """
        keys = _Keys(raw, source)
        architecture = _architecture(keys)
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
            rope=_rope(keys, max_position_embeddings),
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


class _Keys:
    """Typed reads of one JSON object, with errors that say where."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.raw = raw
        self._source = source
        self._prefix = prefix

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelConfigError(f"{self._source}: {self._prefix}{key}: {problem}")

    def child(self, key: str, value: Mapping[str, Any]) -> _Keys:
        return _Keys(value, self._source, f"{self._prefix}{key}.")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing; a number is needed")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"is {value!r}; a number is needed")
        if not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:  # NaN too
            self.fail(key, f"is {value}; a number of at most {_LARGEST_NUMBER:.0e} is needed")
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            self.fail(key, f"is {value}; a number above 0 is needed")
        return float(value)

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            self.fail(key, f"is {value}; a whole number of at least 1 is needed")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"is {value!r}; true or false is needed")
        return bool(value)


def _architecture(keys: _Keys) -> Architecture:
    supported = ", ".join(f"{architecture} ({name})" for name, architecture in _CLASS_NAMES.items())
    names, model_type = keys.raw.get("architectures"), keys.raw.get("model_type")
    found = []
    if names is not None:
        if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_CLASS_NAMES):
            keys.fail("architectures", f"{names!r} is not supported; supported are {supported}")
        found.append(_CLASS_NAMES[names[0]])
    if model_type is not None:
        if model_type not in list(Architecture):
            keys.fail("model_type", f"{model_type!r} is not supported; supported are {supported}")
        found.append(Architecture(model_type))
    if not found:
        keys.fail("model_type", f"is missing; supported are {supported}")
    if found[0] is not found[-1]:
        keys.fail("architectures", f"{names} does not fit model_type {model_type!r}")
    return found[0]


def _refuse_unsupported(keys: _Keys, architecture: Architecture) -> None:
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


def _sliding_window(keys: _Keys, architecture: Architecture) -> str | None:
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


def _head_dim(keys: _Keys, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
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


_ROPE_KEYS = frozenset(
    (
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
        "finetuned",  # in early YaRN checkpoints; says how they were trained
    )
)


def _rope(keys: _Keys, max_position_embeddings: int) -> RopeConfig:
    name = "rope_scaling" if keys.raw.get("rope_scaling") is not None else "rope_parameters"
    value = keys.raw.get(name)
    if value is not None and not isinstance(value, dict):
        keys.fail(name, f"is {value!r}; an object is needed")
    rope = keys.child(name, value or {})
    for key in rope.raw:
        if key not in _ROPE_KEYS:
            rope.fail(key, f"is not supported; supported are {', '.join(sorted(_ROPE_KEYS))}")
    for holder in (keys, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            holder.fail("partial_rotary_factor", "is not supported; supported is 1, the whole head rotated")
    kind = rope.raw.get("rope_type") or rope.raw.get("type") or RopeType.DEFAULT
    if kind not in list(RopeType):
        rope.fail("rope_type", f"{kind!r} is not supported; supported are {', '.join(RopeType)}")
    theta = rope.positive_number("rope_theta", keys.positive_number("rope_theta", _DEFAULT_ROPE_THETA))
    if theta <= 1:
        rope.fail("rope_theta", f"is {theta}; a number above 1 is needed")
    # Some checkpoints state the original length beside the rotary settings; it then has priority.
    holder = keys if keys.raw.get("original_max_position_embeddings") is not None else rope
    original = holder.positive_int("original_max_position_embeddings", max_position_embeddings)
    return _scaled_rope(RopeType(kind), theta, original, rope, max_position_embeddings)


def _scaled_rope(
    kind: RopeType, theta: float, original: int, rope: _Keys, max_position_embeddings: int
) -> RopeConfig:
    match kind:
        case RopeType.DEFAULT:
            return RopeConfig(theta=theta)
        case RopeType.LINEAR | RopeType.DYNAMIC:
            return RopeConfig(type=kind, theta=theta, factor=rope.positive_number("factor"))
        case RopeType.LLAMA3:
            low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
            if high <= low:
                rope.fail("high_freq_factor", f"is {high}; a number above low_freq_factor {low} is needed")
            return RopeConfig(
                type=kind,
                theta=theta,
                factor=rope.positive_number("factor"),
                original_max_position_embeddings=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case RopeType.YARN:
            attention_factor = rope.raw.get("attention_factor")
            return RopeConfig(
                type=kind,
                theta=theta,
                factor=rope.positive_number("factor", max_position_embeddings / original),
                original_max_position_embeddings=original,
                beta_fast=rope.positive_number("beta_fast", 32.0),
                beta_slow=rope.positive_number("beta_slow", 1.0),
                attention_factor=None
                if attention_factor is None
                else rope.positive_number("attention_factor"),
                mscale=rope.number("mscale", 0.0),
                mscale_all_dim=rope.number("mscale_all_dim", 0.0),
                truncate=rope.flag("truncate", True),
            )
