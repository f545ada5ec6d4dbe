"""A prepared model directory with a tiny random Llama, for tests that need a whole engine.

The tokenizer is a real byte-level BPE (256 bytes, some merges, four special tokens), so that any text
encodes and decodes; the weights are random, with an output head of their own so that greedy answers do
not repeat one token. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from text.tokenizer import tokenizer_digest

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGED_WORDS = ("the", "and", "ing", "Ġthe", "Ġa", "Ġof", "Ġto", "Ġin", "er", "on")


def make_tiny_model(
    directory: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 128,
    max_context: int = 512,
    add_bos: bool = False,
    nan_token_id: int | None = None,
) -> Path:
    """Writes config, weights, tokenizer and headrace.json into `directory` and returns it.

    A prompt with `nan_token_id` in it gives NaN logits: the model's way to fail one sequence.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(directory, add_bos)
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_context,
    }
    config = _llama_config(vocabulary) | sizes
    _write_json(directory / "config.json", config)
    weights = _random_weights(config, seed)
    if nan_token_id is not None:
        weights["model.embed_tokens.weight"][nan_token_id] = np.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_manifest(directory, name, vocabulary, max_context, add_bos)
    return directory


def add_tokenizer(directory: Path, name: str, max_context: int) -> int:
    """What makes a checkpoint in `directory`, of whatever architecture, a prepared model: tokenizer and headrace.json.
    Returns the size of the vocabulary."""
    vocabulary = _write_tokenizer(directory, add_bos=False)
    _write_manifest(directory, name, vocabulary, max_context, add_bos=False)
    return len(vocabulary)


def _llama_config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary["<|bos|>"],
        "eos_token_id": vocabulary["<|eos|>"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(directory: Path, add_bos: bool) -> dict[str, int]:
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _MERGED_WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": add_bos},
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    full: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return full


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], hidden)).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": linear(config["vocab_size"], hidden, gain=3.0),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": linear(queries, hidden, gain=2.0),
            prefix + "self_attn.k_proj.weight": linear(keys, hidden, gain=2.0),
            prefix + "self_attn.v_proj.weight": linear(keys, hidden),
            prefix + "self_attn.o_proj.weight": linear(hidden, queries),
            prefix + "mlp.gate_proj.weight": linear(inner, hidden),
            prefix + "mlp.up_proj.weight": linear(inner, hidden),
            prefix + "mlp.down_proj.weight": linear(hidden, inner),
        }
    return weights


def _write_manifest(
    directory: Path, name: str, vocabulary: dict[str, int], max_context: int, add_bos: bool
) -> None:
    eos_token_ids = [vocabulary["<|eos|>"], vocabulary["<|im_end|>"]]
    _write_json(directory / "generation_config.json", {"eos_token_id": eos_token_ids})
    _write_json(
        directory / "headrace.json",
        {
            "format": 1,
            "name": name,
            "source": "tests/tiny_model.py",
            "weights_digest": _digest(directory / "config.json", directory / "model.safetensors"),
            "tokenizer_digest": tokenizer_digest(directory),
            "eos_token_ids": eos_token_ids,
            "bos_token_id": vocabulary["<|bos|>"],
            "add_bos": add_bos,
            "max_context": max_context,
        },
    )


def _digest(*paths: Path) -> str:
    return hashlib.blake2b(b"".join(path.read_bytes() for path in paths), digest_size=32).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
