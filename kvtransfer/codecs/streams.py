"""How the byte streams of a payload are written one behind the other, and read back without trusting them.

A stream is
    u8   how: 0 stored, 1 one zstd frame that declares its content size
    u32  number of bytes that follow, little endian
    …    the bytes
How many bytes a stream decodes to is never read from it: the reader knows it from the piece.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch

from kvtransfer.codecs.entropy import compress, decompress
from kvtransfer.codecs.memory import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

STORED, ZSTD = 0, 1

_HEAD = struct.Struct("<BI")
_PAYS = 0.98  # a stream that shrinks less is stored: decoding it would cost more than it saves
_NO_PAYOFF_BELOW = 32  # bytes: a zstd frame is no smaller


class StreamWriter:
    """Collects streams in host memory."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []
        self.num_bytes = 0

    def value(self, form: struct.Struct, number: int) -> None:
        """One number, without a stream around it."""
        self._add(form.pack(number))

    def put(self, tensors: Sequence[torch.Tensor], coded: Sequence[bool]) -> None:
        """A stream for each of `tensors` (any dtype), entropy-coded where `coded` says that it may pay.

        From an accelerator they come in one copy.
        """
        for data, may_pay in zip(_to_host(tensors), coded, strict=True):
            raw = data.numpy().data
            packed = compress(raw) if may_pay and len(raw) >= _NO_PAYOFF_BELOW else None
            if packed is not None and len(packed) < len(raw) * _PAYS:
                self._stream(ZSTD, packed)
            else:
                self._stream(STORED, raw)

    def _stream(self, how: int, data: Buffer) -> None:
        self._add(_HEAD.pack(how, len(memoryview(data))))
        self._add(data)

    def _add(self, data: Buffer) -> None:
        self.parts.append(data)
        self.num_bytes += len(memoryview(data))


class StreamReader:
    """Reads what a StreamWriter wrote. Every method raises ValueError for bytes that cannot be that."""

    def __init__(self, data: Buffer) -> None:
        self._rest = memoryview(data)

    def value(self, form: struct.Struct) -> int:
        (number,) = form.unpack(self.take(form.size))
        return int(number)

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes as they are."""
        if num_bytes > len(self._rest):
            raise ValueError(f"the payload ends {num_bytes - len(self._rest)} bytes early")
        taken, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return taken

    def stream(self, num_bytes: int) -> torch.Tensor:
        """A stream that decodes to uint8 [num_bytes]; not to be written to."""
        how, length = _HEAD.unpack(self.take(_HEAD.size))
        data = self.take(length)
        if how == ZSTD:
            return readable(decompress(data, num_bytes))
        if how != STORED or length != num_bytes:
            raise ValueError(f"a stream of kind {how} with {length} bytes, expected {num_bytes}")
        return readable(data)

    def end(self) -> None:
        """Nothing may follow."""
        if len(self._rest):
            raise ValueError(f"{len(self._rest)} bytes too many in the payload")


def _to_host(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    if all(tensor.device.type == "cpu" for tensor in flat):
        return flat
    return torch.split(torch.cat(flat).cpu(), [len(tensor) for tensor in flat])
