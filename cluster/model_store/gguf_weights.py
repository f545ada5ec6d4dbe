"""GGUF tensors as Hugging Face tensors: names, dequantization, and the row order of Llama's Q and K.

Sources in F32, F16 and BF16 are passed on as they are. Quantized ones become float32, because block scale
times integer is exact in no narrower type: what is served is then exactly what the file says, and narrowing
is the profile's choice (`model.precision`), made once more at load and never silently here.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cluster.model_store.errors import UnsupportedArchitectureError, UnsupportedTensorError
from cluster.model_store.gguf_header import GgufFile, GgufTensor
from cluster.model_store.tensors import CHUNK_BYTES, ITEM_BYTES, SourceTensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
RowOrder = np.ndarray[Any, np.dtype[np.int64]]

_STORED_AS_IS = {
    GGMLQuantizationType.F32: "F32",
    GGMLQuantizationType.F16: "F16",
    GGMLQuantizationType.BF16: "BF16",
}
_DEQUANTIZED = (
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
)
SUPPORTED_TYPES = tuple(kind.name for kind in (*_STORED_AS_IS, *_DEQUANTIZED))

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

# Not weights: the rotary frequencies are mapped to configuration by gguf_config.
CONFIGURATION_TENSORS = frozenset({"rope_freqs.weight"})


def gguf_tensors(file: GgufFile, config: Mapping[str, Any]) -> list[SourceTensor]:
    """Every weight of `file` under its Hugging Face name. Nothing is read before `chunks()` is called.

    Raises UnsupportedTensorError (type) or UnsupportedArchitectureError (a tensor that has no place).
    """
    return [_convert(file, t, config) for t in file.tensors.values() if t.name not in CONFIGURATION_TENSORS]


def _convert(file: GgufFile, tensor: GgufTensor, config: Mapping[str, Any]) -> SourceTensor:
    name = _hugging_face_name(file, tensor.name)
    if tensor.type not in _STORED_AS_IS and tensor.type not in _DEQUANTIZED:
        raise UnsupportedTensorError(
            f"{file.path}: tensor {tensor.name} is {tensor.type.name}; supported are"
            f" {', '.join(SUPPORTED_TYPES)}"
        )
    dtype = _STORED_AS_IS.get(tensor.type, "F32")
    order = _row_order(name, tensor.shape, config)
    return SourceTensor(name, dtype, tensor.shape, file.path, lambda: _chunks(file, tensor, order))


def _hugging_face_name(file: GgufFile, name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedArchitectureError(
            f"{file.path}: tensor {name} has no place in a dense Llama, Qwen2 or Qwen3 model"
        )
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _row_order(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> RowOrder | None:
    """Row i of the Hugging Face tensor is row order[i] of the file's; None where the order is the same.

    llama.cpp turns interleaved pairs (2i, 2i+1) where Hugging Face turns halves (i, i + d/2), and its
    converter reorders the rows of a Llama's Q and K for that (`permute` in convert_hf_to_gguf). Qwen's are
    not reordered.
    """
    if config["model_type"] != "llama":
        return None
    if ".q_proj." in name:
        num_heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        num_heads = config["num_key_value_heads"]
    else:
        return None
    if shape[0] % (2 * num_heads):
        return None  # the check of shapes against the configuration reports it
    rows = np.arange(shape[0], dtype=np.int64).reshape(num_heads, shape[0] // num_heads // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _chunks(file: GgufFile, tensor: GgufTensor, order: RowOrder | None) -> Iterator[Bytes]:
    """Row-major bytes of `tensor` in its stored dtype (float32 if quantized), about CHUNK_BYTES at a time."""
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor.type]
    row_elements = tensor.shape[-1] if len(tensor.shape) > 1 or block_elements > 1 else 1
    num_rows = prod(tensor.shape) // row_elements
    raw = file.raw(tensor).reshape(num_rows, row_elements // block_elements * block_bytes)
    item_bytes = ITEM_BYTES[_STORED_AS_IS.get(tensor.type, "F32")]
    step = max(1, CHUNK_BYTES // (row_elements * item_bytes))
    for start in range(0, num_rows, step):
        rows = raw[start : start + step] if order is None else raw[order[start : start + step]]
        if tensor.type not in _STORED_AS_IS:
            rows = dequantize(rows, tensor.type)
        yield np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
