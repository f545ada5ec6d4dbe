"""GGUF files to prepared models: the same function, every tensor type, and clear refusals."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.model_store import ModelSourceError, prepare, read_manifest
from cluster.model_store.errors import (
    DamagedSourceError,
    UnsupportedArchitectureError,
    UnsupportedSourceError,
    UnsupportedTensorError,
    UnsupportedTokenizerError,
)
from cluster.model_store.gguf_header import open_gguf
from tests import ggml_blocks, tiny_gguf
from tests.tiny_gguf import from_hugging_face, random_tensors, write_gguf

pytestmark = pytest.mark.integration


def _prepare(path: Path) -> Path:
    return prepare(str(path), name="tiny", root=path.parent)


def _config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_prepare(path) / "config.json").read_text())
    return content


def _model(arch: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": tiny_gguf.VOCAB_SIZE,
        "hidden_size": tiny_gguf.HIDDEN,
        "intermediate_size": tiny_gguf.INNER,
        "num_hidden_layers": tiny_gguf.LAYERS,
        "num_attention_heads": tiny_gguf.HEADS,
        "num_key_value_heads": tiny_gguf.KV_HEADS,
        "head_dim": tiny_gguf.HEAD_DIM,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **(sizes | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "layernorm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
@torch.inference_mode()
def test_a_prepared_file_computes_what_the_original_model_computes(
    arch: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    original = _model(arch, **changes)
    state = {name: value.numpy() for name, value in original.state_dict().items()}
    if changes.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    tensors = from_hugging_face(state, permuted=arch == "llama")
    directory = _prepare(write_gguf(tmp_path / "tiny.gguf", {**tensors}, arch=arch))
    prepared = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(40).reshape(1, -1) * 5 % tiny_gguf.VOCAB_SIZE
    torch.testing.assert_close(prepared(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert load_file(directory / "model.safetensors").keys() == state.keys()


def test_rows_are_put_back_so_that_halves_turn_as_interleaved_pairs_did(tmp_path: Path) -> None:
    """llama.cpp turns the pairs (2i, 2i+1) of a head; after preparing, (i, i + d/2) must be those pairs."""
    tensors = random_tensors()
    weights = load_file(_prepare(write_gguf(tmp_path / "tiny.gguf", {**tensors})) / "model.safetensors")
    for gguf_name, name in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        stored = tensors[f"blk.0.{gguf_name}.weight"].reshape(-1, tiny_gguf.HEAD_DIM, tiny_gguf.HIDDEN)
        prepared = weights[f"model.layers.0.self_attn.{name}.weight"].reshape(stored.shape)
        half = tiny_gguf.HEAD_DIM // 2
        np.testing.assert_array_equal(prepared[:, :half], stored[:, 0::2])
        np.testing.assert_array_equal(prepared[:, half:], stored[:, 1::2])


@pytest.mark.parametrize("kind", ggml_blocks.DECODERS, ids=lambda kind: str(kind.name))
def test_each_quantized_type_is_read_by_its_own_rules(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    rows = ggml_blocks.random_rows(kind, num_rows=tiny_gguf.HIDDEN, num_elements=256)
    tensors = random_tensors() | {
        f"blk.{index}.ffn_{name}.weight": np.zeros(shape, np.float32)
        for index in range(tiny_gguf.LAYERS)
        for name, shape in (("gate", (256, 64)), ("up", (256, 64)), ("down", (64, 256)))
    }
    stored: tiny_gguf.Tensors = {**tensors, "blk.1.ffn_down.weight": (rows, kind)}
    path = write_gguf(tmp_path / "tiny.gguf", stored, metadata={"llama.feed_forward_length": 256})
    weights = load_file(_prepare(path) / "model.safetensors")
    expected = np.array([ggml_blocks.decode_row(row.tobytes(), kind) for row in rows], np.float32)
    found = weights["model.layers.1.mlp.down_proj.weight"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_unquantized_types_are_stored_bit_for_bit(kind: str, tmp_path: Path) -> None:
    stored = GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(random_tensors()["blk.0.attn_v.weight"], stored)
    tensors: tiny_gguf.Tensors = {**random_tensors(), "blk.0.attn_v.weight": (raw, stored)}
    directory = _prepare(write_gguf(tmp_path / "tiny.gguf", tensors))
    header, data = _read_safetensors(directory / "model.safetensors")
    entry = header["model.layers.0.self_attn.v_proj.weight"]
    assert entry["dtype"] == kind
    assert data[slice(*entry["data_offsets"])] == raw.tobytes()


def _read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {**random_tensors()})
    reference = gguf.GGUFReader(path)
    file = open_gguf(path)
    fields = {
        name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")
    }
    assert file.metadata.keys() == fields.keys()
    for name, value in fields.items():
        assert file.metadata[name] == (pytest.approx(value) if isinstance(value, float) else value)
    for tensor in reference.tensors:
        assert file.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert file.raw(file.tensors[tensor.name]).tobytes() == tensor.data.tobytes()


def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf", {**random_tensors()}).read_bytes()
    path = tmp_path / "cut.gguf"
    header_end = content.index(b"blk.0.attn_norm")
    lengths = [*range(0, header_end, 97), *range(header_end, len(content), 4999), len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedSourceError, match=r"cut\.gguf"):
            _prepare(path)


def test_a_damaged_header_never_ends_in_anything_but_a_clear_error(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf", {**random_tensors()}).read_bytes()
    header_bytes = open_gguf(tmp_path / "whole.gguf").tensors["token_embd.weight"].offset_bytes
    chance = random.Random(0)
    path, refused = tmp_path / "damaged.gguf", 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(header_bytes)] = chance.choice(
                [0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)]
            )
        path.write_bytes(damaged)
        try:
            _prepare(path)
        except ModelSourceError as error:
            assert "damaged.gguf" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_with_nan_or_infinity_is_refused(value: float, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["blk.1.ffn_up.weight"][3, 7] = value
    with pytest.raises(
        DamagedSourceError, match=r"tiny\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**tensors}))


@pytest.mark.parametrize("name", ["IQ4_NL", "Q2_K", "TQ1_0", "I8"])
def test_another_tensor_type_is_named_with_what_is_supported(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((tiny_gguf.HIDDEN, 256 // block_elements * block_bytes), np.uint8)
    if name == "I8":
        raw = raw.astype(np.int8)
    tensors: tiny_gguf.Tensors = {**random_tensors(), "blk.0.ffn_down.weight": (raw, kind)}
    with pytest.raises(
        UnsupportedTensorError, match=rf"blk\.0\.ffn_down\.weight is {name}; supported are F32, "
    ):
        _prepare(write_gguf(tmp_path / "tiny.gguf", tensors))


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    tensors = random_tensors()
    missing = {name: value for name, value in tensors.items() if name != "blk.1.attn_k.weight"}
    with pytest.raises(DamagedSourceError, match=r"layers\.1\.self_attn\.k_proj\.weight is missing"):
        _prepare(write_gguf(path, {**missing}))
    with pytest.raises(DamagedSourceError, match=r"layers\.2\.input_layernorm\.weight is not part"):
        _prepare(write_gguf(path, {**tensors, "blk.2.attn_norm.weight": np.ones(64, np.float32)}))
    with pytest.raises(UnsupportedArchitectureError, match=r"blk\.0\.ssm_in\.weight has no place"):
        _prepare(write_gguf(path, {**tensors, "blk.0.ssm_in.weight": np.ones(64, np.float32)}))
    with pytest.raises(DamagedSourceError, match=r"has the shape \[8\], but the configuration says \[64\]"):
        _prepare(write_gguf(path, {**tensors, "output_norm.weight": np.ones(8, np.float32)}))


def test_an_unknown_architecture_is_named_with_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match="'mamba' is not supported; supported are llama, qwen2"
    ):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, arch="mamba"))


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.expert_count": 8},
        {"llama.attention.value_length": 8},
        {"llama.rope.dimension_count": 8},
        {"llama.attention.head_count_kv": [2, 1]},
        {"llama.attention.scale": 0.5},
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0},
    ],
)
def test_what_would_change_the_arithmetic_unnoticed_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (key, *_) = changes
    named = "RoPE scaling" if "scaling" in key else key
    with pytest.raises(UnsupportedArchitectureError, match=named):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=changes))


@pytest.mark.parametrize("value", [None, "many", 0, 2.5])
def test_a_missing_or_senseless_size_is_named(value: object, tmp_path: Path) -> None:
    changes = {"llama.block_count": value}
    with pytest.raises(DamagedSourceError, match=r"llama\.block_count is"):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=changes))


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path: Path) -> None:
    changes = {"llama.block_count": 4_000_000_000}
    with pytest.raises(DamagedSourceError, match="says 4000000000 layers"):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=changes))


def test_one_part_of_a_split_file_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSourceError, match="one of 3 parts; merge them"):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata={"split.count": 3}))


def test_the_configuration_is_complete_and_in_hugging_face_form(tmp_path: Path) -> None:
    assert _config(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()})) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 256,
        "vocab_size": tiny_gguf.VOCAB_SIZE,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
    }


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling_is_carried_over(scaling: dict[str, Any], expected: object, tmp_path: Path) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    config = _config(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=metadata))
    assert config.get("rope_scaling") == expected


@torch.inference_mode()
def test_llama3_frequency_factors_become_the_configuration_that_made_them(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta, metadata = 500000.0, {"llama.rope.freq_base": 500000.0}
    original = _model("llama", rope_parameters={**scaling, "rope_theta": theta}, max_position_embeddings=256)
    state = {name: value.numpy() for name, value in original.state_dict().items()}
    plain = 1.0 / theta ** (np.arange(0, tiny_gguf.HEAD_DIM, 2) / tiny_gguf.HEAD_DIM)
    table = (plain / original.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    tensors = {**from_hugging_face(state, permuted=True), "rope_freqs.weight": table}
    path = write_gguf(tmp_path / "tiny.gguf", {**tensors}, metadata=metadata)
    assert _config(path)["rope_scaling"] == scaling
    prepared = AutoModelForCausalLM.from_pretrained(_prepare(path)).eval()
    ids = torch.arange(40).reshape(1, -1)
    torch.testing.assert_close(prepared(ids).logits, original(ids).logits, rtol=0, atol=0)


def test_frequency_factors_of_ones_are_none_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    path, half = tmp_path / "tiny.gguf", tiny_gguf.HEAD_DIM // 2
    ones = {**random_tensors(), "rope_freqs.weight": np.ones(half, np.float32)}
    assert "rope_scaling" not in _config(write_gguf(path, {**ones}))
    odd = {**random_tensors(), "rope_freqs.weight": np.linspace(1, 9, half, dtype=np.float32)}
    with pytest.raises(UnsupportedArchitectureError, match=r"rope_freqs\.weight is not the table"):
        _prepare(write_gguf(path, {**odd}))
    short = {**random_tensors(), "rope_freqs.weight": np.ones(3, np.float32)}
    with pytest.raises(DamagedSourceError, match=r"rope_freqs\.weight is F32\[3\]"):
        _prepare(write_gguf(path, {**short}))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("llama", {"sliding_window": 32}),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_a_sliding_window_is_carried_over(arch: str, expected: dict[str, Any], tmp_path: Path) -> None:
    metadata = {f"{arch}.attention.sliding_window": 32}
    path = write_gguf(tmp_path / "tiny.gguf", {**random_tensors(arch)}, arch=arch, metadata=metadata)
    assert expected.items() <= _config(path).items()


def test_end_tokens_are_those_of_the_file_and_of_the_chat_template(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {**random_tensors()})
    vocabulary = tiny_gguf.VOCABULARY
    ids = sorted([vocabulary["</s>"], vocabulary["<|im_end|>"]])
    assert read_manifest(_prepare(path)).eos_token_ids == tuple(ids)
    written = json.loads((_prepare(path) / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(written) == ids


def test_a_file_without_any_end_token_is_refused(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eos_token_id": None, "tokenizer.chat_template": None}
    with pytest.raises(DamagedSourceError, match="no end-of-text token"):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=changes))


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedTokenizerError, "'t5'; supported are 'gpt2' and 'llama'"),
        (
            {"tokenizer.ggml.pre": "brand-new"},
            UnsupportedTokenizerError,
            "'brand-new'.*supported are default,",
        ),
        ({"tokenizer.ggml.pre": None}, UnsupportedTokenizerError, "pre-tokenizer None"),
        ({"tokenizer.ggml.tokens": None}, DamagedSourceError, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.token_type": [1, 2]}, DamagedSourceError, "does not have the"),
        ({"tokenizer.ggml.merges": ["a"]}, DamagedSourceError, "'a', which is not a pair"),
        ({"tokenizer.ggml.merges": ["q z"]}, DamagedSourceError, "'q' and 'z' names a token that is not"),
        ({"tokenizer.ggml.bos_token_id": 9999}, DamagedSourceError, "bos_token_id is 9999, outside"),
        ({"tokenizer.chat_template": "{% if %}"}, DamagedSourceError, "chat template is wrong in line 1"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(
    changes: dict[str, Any], error: type[ModelSourceError], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        _prepare(write_gguf(tmp_path / "tiny.gguf", {**random_tensors()}, metadata=changes))
