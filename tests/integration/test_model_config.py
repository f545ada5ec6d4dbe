"""config.json: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from engine.models.config import ModelConfig
from engine.models.config_keys import Architecture, ModelConfigError
from engine.models.rope_config import RopeConfig, RopeType

pytestmark = pytest.mark.integration

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.parse(SMOLLM2 | changes, "config.json")


def refusal(**changes: Any) -> str:
    with pytest.raises(ModelConfigError) as caught:
        parse(**changes)
    return str(caught.value)


def test_smollm2_is_read_whole() -> None:
    assert parse() == ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        rope=RopeConfig(theta=100000.0),
    )


def test_a_config_is_read_from_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    assert ModelConfig.open(tmp_path) == parse()


@pytest.mark.parametrize(
    ("hf_config", "biases_and_norm"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), (False, False, False)),
        (LlamaConfig(architectures=["LlamaForCausalLM"], attention_bias=True), (True, True, False)),
        (Qwen2Config(architectures=["Qwen2ForCausalLM"]), (True, False, False)),
        (Qwen3Config(architectures=["Qwen3ForCausalLM"]), (False, False, True)),
        (Qwen3Config(architectures=["Qwen3ForCausalLM"], attention_bias=True), (True, True, True)),
    ],
)
def test_what_transformers_writes_is_read(
    hf_config: PreTrainedConfig, biases_and_norm: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    hf_config.save_pretrained(tmp_path)
    config = ModelConfig.open(tmp_path)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == biases_and_norm
    assert config.head_dim == getattr(hf_config, "head_dim", 4096 // 32)
    assert config.num_kv_heads == hf_config.num_key_value_heads
    assert config.rope == RopeConfig(theta=hf_config.rope_parameters["rope_theta"])


def test_old_llama_configs_without_kv_heads_have_one_per_query_head() -> None:
    raw = {key: value for key, value in SMOLLM2.items() if key != "num_key_value_heads"}
    assert ModelConfig.parse(raw).num_kv_heads == 9


def test_qwen3_heads_are_128_wide_unless_the_config_says_otherwise() -> None:
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert parse(**qwen3).head_dim == 128
    assert parse(**qwen3, head_dim=64).head_dim == 64


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = parse(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    raw = {key: value for key, value in SMOLLM2.items() if not key.startswith("rope")}
    new = ModelConfig.parse(raw | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}})
    assert old == new
    assert new.rope.type is RopeType.LLAMA3
    assert new.rope.theta == 500000.0


def test_the_oldest_spelling_of_the_rope_type_is_read() -> None:
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).rope == RopeConfig(
        type=RopeType.LINEAR, theta=100000.0, factor=2.0
    )


def test_yarn_takes_its_factor_from_the_two_lengths_where_it_is_not_given() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    assert parse(rope_scaling=yarn).rope.factor == 4.0


def test_an_original_length_beside_the_rope_settings_has_priority() -> None:
    config = parse(rope_scaling=LLAMA3_ROPE, original_max_position_embeddings=4096)
    assert config.rope.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("rope_scaling", "max_context"),
    [
        (None, 8192),
        ({"type": "linear", "factor": 2.0}, 8192),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
    ],
)
def test_the_context_is_what_the_positions_are_good_for(
    rope_scaling: dict[str, Any] | None, max_context: int
) -> None:
    assert parse(rope_scaling=rope_scaling).max_context == max_context


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelConfigError, match=f"config.json: {key}: is missing"):
        ModelConfig.parse({name: value for name, value in SMOLLM2.items() if name != key}, "config.json")


@pytest.mark.parametrize("value", ["many", True, 0, -3, 2.5, [9], float("nan"), float("inf"), 10**400])
def test_a_wrong_value_is_named(value: object) -> None:
    assert refusal(num_hidden_layers=value).startswith("config.json: num_hidden_layers: is ")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "architectures", "qwen2"),
        ({"model_type": "mistral", "architectures": None}, "model_type", "llama (LlamaForCausalLM)"),
        ({"model_type": None, "architectures": None}, "model_type", "is missing; supported are llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures", "does not fit model_type 'llama'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures", "is not supported"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures", "is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act", "supported is silu"),
        ({"mlp_bias": True}, "mlp_bias", "without biases"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "original weights"),
        ({"num_attention_heads": 10}, "head_dim", "do not divide hidden_size 576"),
        ({"num_key_value_heads": 2}, "num_key_value_heads", "does not divide 9"),
        ({"head_dim": 63}, "head_dim", "even"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "whole head"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "sliding-window"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type", "default, linear, dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor", "is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor", "a number"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            "rope_scaling.mrope_section",
            "supported",
        ),
        ({"rope_scaling": ["linear"]}, "rope_scaling", "an object is needed"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "rope_scaling.high_freq_factor", "above"),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn"}}, "rope_scaling.rope_theta", "above 1"),
        ({"layer_types": 3}, "layer_types", "a list is needed"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention", "not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], key: str, words: str) -> None:
    message = refusal(**changes)
    assert message.startswith(f"config.json: {key}: ")
    assert words in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
rope_values = st.dictionaries(st.sampled_from(sorted(LLAMA3_ROPE)) | st.just("rope_theta"), json_values)


@settings(deadline=None, max_examples=200)
@given(
    changes=st.dictionaries(
        st.sampled_from([*SMOLLM2, "head_dim", "layer_types", "rope_parameters", "use_sliding_window"]),
        json_values,
        max_size=3,
    ),
    rope_scaling=st.none() | rope_values,
    rope_type=st.sampled_from(RopeType),
)
def test_whatever_a_config_holds_it_is_read_or_refused(
    changes: dict[str, Any], rope_scaling: dict[str, Any] | None, rope_type: RopeType
) -> None:
    if rope_scaling is not None:
        changes = changes | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0} | rope_scaling}
    try:
        config = parse(**changes)
    except ModelConfigError as error:
        assert str(error).startswith("config.json: ")
    else:
        assert config.max_context >= 1
        assert config.num_heads % config.num_kv_heads == 0


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_an_active_sliding_window_is_refused(architecture: str) -> None:
    qwen = {"architectures": [architecture], "model_type": architecture[:5].lower(), "head_dim": 64}
    window = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}
    assert "use_sliding_window: sliding-window attention is not supported" in refusal(**qwen, **window)
    for inactive in ({"use_sliding_window": False}, {"sliding_window": None}, {"max_window_layers": 30}):
        parse(**qwen, **(window | inactive))


def test_llama_has_no_sliding_window_whatever_its_config_says() -> None:
    parse(sliding_window=4096)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"{", "not JSON"), (b"[]", "list; an object"), (b"\xff\xfe{", "not JSON")],
)
def test_a_file_that_is_no_config_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError, match=words) as caught:
        ModelConfig.open(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
