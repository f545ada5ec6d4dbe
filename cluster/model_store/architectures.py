"""The tensors that each served architecture must have, by name and shape, from its configuration.

Checking them when a model is prepared turns a missing or misshapen tensor into one clear error, long before a
worker meets it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.model_store.errors import (
    DamagedSourceError,
    UnsupportedArchitectureError,
    UnsupportedTensorError,
)
from cluster.model_store.tensors import FLOAT_DTYPES, SourceTensor
from engine.models.config_keys import ConfigKeys, ModelConfigError
from engine.models.deepseek.tensors import scale_name
from engine.models.families import AnyConfig, config_of
from engine.models.shapes import expected_shapes as served_shapes

SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
}
Shapes = dict[str, tuple[int, ...]]


def check_architecture(config: Mapping[str, Any], origin: Path) -> None:
    """Raises UnsupportedArchitectureError unless `config` is of a served architecture, unquantized."""
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    if model_type not in SUPPORTED or (classes and SUPPORTED[model_type] not in classes):
        raise UnsupportedArchitectureError(
            f"{origin}: architecture {' '.join(classes) or model_type!r} is not supported; supported are"
            f" {', '.join(SUPPORTED.values())}"
        )
    if config.get("quantization_config") and not is_deepseek(config):
        method = config["quantization_config"].get("quant_method", "of an unnamed kind")
        raise UnsupportedArchitectureError(
            f"{origin}: the weights are quantized ({method}); supported are float32, float16 and bfloat16"
            " safetensors, or GGUF"
        )


def is_deepseek(config: Mapping[str, Any]) -> bool:
    """Whether the engine's own account of a model's config and tensors is used."""
    return str(config.get("model_type")).startswith("deepseek_")


def deepseek_config(config: Mapping[str, Any], origin: Path) -> AnyConfig:
    """Raises UnsupportedArchitectureError, in the engine's words, for a config that it does not serve."""
    try:
        return config_of(ConfigKeys(config, str(origin)))
    except ModelConfigError as error:
        raise UnsupportedArchitectureError(str(error)) from error


def _check_deepseek(tensors: list[SourceTensor], config: AnyConfig, origin: Path) -> None:
    """Names; shapes and formats are checked where weights are opened, which knows how they are stored."""
    expected, found = served_shapes(config), {tensor.name for tensor in tensors}
    if missing := sorted(expected.keys() - found):
        raise DamagedSourceError(f"{origin}: {_counted(missing, 'missing')}")
    scales = {scale_name(name) for name in expected}
    if surplus := sorted(found - expected.keys() - scales):
        raise DamagedSourceError(
            f"{origin}: {_counted(surplus, 'not part')} of a {config.architecture} with this configuration"
        )


def check_tensors(tensors: list[SourceTensor], config: Mapping[str, Any], origin: Path) -> None:
    """Raises DamagedSourceError unless `tensors` are those that `config` implies, in name and shape."""
    if is_deepseek(config):
        _check_deepseek(tensors, deepseek_config(config, origin), origin)
        return
    for tensor in tensors:
        if tensor.dtype not in FLOAT_DTYPES:
            raise UnsupportedTensorError(
                f"{tensor.origin}: tensor {tensor.name} is {tensor.dtype}; supported are {', '.join(FLOAT_DTYPES)}"
            )
    if config["num_hidden_layers"] > len(tensors):
        raise DamagedSourceError(
            f"{origin}: the configuration says {config['num_hidden_layers']} layers, but there are only"
            f" {len(tensors)} tensors"
        )
    expected, found = expected_shapes(config), {tensor.name: tensor.shape for tensor in tensors}
    if missing := sorted(expected.keys() - found.keys()):
        raise DamagedSourceError(f"{origin}: {_counted(missing, 'missing')}")
    if surplus := sorted(found.keys() - expected.keys()):
        raise DamagedSourceError(
            f"{origin}: {_counted(surplus, 'not part')} of a {config['model_type']} with this configuration"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise DamagedSourceError(
                f"{origin}: tensor {name} has the shape {list(found[name])}, but the configuration says"
                f" {list(shape)}"
            )


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name → shape of every weight of a dense Llama, Qwen2 or Qwen3 with this configuration."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    layer = _layer_shapes(config)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in _biased(config)}
    return shapes


def _biased(config: Mapping[str, Any]) -> list[str]:
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    if config["model_type"] == "qwen2":
        return attention
    biased = [*attention, "self_attn.o_proj"] if config.get("attention_bias", False) else []
    if config.get("mlp_bias", False) and config["model_type"] == "llama":
        biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return biased


def _counted(names: list[str], what: str) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is {what}"
    return f"{len(names)} tensors are {what}, the first of them {names[0]}"
