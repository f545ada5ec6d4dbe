"""GGUF metadata as a Hugging Face config.json: sizes, norms, rotary embedding, window.

Whatever would change the arithmetic and has no place in the configurations that the engine knows is refused
by name, because a key that is skipped here is an answer that is quietly wrong there.
"""

import math
from typing import Any

import numpy as np

from cluster.model_store.architectures import SUPPORTED
from cluster.model_store.errors import DamagedSourceError, UnsupportedArchitectureError
from cluster.model_store.gguf_header import GgufFile

_ROPE_FREQUENCIES = "rope_freqs.weight"

# Keys (after "{arch}.") whose presence with another value than the neutral one changes the model's function.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.key_length_mla": (),
    "attention.key_length_swa": (),
    "attention.sliding_window_pattern": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "interleave_moe_layer_step": (),
    "rope.freq_base_swa": (),
}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model in `file`.

    Raises UnsupportedArchitectureError or DamagedSourceError (a key is missing, or contradicts a tensor).
    """
    keys = _Keys(file)
    _refuse_unknown_arithmetic(keys)
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    _check_heads(keys, head_dim)
    config: dict[str, Any] = {
        "architectures": [SUPPORTED[keys.arch]],
        "model_type": keys.arch,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.integer("context_length"),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": keys.number("rope.freq_base", 10000.0),
    }
    config |= _biases(file, keys.arch) | _window(keys)
    if (scaling := _rope_scaling(keys, config)) is not None:
        config["rope_scaling"] = scaling
    return config


class _Keys:
    """The metadata keys of one architecture, typed, with errors that name the file and the key."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.arch = str(file.metadata.get("general.architecture"))
        if self.arch not in SUPPORTED:
            raise UnsupportedArchitectureError(
                f"{file.path}: architecture {self.arch!r} is not supported; supported are"
                f" {', '.join(SUPPORTED)}"
            )

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self.file.metadata.get(f"{self.arch}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if isinstance(value, list):
            value = self._uniform(key, value)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise DamagedSourceError(f"{self.file.path}: {self.arch}.{key} is {value!r}, not a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value <= 0:
            raise DamagedSourceError(
                f"{self.file.path}: {self.arch}.{key} is {value!r}, not a positive integer"
            )
        return int(value)

    def _uniform(self, key: str, values: list[Any]) -> Any:
        if len(set(values)) != 1:
            raise UnsupportedArchitectureError(
                f"{self.file.path}: {self.arch}.{key} differs from layer to layer, which is not supported"
            )
        return values[0]


def _refuse_unknown_arithmetic(keys: _Keys) -> None:
    for key, neutral in _NEUTRAL.items():
        value = keys.get(key)
        if value is not None and value not in neutral:
            raise UnsupportedArchitectureError(
                f"{keys.file.path}: {keys.arch}.{key} = {value!r} is not supported:"
                " only dense models with plain causal attention are"
            )


def _check_heads(keys: _Keys, head_dim: int) -> None:
    """Refuse what the engine's attention cannot express: another width for values, partial rotation."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.integer(key, head_dim)) != head_dim:
            raise UnsupportedArchitectureError(
                f"{keys.file.path}: {keys.arch}.{key} is {width} and the head dimension {head_dim};"
                " only equal ones are supported"
            )


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise DamagedSourceError(f"{file.path}: tensor token_embd.weight is missing")
    return embedding.shape[0]


def _biases(file: GgufFile, arch: str) -> dict[str, bool]:
    """Qwen2's Q, K and V biases are implied by its type; the others say what they have."""
    if arch == "qwen2":
        return {}
    biases = {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
    if arch == "llama":
        biases["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    return biases


def _window(keys: _Keys) -> dict[str, Any]:
    """The sliding window, carried over in each family's own keys; the engine honours or refuses it."""
    if not keys.get("attention.sliding_window"):
        return {}
    window: dict[str, Any] = {"sliding_window": keys.integer("attention.sliding_window")}
    if keys.arch != "llama":
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    return window


def _rope_scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type") or "none"
    factor = keys.number("rope.scaling.factor", 1.0)
    frequencies = keys.file.tensors.get(_ROPE_FREQUENCIES)
    if frequencies is not None:
        if kind != "none":
            raise UnsupportedArchitectureError(
                f"{keys.file.path}: {_ROPE_FREQUENCIES} together with {kind} RoPE scaling is not supported"
            )
        return _llama3_scaling(keys.file, config)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn_scaling(keys, factor)
    raise UnsupportedArchitectureError(
        f"{keys.file.path}: RoPE scaling {kind!r} is not supported; supported in GGUF are none, linear,"
        " yarn and Llama 3's frequency factors"
    )


def _yarn_scaling(keys: _Keys, factor: float) -> dict[str, Any]:
    original_tokens = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_tokens,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The Llama 3 parameters behind the file's table of one factor per rotary frequency.

    llama.cpp's converter stores the table alone. Meta's models use low and high frequency factors 1 and 4 on
    8,192 original positions; the parameters are taken only if they give the table back to rounding.
    """
    table = file.tensors[_ROPE_FREQUENCIES]
    if table.type.name != "F32" or table.shape != (config["head_dim"] // 2,):
        raise DamagedSourceError(
            f"{file.path}: tensor {_ROPE_FREQUENCIES} is {table.type.name}{list(table.shape)}, not"
            f" F32[{config['head_dim'] // 2}]"
        )
    factors = file.raw(table).view("<f4")
    if (factors == 1.0).all():
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors[-1]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(config["rope_theta"], config["head_dim"], scaling)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedArchitectureError(
            f"{file.path}: tensor {_ROPE_FREQUENCIES} is not the table of a Llama 3 RoPE with frequency"
            " factors 1 and 4 on 8192 positions; other tables are not supported"
        )
    return scaling


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What each rotary frequency is divided by under Llama 3 scaling: float64[head_dim / 2].

    The formula is Meta's (`apply_scaling` in the Llama 3.1 reference code).
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))
