"""Models with random weights: a real architecture at a small size, to try everything but the answers' sense.

Weights are a function of their names, so that every machine makes the same model.
"""

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.model_store.source import ModelSource, TokenizerSource
from cluster.model_store.tensors import CHUNK_BYTES, SourceTensor
from engine.models.config_keys import ConfigKeys
from engine.models.families import config_of
from engine.models.shapes import expected_shapes

_HOME = Path(__file__).parent / "random"
_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FLOATS_AT_ONCE = CHUNK_BYTES // 4


def random_names() -> list[str]:
    """Of all random models."""
    return sorted(path.stem for path in _HOME.glob("*.json"))


def random_source(name: str) -> ModelSource:
    """The random model of a name in `random_names`."""
    path = _HOME / f"{name}.json"
    tokenizer = _byte_tokenizer()
    config = json.loads(path.read_text(encoding="utf-8")) | {"vocab_size": tokenizer.get_vocab_size()}
    shapes = expected_shapes(config_of(ConfigKeys(config, path.name)))
    return ModelSource(
        description="random weights",
        suggested_name=name,
        config=config,
        tensors=[_tensor(tensor, shape, config, path) for tensor, shape in shapes.items()],
        tokenizer=TokenizerSource(
            tokenizer_json=tokenizer.to_str(),
            settings={"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": False},
            chat_template=_CHAT_TEMPLATE,
            eos_token_ids=(len(pre_tokenizers.ByteLevel.alphabet()) + _SPECIAL_TOKENS.index("<|eos|>"),),
            eos_is_complete=True,
        ),
    )


def _byte_tokenizer() -> Tokenizer:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    return tokenizer


def _tensor(name: str, shape: tuple[int, ...], config: dict[str, Any], origin: Path) -> SourceTensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    if name.endswith(".tid2eid"):
        return SourceTensor(name, "I64", shape, origin, lambda: _expert_table(seed, shape, config))
    return SourceTensor(name, "F32", shape, origin, lambda: _numbers(seed, name, shape))


def _numbers(seed: int, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(seed)
    is_norm = "norm" in name and len(shape) == 1 and name.endswith(".weight")
    gain = 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.2
    for start in range(0, prod(shape), _FLOATS_AT_ONCE):
        count = min(_FLOATS_AT_ONCE, prod(shape) - start)
        numbers = rng.standard_normal(count, np.float32) * np.float32(gain) + np.float32(is_norm)
        yield numbers.astype(np.float32).view(np.uint8)


def _expert_table(
    seed: int, shape: tuple[int, ...], config: dict[str, Any]
) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """For each token as many different experts as it takes."""
    order = np.random.default_rng(seed).random((shape[0], config["n_routed_experts"])).argsort(axis=1)
    yield np.ascontiguousarray(order[:, : shape[1]].astype(np.int64)).view(np.uint8).reshape(-1)
