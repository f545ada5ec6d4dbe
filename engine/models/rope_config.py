"""What a config.json says of the rotary embedding.

Reads both spellings, `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine.models.config_keys import ConfigKeys

_DEFAULT_ROPE_THETA = 10000.0


class RopeType(StrEnum):
    """How rotary frequencies are stretched, as `rope_type` spells it."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


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


def rope_of(
    keys: ConfigKeys, max_position_embeddings: int, *, of: str | None = None, is_partial: bool = False
) -> RopeConfig:
    """The rotary embedding of a config, or of its part `of` where `rope_parameters` has several.

    `is_partial`: heads may be rotated in part; how far says another key. Raises ModelConfigError.
    """
    name = "rope_scaling" if keys.raw.get("rope_scaling") is not None else "rope_parameters"
    value = keys.raw.get(name)
    if value is not None and not isinstance(value, dict):
        keys.fail(name, f"is {value!r}; an object is needed")
    rope = keys.child(name, value or {})
    if of is not None and isinstance(rope.raw.get(of), dict):
        rope = rope.child(of, rope.raw[of])
    for key in rope.raw:
        if key not in _ROPE_KEYS:
            rope.fail(key, f"is not supported; supported are {', '.join(sorted(_ROPE_KEYS))}")
    for holder in (keys, rope):
        if not is_partial and holder.number("partial_rotary_factor", 1.0) != 1.0:
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
    kind: RopeType, theta: float, original: int, rope: ConfigKeys, max_position_embeddings: int
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
