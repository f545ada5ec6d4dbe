"""Hugging Face style directories to prepared models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.model_store import prepare, read_manifest
from cluster.model_store.errors import (
    DamagedSourceError,
    ModelSourceError,
    SourceNotFoundError,
    UnsupportedArchitectureError,
    UnsupportedTensorError,
    UnsupportedTokenizerError,
)
from tests.tiny_gguf import CHAT_TEMPLATE, VOCAB_SIZE, VOCABULARY
from tests.tiny_tokenizers import byte_level
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.integration

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "chat_template": CHAT_TEMPLATE,
}


def _source(
    directory: Path,
    arch: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **changes: Any,
) -> Path:
    """What `save_pretrained` writes for a tiny random model, and tokenizer files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **(_SIZES | changes))).to(dtype)
    source = directory / "source"
    model.save_pretrained(source, max_shard_size=shard)
    (source / "tokenizer.json").write_text(byte_level())
    (source / "tokenizer_config.json").write_text(json.dumps(_SETTINGS))
    (source / "generation_config.json").unlink()
    return source


def _prepare(source: Path) -> Path:
    return prepare(str(source), name="tiny", root=source.parent)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def _config(source: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_prepare(source) / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
    ],
)
@torch.inference_mode()
def test_a_prepared_directory_computes_what_the_original_computes(
    arch: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = _source(tmp_path, arch, **changes)
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    prepared = AutoModelForCausalLM.from_pretrained(_prepare(source)).eval()
    ids = torch.arange(40).reshape(1, -1) * 5 % VOCAB_SIZE
    torch.testing.assert_close(prepared(ids).logits, original(ids).logits, rtol=0, atol=0)


def test_shards_are_joined_into_one_file_with_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = _source(tmp_path / "whole")
    parts = _source(tmp_path / "parts", shard="50KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert read_manifest(_prepare(parts)).weights_digest == read_manifest(_prepare(whole)).weights_digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_source_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = _source(tmp_path, dtype=dtype)
    prepared, original = (
        load_file(_prepare(source) / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    assert prepared.keys() == original.keys()
    for name, tensor in original.items():
        assert prepared[name].dtype == dtype
        assert torch.equal(prepared[name], tensor)


def test_tensors_start_at_aligned_places_for_mapped_reads(tmp_path: Path) -> None:
    weights = _prepare(_source(tmp_path)) / "model.safetensors"
    assert (8 + int.from_bytes(weights.read_bytes()[:8], "little")) % 64 == 0
    with safe_open(weights, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_copies_and_buffers_that_follow_from_the_rest_are_left_out(tmp_path: Path) -> None:
    source = _source(tmp_path, tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, source / "model.safetensors")
    prepared = load_file(_prepare(source) / "model.safetensors")
    assert "lm_head.weight" not in prepared
    assert not any("inv_freq" in name for name in prepared)


def test_missing_files_are_named(tmp_path: Path) -> None:
    source = _source(tmp_path, shard="50KB")
    (shard, *_) = sorted(source.glob("*.safetensors"))
    for path in (source / "tokenizer.json", shard, source / "config.json"):
        path.unlink()
        with pytest.raises(SourceNotFoundError, match=path.name):
            _prepare(source)


def test_a_directory_with_weights_of_another_format_says_what_is_read(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(SourceNotFoundError, match="safetensors files only"):
        _prepare(source)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "'MambaForCausalLM' is not supported",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (
            {"model_type": None, "architectures": None},
            "None is not supported; supported are LlamaForCausalLM",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "RoPE type 'longrope' is not supported; supported are d",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_another_architecture_is_refused_with_what_is_supported(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = _source(tmp_path)
    _edit(source / "config.json", lambda config: config.update(changes))
    with pytest.raises(UnsupportedArchitectureError, match=rf"config\.json.*{reason}"):
        _prepare(source)


@pytest.mark.parametrize("value", [None, 0, "64", 10**12])
def test_a_senseless_size_is_named(value: object, tmp_path: Path) -> None:
    source = _source(tmp_path)
    _edit(source / "config.json", lambda config: config.update(num_hidden_layers=value))
    with pytest.raises(DamagedSourceError, match=r"num_hidden_layers is|layers, but there are only"):
        _prepare(source)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5e5}, (5e5, None)),
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, (5e5, None)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            (5e5, {"rope_type": "linear", "factor": 2.0}),
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
            (5e5, {"rope_type": "dynamic", "factor": 2.0}),
        ),
    ],
)
def test_every_spelling_of_rope_is_brought_to_one(
    rope: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    source = _source(tmp_path)

    def change(config: dict[str, Any]) -> None:
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            config.pop(key, None)
        config.update(rope)

    _edit(source / "config.json", change)
    config = _config(source)
    assert (config["rope_theta"], config.get("rope_scaling")) == expected
    assert "rope_parameters" not in config


def test_what_a_saved_configuration_leaves_out_is_filled_in(tmp_path: Path) -> None:
    source = _source(tmp_path, num_key_value_heads=4)

    def change(config: dict[str, Any]) -> None:
        for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "hidden_act", "tie_word_embeddings"):
            config.pop(key, None)

    _edit(source / "config.json", change)
    expected = {"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    assert expected.items() <= _config(source).items()


def test_a_tensor_of_another_dtype_is_named_with_what_is_supported(tmp_path: Path) -> None:
    source = _source(tmp_path, dtype=torch.float64)
    with pytest.raises(UnsupportedTensorError, match="is F64; supported are F32, F16, BF16"):
        _prepare(source)


def test_a_truncated_or_damaged_safetensors_file_is_named(tmp_path: Path) -> None:
    source = _source(tmp_path)
    path = source / "model.safetensors"
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 7, 8, 100, header_end - 1, header_end, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedSourceError, match=r"model\.safetensors"):
            _prepare(source)
    for damaged in (
        b"\xff" * 8 + content[8:],
        content.replace(b'"dtype":"F32"', b'"dtype":"BF1"', 1),
        content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        content.replace(b'"shape":[', b'"shape":{', 1),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ModelSourceError, match=r"model\.safetensors"):
            _prepare(source)


def test_nan_in_any_dtype_is_refused(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        source = _source(tmp_path, dtype=dtype)
        weights = load_file(source / "model.safetensors")
        weights["model.norm.weight"][5] = float("nan")
        save_file(weights, source / "model.safetensors")
        with pytest.raises(DamagedSourceError, match=r"model\.norm\.weight holds NaN"):
            _prepare(source)


def test_the_authors_list_of_end_tokens_is_taken_as_it_is(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    assert read_manifest(_prepare(source)).eos_token_ids == (1, 5)


def test_without_that_list_the_template_adds_its_end_token(tmp_path: Path) -> None:
    source = _source(tmp_path)
    _edit(source / "config.json", lambda config: config.update(eos_token_id=7))
    expected = {7, VOCABULARY["</s>"], VOCABULARY["<|im_end|>"]}
    assert set(read_manifest(_prepare(source)).eos_token_ids) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"chat_template": "from the settings"}, "from the settings"),
        ({"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}, "b"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, None),
        ({}, None),
    ],
)
def test_the_chat_template_is_found_where_it_is(
    written: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    source = _source(tmp_path)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **written}))
    template = _prepare(source) / "chat_template.jinja"
    assert (template.read_text() if template.is_file() else None) == expected
    (source / "chat_template.jinja").write_text("from its own file")
    assert (_prepare(source) / "chat_template.jinja").read_text() == "from its own file"


def test_bos_is_added_as_the_settings_say_or_else_as_the_post_processor_does(tmp_path: Path) -> None:
    source = _source(tmp_path)
    assert not read_manifest(_prepare(source)).add_bos
    backend = Backend.from_str(byte_level())
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])]
    )
    (source / "tokenizer.json").write_text(backend.to_str())
    manifest = read_manifest(_prepare(source))
    assert manifest.add_bos
    assert manifest.bos_token_id == VOCABULARY["<s>"]
    assert Tokenizer.open(_prepare(source)).encode("x")[:1] == [VOCABULARY["<s>"]]
    (source / "tokenizer_config.json").write_text(json.dumps(_SETTINGS | {"add_bos_token": False}))
    assert not read_manifest(_prepare(source)).add_bos


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    source = _source(tmp_path, vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(
        DamagedSourceError, match=f"has {VOCAB_SIZE} tokens, the embedding only {VOCAB_SIZE - 1}"
    ):
        _prepare(source)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "tokenizer.json").write_text('{"model": {"type": "Novel"}}')
    with pytest.raises(UnsupportedTokenizerError, match=r"tokenizer\.json"):
        _prepare(source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '"\ufffd'])
def test_a_damaged_json_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / name).write_text(content)
    with pytest.raises(DamagedSourceError, match=name.replace(".", r"\.")):
        _prepare(source)


def test_code_in_the_directory_is_never_run(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "modeling.py").write_text("raise SystemExit('executed')")
    _edit(source / "config.json", lambda config: config.update(auto_map={"AutoConfig": "modeling.Config"}))
    assert "auto_map" not in _config(source)
