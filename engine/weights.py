"""The weights of a prepared model directory: every name and shape checked before one is used, each mapped into memory
for as long as it is used.

Reads `model.safetensors`, or the shards that `model.safetensors.index.json` names. Nothing is unpickled, and
nothing outside the directory is opened. Knows where tensors lie, not what is computed with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.models.config import ModelConfig
from engine.models.deepseek.tensors import is_left_out, scale_name
from engine.models.families import AnyConfig
from engine.models.shapes import EMBEDDING, OUTPUT, expected_shapes
from engine.quantized import (
    STORED_FP4,
    STORED_FP8,
    STORED_SCALES,
    dequantized,
    scales_shape,
    stored_shape,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_DTYPES = {"F32", "F16", "BF16"}
_QUANTIZED = {STORED_FP8, STORED_FP4}
_TOKEN_TABLE, _TABLE_DTYPES = ".tid2eid", {"I64", "I32"}
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
        """A tensor in the dtype of its file (float32, float16, bfloat16, or integers for a table), a view of the mapped
        file: do not write. Quantized ones in float32, in memory of their own.

        Raises:
            KeyError: `name` is not a tensor of this model.
        """
        # Mapped anew each time: of a file that stays mapped every page that was ever read stays in memory.
        stored = _open_file(self._files[name]).get_tensor(name)
        scales = scale_name(name)
        if scales is None or scales not in self._files:
            return stored
        return dequantized(stored, _open_file(self._files[scales]).get_tensor(scales))

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


def open_weights(model_dir: Path, config: AnyConfig) -> Weights:
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


def _check_tensors(path: Path, opened: _TensorFile, config: AnyConfig) -> None:
    shapes = expected_shapes(config)
    scales = {scale_name(name): name for name in shapes} if not isinstance(config, ModelConfig) else {}
    for name in opened.keys():  # noqa: SIM118 - not iterable
        # A tied model may carry a copy of its embedding as output head.
        expected = shapes.get(EMBEDDING if name == OUTPUT else name)
        stored = opened.get_slice(name)
        if expected is not None:
            _check_tensor(path, name, stored, expected, is_quantizable=not isinstance(config, ModelConfig))
        elif name in scales:
            if stored.get_dtype() not in STORED_SCALES:
                raise WeightsError(
                    f"{path}: tensor {name} is {stored.get_dtype()}; scales are {' or '.join(STORED_SCALES)}"
                )
        elif not name.endswith(_IGNORED_SUFFIX) and (
            isinstance(config, ModelConfig) or not is_left_out(config, name)
        ):
            raise WeightsError(
                f"{path}: tensor {name} is not part of a {config.architecture} model of this config; "
                "does config.json belong to these weights?"
            )


def _check_tensor(
    path: Path, name: str, stored: _TensorSlice, expected: tuple[int, ...], is_quantizable: bool
) -> None:
    dtype = stored.get_dtype()
    supported = _TABLE_DTYPES if name.endswith(_TOKEN_TABLE) else _DTYPES
    if is_quantizable and len(expected) == 2 and name.endswith(".weight"):
        supported = supported | _QUANTIZED
    if dtype in supported:
        expected = stored_shape(expected, dtype)
    if tuple(stored.get_shape()) != expected:
        raise WeightsError(
            f"{path}: tensor {name} is {stored.get_shape()}; config.json needs {list(expected)}"
        )
    if dtype not in supported:
        raise WeightsError(f"{path}: tensor {name} is {dtype}; supported are {', '.join(sorted(supported))}")


def _check_complete(model_dir: Path, files: Mapping[str, Path], weights: Weights, config: AnyConfig) -> None:
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in files]
    if missing:
        more = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
        raise WeightsError(f"{model_dir}: weights lack tensor {', '.join(missing[:_NUM_NAMED])}{more}")
    if not isinstance(config, ModelConfig):
        _check_scales(files, shapes)
    is_repeated = config.tie_word_embeddings and OUTPUT in files
    if is_repeated and not torch.equal(weights.get(OUTPUT), weights.get(EMBEDDING)):
        raise WeightsError(
            f"{model_dir}: tensor {OUTPUT} differs from {EMBEDDING}, but config.json ties them"
        )


def _check_scales(files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every quantized tensor has the scales that it needs, and no other has any."""
    opened = {path: _open_file(path) for path in set(files.values())}
    for name, shape in shapes.items():
        dtype, scales = opened[files[name]].get_slice(name).get_dtype(), scale_name(name)
        if (dtype in _QUANTIZED) != (scales in files):
            problem = "lacks its scales" if dtype in _QUANTIZED else "has scales, but is not quantized"
            raise WeightsError(f"{files[name]}: tensor {name} is {dtype} and {problem} ({scales})")
        if scales is None or scales not in files:
            continue
        found, needed = tuple(opened[files[scales]].get_slice(scales).get_shape()), scales_shape(shape, dtype)
        if found != needed:
            raise WeightsError(
                f"{files[scales]}: tensor {scales} is {list(found)}; {name} of {dtype} needs {list(needed)}"
            )
