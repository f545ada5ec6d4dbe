"""Weights of a prepared directory: what is checked, and what an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from engine.models.config import ModelConfig
from engine.models.shapes import expected_shapes
from engine.weights import INDEX_FILE, WEIGHTS_FILE, WeightsError, open_weights

pytestmark = pytest.mark.integration

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIG = ModelConfig.parse(
    SIZES | {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
)
QUERY = "model.layers.1.self_attn.q_proj.weight"


def make_tensors(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


def write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refusal(directory: Path, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(WeightsError) as caught:
        open_weights(directory, config)
    assert str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "hf_config",
    [
        LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], tie_word_embeddings=True),
        LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], attention_bias=True),
        Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"]),
        Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"]),
        Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"], attention_bias=True),
    ],
)
def test_what_transformers_saves_is_what_is_expected(hf_config: PreTrainedConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(hf_config)
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path, ModelConfig.open(tmp_path))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not hf_config.tie_word_embeddings:
            assert torch.equal(weights.get(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_the_dtype_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = make_tensors(dtype=dtype)
    weights = open_weights(write(tmp_path, tensors), CONFIG)
    assert weights.get(QUERY).dtype is dtype
    assert torch.equal(weights.get(QUERY), tensors[QUERY])


def test_fused_rows_are_the_parts_below_one_another(tmp_path: Path) -> None:
    tensors = make_tensors(dtype=torch.bfloat16)
    weights = open_weights(write(tmp_path, tensors), CONFIG)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = weights.fused(names, torch.float32)
    assert fused.dtype is torch.float32
    assert fused.is_contiguous()
    assert torch.equal(fused, torch.cat([tensors[name].float() for name in names]))


def test_fused_biases_are_one_vector(tmp_path: Path) -> None:
    config = ModelConfig.parse(SIZES | {"model_type": "qwen2", "rms_norm_eps": 1e-6, "head_dim": 8})
    tensors = make_tensors(config)
    names = [f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"]
    fused = open_weights(write(tmp_path, tensors), config).fused(names, torch.float32)
    assert torch.equal(fused, torch.cat([tensors[name] for name in names]))


def test_a_tensor_is_mapped_for_as_long_as_it_is_used(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    weights = open_weights(write(tmp_path, make_tensors()), CONFIG)
    assert not is_mapped()
    tensor = weights.get(QUERY)
    assert is_mapped()
    assert torch.equal(tensor, make_tensors()[QUERY])
    del tensor
    assert not is_mapped()


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_shards(tmp_path, tensors)
    weights = open_weights(tmp_path, CONFIG)
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in tensors.items())


def test_an_unknown_name_is_a_programming_error(tmp_path: Path) -> None:
    weights = open_weights(write(tmp_path, make_tensors()), CONFIG)
    with pytest.raises(KeyError):
        weights.get("model.layers.9.mlp.up_proj.weight")


def test_no_weights_at_all_are_named(tmp_path: Path) -> None:
    assert "model.safetensors: no such file" in refusal(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors[QUERY]
    assert f"lack tensor {QUERY}" in refusal(write(tmp_path, tensors))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in make_tensors().items() if "layers.1" not in name}
    message = refusal(write(tmp_path, tensors))
    assert message.count("model.layers.1.") == 3
    assert message.endswith("and 6 more")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = make_tensors() | {QUERY: torch.zeros(24, 32)}
    message = refusal(write(tmp_path, tensors))
    assert f"{WEIGHTS_FILE}: tensor {QUERY} is [24, 32]; config.json needs [32, 24]" in message


def test_a_dtype_that_is_not_supported_is_named(tmp_path: Path) -> None:
    tensors = make_tensors() | {QUERY: torch.zeros(32, 24, dtype=torch.int8)}
    assert f"tensor {QUERY} is I8; supported are BF16, F16, F32" in refusal(write(tmp_path, tensors))


def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    tensors = make_tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    assert "tensor model.layers.0.self_attn.q_proj.bias is not part of a llama" in refusal(
        write(tmp_path, tensors)
    )


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = make_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    open_weights(write(tmp_path, tensors), CONFIG)


def test_a_tied_output_head_may_be_stored_but_not_differ(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    open_weights(write(tmp_path, tensors), CONFIG)
    tensors["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(write(tmp_path, tensors))


def test_a_truncated_file_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, make_tensors()) / WEIGHTS_FILE
    whole = path.read_bytes()
    header_length = int.from_bytes(whole[:8], "little")
    end = json.loads(whole[8 : 8 + header_length])[QUERY]["data_offsets"][1]
    path.write_bytes(whole[: 8 + header_length + end - 4])
    assert f"truncated: it ends within or before tensor {QUERY}" in refusal(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 200])
def test_a_file_cut_in_its_header_is_damaged(num_bytes: int, tmp_path: Path) -> None:
    path = write(tmp_path, make_tensors()) / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert f"{WEIGHTS_FILE}: damaged" in refusal(tmp_path)


@pytest.mark.parametrize("position", [0, 4, 7, 8, 9, 40])
def test_a_flipped_byte_in_the_header_is_noticed(position: int, tmp_path: Path) -> None:
    path = write(tmp_path, make_tensors()) / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, make_tensors())
    (tmp_path / "model-1.safetensors").unlink()
    assert "model-1.safetensors: no such file" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_shards(tmp_path, tensors)
    save_file(tensors, tmp_path / "model-1.safetensors")
    assert "is in another file of the model too" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "sub/a.safetensors", 3, "", ".."]
)
def test_an_index_cannot_lead_out_of_its_directory(name: object, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {QUERY: name}}))
    assert "file in the same directory is needed" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    assert f"{INDEX_FILE}: damaged" in refusal(tmp_path)
