"""A tensor on its way into the store: its name, dtype and shape, and its bytes in bounded chunks.

Nothing here knows where the bytes come from or what they mean.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cluster.model_store.errors import DamagedSourceError

ITEM_BYTES: Mapping[str, int] = {
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
}
FLOAT_DTYPES = ("F32", "F16", "BF16")
CHUNK_BYTES = 8 << 20

# The bits that are all set in an infinity or a NaN, for each dtype that has them.
_EXPONENT: Mapping[str, np.unsignedinteger[Any]] = {
    "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F8_E4M3": np.uint8(0x7F),
    "F8_E8M0": np.uint8(0xFF),
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor under its Hugging Face name.

    `dtype` is a safetensors name (one of ITEM_BYTES); `chunks()` yields its little-endian row-major bytes
    in order, about CHUNK_BYTES at a time, and raises ModelSourceError where the source is damaged.
    `origin` is the file that it comes from, for messages.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: Path
    chunks: Callable[[], Iterator[np.ndarray[Any, np.dtype[np.uint8]]]]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def checked_chunks(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """`chunks()`, refusing NaN and infinity: no sound weight has them, and one poisons every answer.

        Raises DamagedSourceError, also when the chunks' lengths do not add up to `num_bytes`.
        """
        mask, total_bytes = _EXPONENT.get(self.dtype), 0
        for chunk in self.chunks():
            if mask is not None and ((chunk.view(mask.dtype) & mask) == mask).any():
                raise DamagedSourceError(
                    f"{self.origin}: tensor {self.name} holds NaN or infinity: the file is damaged"
                )
            total_bytes += chunk.size
            yield chunk
        if total_bytes != self.num_bytes:
            raise DamagedSourceError(
                f"{self.origin}: tensor {self.name} has {total_bytes} bytes, not {self.num_bytes}"
            )
