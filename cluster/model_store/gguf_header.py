"""The header of a GGUF file: metadata and the place of each tensor, checked against the file's size.

The `gguf` package's own reader builds a view per metadata element (seconds for a vocabulary) and, given a
damaged count, loops over empty views for ever; this one reads the same format with every length checked
before it is used. It knows nothing of models: names and numbers only.

Format: the GGUF specification, versions 2 and 3, little-endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cluster.model_store.errors import DamagedSourceError, SourceNotFoundError, UnsupportedSourceError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT_BYTES = 32
_MAX_DIMENSIONS = 4
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8"}
_SCALARS |= {11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in row-major order, the reverse of the file's own."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A mapped GGUF file: its metadata (scalars, strings, lists) and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    def raw(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes of `tensor`, uint8[num_bytes], a view of the mapped file."""
        return self.data[tensor.offset_bytes : tensor.offset_bytes + tensor.num_bytes]


def open_gguf(path: Path) -> GgufFile:
    """Map `path` and read its header.

    Raises SourceNotFoundError, DamagedSourceError (truncated, corrupt) or UnsupportedSourceError (version).
    """
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            if size_bytes < 24:
                raise DamagedSourceError(f"{path}: {size_bytes} bytes are too few for a GGUF file")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SourceNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    cursor = _Cursor(path, mapped)
    num_tensors, num_keys = _read_preamble(cursor)
    metadata = _read_metadata(cursor, num_keys)
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedSourceError(
            f"{path}: one of {metadata['split.count']} parts; merge them with `llama-gguf-split --merge`"
        )
    tensors = _read_tensors(cursor, num_tensors, metadata)
    return GgufFile(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


class _Cursor:
    """A reading position in the mapped file that never passes its end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.offset = 0
        self._buffer = buffer
        self.size = len(buffer)

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.size - self.offset:
            raise self.damaged(f"ends within {what}: the file is truncated or damaged")
        start, self.offset = self.offset, self.offset + num_bytes
        return self._buffer[start : self.offset]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def damaged(self, reason: str) -> DamagedSourceError:
        return DamagedSourceError(f"{self.path}: {reason} (at byte {self.offset})")


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic number")
    if magic != _MAGIC:
        raise cursor.damaged(f"not a GGUF file: it starts with {magic!r} where {_MAGIC!r} was expected")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        raise UnsupportedSourceError(
            f"{cursor.path}: GGUF version {version:#x} cannot be read; supported are little-endian 2 and 3"
        )
    num_tensors, num_keys = cursor.u64("the tensor count"), cursor.u64("the key count")
    # A tensor's entry takes 32 bytes at least, a key's 13: more of them than fit is damage, not data.
    if num_tensors * 32 + num_keys * 13 > cursor.size:
        raise cursor.damaged(f"claims {num_tensors} tensors and {num_keys} keys, which cannot fit in it")
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        metadata[key] = _read_value(cursor, cursor.u32(f"the type of {key}"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of {key}")
    if kind == _ARRAY:
        return _read_array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.damaged(f"{key} has the unknown value type {kind}")
    return _read_scalars(cursor, kind, 1, key)[0]


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind, length = cursor.u32(f"the type of {key}"), cursor.u64(f"the length of {key}")
    if kind == _STRING:
        if length * 8 > cursor.size - cursor.offset:
            raise cursor.damaged(f"{key} claims {length} strings, which cannot fit in the file")
        return [cursor.string(f"the value of {key}") for _ in range(length)]
    if kind not in _SCALARS:
        raise cursor.damaged(f"{key} is an array of the unknown or nested type {kind}")
    return _read_scalars(cursor, kind, length, key)


def _read_scalars(cursor: _Cursor, kind: int, length: int, key: str) -> list[Any]:
    dtype = np.dtype(_SCALARS[kind])
    raw = cursor.take(length * dtype.itemsize, f"the value of {key}")
    values = np.frombuffer(raw, dtype)
    if kind == _BOOL:
        return [bool(value) for value in values]
    if kind == _FLOAT32:
        # The shortest decimal that is the same float32, as whoever wrote 1e-05 meant it.
        return [float(str(value)) for value in values]
    return list(values.tolist())


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset_bytes in entries:
        num_bytes = _stored_bytes(cursor, name, shape, kind)
        start = data_start + offset_bytes
        if start + num_bytes > cursor.size:
            raise DamagedSourceError(
                f"{cursor.path}: tensor {name} should end at byte {start + num_bytes}, but the file has"
                f" {cursor.size}: it is truncated; fetch it again"
            )
        if name in tensors:
            raise cursor.damaged(f"tensor {name} appears twice")
        tensors[name] = GgufTensor(name, shape, kind, start, num_bytes)
    return tensors


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string("a tensor's name")
    num_dimensions = cursor.u32(f"the shape of tensor {name}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name} has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the shape of tensor {name}") for _ in range(num_dimensions))[::-1]
    kind = cursor.u32(f"the type of tensor {name}")
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError as error:
        raise cursor.damaged(f"tensor {name} has the unknown type number {kind}") from error
    return name, shape, quantization, cursor.u64(f"the offset of tensor {name}")


def _stored_bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_elements:
        raise cursor.damaged(
            f"tensor {name} has rows of {shape[-1]} elements, not a multiple of the {block_elements} of"
            f" {kind.name}"
        )
    num_elements = 1
    for extent in shape:
        num_elements *= extent
    return num_elements // block_elements * block_bytes
