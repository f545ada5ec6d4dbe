"""The weights of a prepared model directory: every name and shape checked before one is used, each mapped into memory
for as long as it is used.

Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. Nothing is unpickled, and
nothing outside the directory is opened. Knows where tensors lie, not what is computed with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.models.config import ModelConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

_SUFFIX = ".safetensors"
_DTYPES = {"F32", "F16", "BF16"}
_HEADER_LENGTH_BYTES = 8
# Computed from the config instead; older checkpoints carry them.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_NUM_NAMED = 3


class WeightsError(ValueError):
    """Weights that cannot be served; the message names the file and the tensor."""


class _TensorSlice(Protocol):
    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class _TensorFile(Protocol):
    """What is used of `safetensors.safe_open`, which has no types of its own."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...

    def get_slice(self, name: str) -> _TensorSlice: ...


class Weights:
    """Tensors by name, each in which file; made by `open_weights`, which has checked that all are there."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def get(self, name: str) -> torch.Tensor:
        """A tensor in the dtype of its file (float32, float16 or bfloat16), a view of the mapped file: do not
        write.

        Raises:
            KeyError: `name` is not a tensor of this model.
        """
        # Mapped anew each time: of a file that stays mapped every page that was ever read stays in memory.
        return _open_file(self._files[name]).get_tensor(name)

    def fused(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        """The rows of several matrices (or biases) below one another, in memory of their own, converted to
        `dtype`.

        Raises:
            KeyError: one of `names` is not a tensor of this model.
        """
        parts = [self.get(name) for name in names]
        rows = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=dtype)
        start = 0
        for part in parts:
            rows[start : start + len(part)].copy_(part)
            start += len(part)
        return rows


def open_weights(model_dir: Path, config: ModelConfig) -> Weights:
    """Map the weights in `model_dir` and check them against `config`.

    Raises:
        WeightsError: a file is missing, truncated or damaged; a tensor is missing, unknown, or of another
            shape or dtype than the config says.
    """
    files: dict[str, Path] = {}
    for path in _weight_files(model_dir):
        opened = _open_file(path)
        _check_tensors(path, opened, config)
        for name in opened.keys():  # noqa: SIM118 - not iterable
            if name in files:
                raise WeightsError(f"{path}: tensor {name} is in another file of the model too")
            files[name] = path
    weights = Weights(files)
    _check_complete(model_dir, files, weights, config)
    return weights


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has, in Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config):
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    num_query_rows, num_key_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, num_rows in (("q", num_query_rows), ("k", num_key_rows), ("v", num_key_rows)):
        yield f"self_attn.{name}_proj.weight", (num_rows, hidden)
        if config.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (num_rows,)
    yield "self_attn.o_proj.weight", (hidden, num_query_rows)
    if config.o_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _weight_files(model_dir: Path) -> list[Path]:
    single, index = model_dir / WEIGHTS_FILE, model_dir / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise WeightsError(f"{single}: no such file, nor {INDEX_FILE}; is {model_dir} a prepared model?")
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: damaged, an object with a weight_map is needed ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != _SUFFIX:
            raise WeightsError(
                f"{index}: weight_map names {name!r}; a *{_SUFFIX} file in the same directory is needed"
            )
    return [model_dir / name for name in sorted(names)]


def _open_file(path: Path) -> _TensorFile:
    try:
        opened: _TensorFile = safe_open(path, framework="pt")
        return opened
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file, though {INDEX_FILE} names it") from error
    except (SafetensorError, OSError) as error:
        where = _first_cut_tensor(path)
        problem = f"truncated: it ends within or before tensor {where}" if where else f"damaged ({error})"
        raise WeightsError(f"{path}: {problem}; prepare the model again") from error


def _first_cut_tensor(path: Path) -> str | None:
    """The first tensor whose bytes the file does not have whole; None where the header cannot tell."""
    try:
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            data_start = _HEADER_LENGTH_BYTES + header_length
            num_bytes = path.stat().st_size
            if data_start > num_bytes:
                return None
            header = json.loads(file.read(header_length))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        cut = {name: end for name, end in ends.items() if data_start + end > num_bytes}
        return min(cut, key=lambda name: cut[name], default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _check_tensors(path: Path, opened: _TensorFile, config: ModelConfig) -> None:
    shapes = expected_shapes(config)
    for name in opened.keys():  # noqa: SIM118 - not iterable
        # A tied model may carry a copy of its embedding as output head.
        expected = shapes.get(EMBEDDING if name == OUTPUT else name)
        if expected is None:
            if name.endswith(_IGNORED_SUFFIX):
                continue
            raise WeightsError(
                f"{path}: tensor {name} is not part of a {config.architecture} model of this config; "
                "does config.json belong to these weights?"
            )
        stored = opened.get_slice(name)
        if tuple(stored.get_shape()) != expected:
            raise WeightsError(
                f"{path}: tensor {name} is {stored.get_shape()}; config.json needs {list(expected)}"
            )
        if stored.get_dtype() not in _DTYPES:
            raise WeightsError(
                f"{path}: tensor {name} is {stored.get_dtype()}; supported are {', '.join(sorted(_DTYPES))}"
            )


def _check_complete(
    model_dir: Path, files: Mapping[str, Path], weights: Weights, config: ModelConfig
) -> None:
    missing = [name for name in expected_shapes(config) if name not in files]
    if missing:
        more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
        raise WeightsError(f"{model_dir}: weights lack tensor {', '.join(missing[:_NUM_NAMED])}{more}")
    is_repeated = config.tie_word_embeddings and OUTPUT in files
    if is_repeated and not torch.equal(weights.get(OUTPUT), weights.get(EMBEDDING)):
        raise WeightsError(
            f"{model_dir}: tensor {OUTPUT} differs from {EMBEDDING}, but config.json ties them"
        )
