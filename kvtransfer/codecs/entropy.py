"""The entropy coder: zstd, one pair of contexts per thread, never more output than was announced."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

LEVEL = 1  # what is left after the transforms has no repetitions worth a search: only the Huffman stage pays

MAX_WINDOW_BYTES = 8 << 20  # a frame may ask for no more memory than this beside its output


class _Contexts(threading.local):
    """zstd's contexts must not be used by two threads at once, and cost more to make than a small piece."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)


_contexts = _Contexts()


def compress(data: Buffer) -> bytes:
    """One zstd frame that declares its content size."""
    return _contexts.compressor.compress(memoryview(data))


def decompress(data: Buffer, num_bytes: int) -> bytes:
    """Exactly `num_bytes`, or ValueError. The frame's own word on its size is checked before anything is
    allocated, so a bomb costs nothing."""
    frame = memoryview(data)
    try:
        declared = zstandard.frame_content_size(frame)
        if declared != num_bytes:
            raise ValueError(f"a zstd frame of {declared} bytes where {num_bytes} belong")
        content = _contexts.decompressor.decompress(
            frame, max_output_size=num_bytes, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"not a zstd frame of {num_bytes} bytes: {error}") from None
    if len(content) != num_bytes:
        raise ValueError(f"a zstd frame gave {len(content)} bytes, it declared {num_bytes}")
    return content
