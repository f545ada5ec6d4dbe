"""safetensors files: written in one streaming pass, read with every length checked.

Weights pass through as bytes: numpy has no bfloat16, and a model larger than memory must still fit through.
The writer's output depends on the tensors alone (sorted, no timestamps), so its digest identifies the
weights.

Format: https://github.com/huggingface/safetensors, an 8-byte length, a JSON header, the tensors' bytes.
"""

import json
import mmap
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.model_store.errors import DamagedSourceError, SourceNotFoundError, UnsupportedTensorError
from cluster.model_store.tensors import CHUNK_BYTES, FLOAT_DTYPES, ITEM_BYTES, SourceTensor

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_ALIGNMENT_BYTES = 64  # of the first tensor, for mapped reads


class Digest(Protocol):
    """What of a hashlib object is needed."""

    def update(self, data: Any, /) -> None: ...


def write_safetensors(
    path: Path, tensors: list[SourceTensor], digest: Digest, progress: Callable[[float], None]
) -> None:
    """Write `tensors` to `path` and feed the whole file to `digest` on the way.

    `progress` gets the fraction written. Raises what reading a tensor raises (ModelSourceError).
    """
    # Wider items first keeps every tensor aligned to its own item size, as the format wants.
    ordered = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    total_bytes = max(1, sum(tensor.num_bytes for tensor in ordered))
    written_bytes = 0
    with path.open("wb") as file:
        header = _header(ordered)
        file.write(header)
        digest.update(header)
        for tensor in ordered:
            for chunk in tensor.checked_chunks():
                view = chunk.data
                file.write(view)
                digest.update(view)
                written_bytes += chunk.size
                progress(written_bytes / total_bytes)


def _header(tensors: list[SourceTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % _ALIGNMENT_BYTES)
    return len(encoded).to_bytes(8, "little") + encoded


def read_safetensors(path: Path) -> list[SourceTensor]:
    """The tensors of `path`; their bytes stay in the mapped file until asked for.

    Raises SourceNotFoundError, DamagedSourceError (truncated, corrupt) or UnsupportedTensorError (dtype).
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < 8:
                raise DamagedSourceError(f"{path}: too short for a safetensors file")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SourceNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    data = np.frombuffer(mapped, np.uint8)
    header_bytes = int.from_bytes(mapped[:8], "little")
    if header_bytes > min(_MAX_HEADER_BYTES, data.size - 8):
        raise DamagedSourceError(f"{path}: its header should have {header_bytes} bytes, which cannot be")
    try:
        header = json.loads(mapped[8 : 8 + header_bytes])
    except ValueError as error:
        raise DamagedSourceError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedSourceError(f"{path}: its header is not a JSON object")
    body = data[8 + header_bytes :]
    return [_tensor(path, body, name, entry) for name, entry in header.items() if name != "__metadata__"]


def _tensor(path: Path, body: np.ndarray[Any, Any], name: str, entry: Any) -> SourceTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSourceError(f"{path}: the entry of tensor {name} is not valid: {entry!r}") from error
    if dtype not in ITEM_BYTES:
        raise UnsupportedTensorError(
            f"{path}: tensor {name} is {dtype}; supported are {', '.join(FLOAT_DTYPES)}"
        )
    if min(shape, default=0) < 0 or not 0 <= start <= end or end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise DamagedSourceError(f"{path}: the entry of tensor {name} contradicts itself: {entry!r}")
    if end > body.size:
        raise DamagedSourceError(
            f"{path}: tensor {name} should end at byte {end} of the data, but there are {body.size}: the file"
            " is truncated; fetch it again"
        )

    def chunks() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        for offset in range(start, end, CHUNK_BYTES):
            # A copy, since a mapped slice need not be aligned to its items.
            yield np.array(body[offset : min(end, offset + CHUNK_BYTES)])

    return SourceTensor(name, dtype, shape, path, chunks)
