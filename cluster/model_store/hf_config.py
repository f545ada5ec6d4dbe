"""A Hugging Face config.json in one complete form, so that the engine meets no defaults and no old spellings.

Afterwards every size is there, `rope_theta` is a number, and `rope_scaling` is absent or has a `rope_type`.
"""

from pathlib import Path
from typing import Any

from cluster.model_store.errors import DamagedSourceError, UnsupportedArchitectureError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# The defaults of the three configuration classes, which saved files may leave out.
_DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN3_HEAD_DIM = 128
_ROPE_THETA = 10000.0


def complete_config(config: dict[str, Any], origin: Path) -> dict[str, Any]:
    """`config` of a supported architecture with everything filled in; `origin` is named in errors.

    Raises DamagedSourceError or UnsupportedArchitectureError (an unknown RoPE type, another activation).
    """
    for key in _SIZES:
        if not isinstance(config.get(key), int) or config[key] <= 0:
            raise DamagedSourceError(f"{origin}: {key} is {config.get(key)!r}, not a positive integer")
    filled = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    filled.pop("auto_map", None)  # names Python code in the source, which is never run
    num_heads = filled["num_attention_heads"]
    head_dim = _QWEN3_HEAD_DIM if filled["model_type"] == "qwen3" else filled["hidden_size"] // num_heads
    filled.setdefault("head_dim", head_dim)
    filled.setdefault("num_key_value_heads", num_heads)
    if filled["hidden_act"] != "silu":
        raise UnsupportedArchitectureError(
            f"{origin}: hidden_act {filled['hidden_act']!r} is not supported; silu is"
        )
    return _with_flat_rope(filled, origin)


def _with_flat_rope(config: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Turn `rope_parameters` (transformers 5) and `rope_scaling` with `type` (old) into the form above."""
    parameters = dict(config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {})
    config.pop("rope_scaling", None)
    theta = parameters.pop("rope_theta", config.get("rope_theta", _ROPE_THETA))
    rope_type = parameters.pop("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise UnsupportedArchitectureError(
            f"{origin}: RoPE type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    for holder in (config, parameters):
        if holder.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedArchitectureError(
                f"{origin}: partial_rotary_factor other than 1 is not supported"
            )
    scaling = {} if rope_type == "default" else {"rope_scaling": {"rope_type": rope_type, **parameters}}
    return config | {"rope_theta": theta} | scaling
