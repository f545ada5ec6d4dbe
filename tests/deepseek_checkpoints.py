"""Small DeepSeek models with random weights: transformers' as the oracle, and the same as a checkpoint of ours, in the
names and formats that DeepSeek publishes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV32Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.tiny_model import add_tokenizer

V4_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "compress_ratios": [0, 128, 4, 128, 4, 4, 0],
    "num_hash_layers": 2,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 512,
    "sliding_window": 128,
    "hc_mult": 4,
    "max_position_embeddings": 2048,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
MLA_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
}

# Of transformers' modules, from the outside in, what DeepSeek calls them.
_V4_NAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.compressor\.indexer\.scorer\.weights_proj", ".indexer.weights_proj"),
    (r"\.compressor\.indexer\.q_b_proj", ".indexer.wq_b"),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"compressor\.kv_norm", "compressor.norm"),
    (r"\.position_bias$", ".ape"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"compressor\.gate_proj", "compressor.wgate"),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
    (r"shared_experts\.gate_proj", "shared_experts.w1"),
    (r"shared_experts\.up_proj", "shared_experts.w3"),
    (r"shared_experts\.down_proj", "shared_experts.w2"),
)


def v4_config(**changes: Any) -> PreTrainedConfig:
    """As published: `compress_ratios` end with those of layers that predict further tokens."""
    return DeepseekV4Config(architectures=["DeepseekV4ForCausalLM"], **(V4_SIZES | changes))


def v32_config(**changes: Any) -> PreTrainedConfig:
    sizes = MLA_SIZES | {"index_topk": 2048, "index_head_dim": 16, "index_n_heads": 4}
    return DeepseekV32Config(architectures=["DeepseekV32ForCausalLM"], **(sizes | changes))


def v3_config(**changes: Any) -> PreTrainedConfig:
    return DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], **(MLA_SIZES | changes))


def make_oracle(config: PreTrainedConfig, directory: Path, seed: int = 0) -> PreTrainedModel:
    """A model with every parameter random, and its checkpoint in `directory`."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                rows = torch.rand(len(tensor), config.n_routed_experts).argsort(dim=1)
                tensor.copy_(rows[:, : tensor.shape[1]])
            elif tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(_random(name, tensor))
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tensors = published(config, model.state_dict())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def _random(name: str, tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape)
    if "norm.weight" in name or name.endswith("layernorm.weight"):
        return 1 + 0.2 * noise
    if tensor.ndim < 2:
        return 0.3 * noise
    if "position_bias" in name:
        return noise
    return noise * 1.5 / tensor.shape[-1] ** 0.5


def published(config: PreTrainedConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors by the names that DeepSeek gives them, each expert by itself."""
    is_v4 = config.model_type == "deepseek_v4"
    gate, down, up = ("w1", "w2", "w3") if is_v4 else ("gate_proj", "down_proj", "up_proj")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for pattern, to in _V4_NAMES if is_v4 else ():
            name = re.sub(pattern, to, name)
        at, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                one, other = both.chunk(2)
                tensors[f"{at}.{expert}.{gate}.weight"] = one.contiguous()
                tensors[f"{at}.{expert}.{up}.weight"] = other.contiguous()
        elif last == "down_proj" and tensor.ndim == 3:
            for expert, weight in enumerate(tensor):
                tensors[f"{at}.{expert}.{down}.weight"] = weight.contiguous()
        elif not (config.tie_word_embeddings and name in ("head.weight", "lm_head.weight")):
            tensors[name] = tensor.contiguous()
    return tensors


def rewrite_config(directory: Path, **changes: Any) -> None:
    """Change keys of the config.json in `directory`; None takes one out."""
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def make_prepared(config: PreTrainedConfig, directory: Path, seed: int = 0) -> Path:
    """A prepared model of that config, with the tests' tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").touch()
    config.vocab_size = make_room_for_tokenizer(directory, config)
    make_oracle(config, directory, seed)
    add_tokenizer(directory, config.model_type, config.max_position_embeddings)
    return directory


def make_room_for_tokenizer(directory: Path, config: PreTrainedConfig) -> int:
    """How many tokens the tests' tokenizer has."""
    config.save_pretrained(directory)
    return add_tokenizer(directory, config.model_type, config.max_position_embeddings)


FP8_NAMES = re.compile(r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$|shared_experts\.w\d\.weight$")
FP8_NAMES_V3 = re.compile(
    r"layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\..*_proj|.*indexer\.w\w+)\.weight$"
)
FLOAT32_NAMES = re.compile(r"hc_|\.ape$|attn_sink$|gate\.bias$|e_score_correction_bias$|k_norm")


def write_published(
    config: PreTrainedConfig, model: PreTrainedModel, directory: Path, num_shards: int = 3
) -> None:
    """The model's checkpoint as DeepSeek publishes it: experts of V4 in MXFP4, projections in FP8, the rest in
    bfloat16, shards with an index, and a layer that predicts further tokens. `model` gets the rounded weights."""
    tensors = published(config, model.state_dict())
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stored |= _stored(config, name, tensor)
    further = "mtp.0.norm.weight" if config.model_type == "deepseek_v4" else _further_layer(config)
    stored[further] = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    _load_rounded(config, model, stored)
    names = sorted(stored)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        mine = names[shard::num_shards]
        save_file({name: stored[name].contiguous() for name in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors").unlink(missing_ok=True)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _further_layer(config: PreTrainedConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}.enorm.weight"


def _stored(config: PreTrainedConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    is_v4 = config.model_type == "deepseek_v4"
    if is_v4 and ".experts." in name:
        codes, scales = quantized_fp4(tensor)
        return {name: codes, name.replace(".weight", ".scale"): scales}
    if (FP8_NAMES if is_v4 else FP8_NAMES_V3).search(name):
        weight, scales = quantized_fp8(tensor, is_v4)
        return {name: weight, name.replace(".weight", ".scale") if is_v4 else f"{name}_scale_inv": scales}
    if FLOAT32_NAMES.search(name) or not tensor.is_floating_point():
        return {name: tensor}
    return {name: tensor.bfloat16()}


def quantized_fp8(weight: torch.Tensor, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn and scales for blocks of 128 × 128, block by block."""
    rows, columns = (-(-length // 128) for length in weight.shape)
    scales, out = torch.empty(rows, columns), torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            at = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scale = weight[at].abs().max() / 448
            scales[row, column] = 2.0 ** torch.ceil(torch.log2(scale)) if powers_of_two else scale
            out[at] = weight[at] / scales[row, column]
    return out.to(torch.float8_e4m3fn), scales.to(torch.float8_e8m0fnu) if powers_of_two else scales


def quantized_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed e2m1, two to a byte, and powers of two for each 32 along a row."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weight.reshape(len(weight), -1, 32)
    scales = 2.0 ** torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6))
    magnitude = (groups / scales).abs().unsqueeze(-1).sub(numbers).abs().argmin(-1)
    codes = (magnitude + 8 * (groups < 0)).reshape(weight.shape)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    return packed, scales.squeeze(-1).to(torch.float8_e8m0fnu)


def _load_rounded(
    config: PreTrainedConfig, model: PreTrainedModel, stored: Mapping[str, torch.Tensor]
) -> None:
    """Give the oracle the numbers that the checkpoint has, worked out one by one."""
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

    def number_of(name: str) -> torch.Tensor:
        tensor = stored[name]
        scales = stored.get(f"{name.removesuffix('.weight')}.scale", stored.get(f"{name}_scale_inv"))
        if scales is None:
            return tensor.float() if tensor.is_floating_point() else tensor
        if tensor.dtype == torch.int8:
            rows = [
                [numbers[half] for byte in row for half in (byte % 256 % 16, byte % 256 // 16)]
                for row in tensor.tolist()
            ]
            wide = torch.tensor(rows)
            return torch.stack([wide[:, i] * scales.float()[:, i // 32] for i in range(wide.shape[1])], 1)
        out = tensor.float()
        for row in range(out.shape[0]):
            for column in range(0, out.shape[1], 128):
                out[row, column : column + 128] *= scales.float()[row // 128, column // 128]
        return out

    is_v4 = config.model_type == "deepseek_v4"
    gate, down, up = ("w1", "w2", "w3") if is_v4 else ("gate_proj", "down_proj", "up_proj")
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            [ours, *_] = published(config, {name: tensor}) or [None]
            at, _, last = name.rpartition(".")
            if ours is None:
                continue
            if last in ("gate_up_proj", "down_proj") and tensor.ndim == 3:
                at = ours.rsplit(".", 3)[0]
                for expert in range(len(tensor)):
                    parts = (gate, up) if last == "gate_up_proj" else (down,)
                    tensor[expert].copy_(
                        torch.cat([number_of(f"{at}.{expert}.{part}.weight") for part in parts])
                    )
            else:
                tensor.copy_(number_of(ours))
