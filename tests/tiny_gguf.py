"""Small GGUF files, written with the `gguf` package as llama.cpp's converter writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_tokenizers import CONTROL, byte_level

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY: dict[str, int] = json.loads(byte_level())["model"]["vocab"]
VOCAB_SIZE = len(VOCABULARY)
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS = 4, 2, 16, 64, 96, 2

Tensors = dict[str, np.ndarray[Any, Any] | tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]


def write_gguf(
    path: Path, tensors: Tensors, *, arch: str = "llama", metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write `tensors` (arrays, or stored bytes with their type) and metadata; a value of None drops a key."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (default_metadata(arch) | dict(metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def default_metadata(arch: str) -> dict[str, Any]:
    """The keys of a tiny model of `arch` with a byte-level tokenizer."""
    merges = json.loads(byte_level())["model"]["merges"]
    return {
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(VOCABULARY),
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in VOCABULARY],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": VOCABULARY["<s>"],
        "tokenizer.ggml.eos_token_id": VOCABULARY["</s>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def random_tensors(
    arch: str = "llama", *, tied: bool = False, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Float32 tensors of the tiny model under their GGUF names."""
    rng = np.random.default_rng(seed)
    query, key_value = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB_SIZE, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["output.weight"] = (VOCAB_SIZE, HIDDEN)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (query, HIDDEN),
        "attn_k.weight": (key_value, HIDDEN),
        "attn_v.weight": (key_value, HIDDEN),
        "attn_output.weight": (HIDDEN, query),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    if arch == "qwen2":
        layer |= {"attn_q.bias": (query,), "attn_k.bias": (key_value,), "attn_v.bias": (key_value,)}
    if arch == "qwen3":
        layer |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
    shapes |= {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def from_hugging_face(
    state: Mapping[str, np.ndarray[Any, Any]], *, permuted: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """A state dict under GGUF names, Q and K reordered as llama.cpp's converter does for Llama."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in state.items():
        if name.startswith("model.layers."):
            _, _, index, stem = name.split(".", 3)
            module, _, kind = stem.rpartition(".")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(module)
            tensors[f"blk.{index}.{LAYER_NAMES[module]}.{kind}"] = (
                permute(value, heads) if permuted and heads is not None else value
            )
        else:
            renamed = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
            tensors[f"{renamed.get(name, 'output')}.weight"] = value
    return tensors


def permute(weights: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """From halves (i, i + d/2) to interleaved pairs (2i, 2i+1): llama.cpp's `permute`."""
    rows = weights.shape[0]
    split = weights.reshape(num_heads, 2, rows // num_heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)
