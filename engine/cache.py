"""The KV cache in memory: one tensor per plane, addressed by block, read and written by entry.

Implements kvtransfer's CacheStore. Whose block is whose is the pool's business; this only turns an owner's
positions into slots. Storage is [layers, heads, slots, width], so that the keys of a tile are one gather.
The last block belongs to nobody: padding rows write there and padded tiles read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gqa_layout(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: str, block_tokens: int
) -> CacheLayout:
    """Two paged planes, one entry a token: the cache of grouped-query attention."""

    def plane(name: str, scale_along: Literal["token", "channel"]) -> Plane:
        fields = (Field(name, head_dim, dtype),)
        return Plane(name, num_layers, Paged(1), num_kv_heads, fields, scale_along)

    return CacheLayout((plane("k", "channel"), plane("v", "token")), block_tokens)


class PagedCache:
    """Tensors of every plane of `layout`, zeroed, for `num_blocks` blocks and the padding block.

    `planes[name]` has shape [layers, heads, (num_blocks + 1) * block_tokens, width].
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_blocks: int,
        device: torch.device,
        blocks_of: Callable[[bytes], Sequence[int]],
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.padding_block = num_blocks
        self._blocks_of = blocks_of
        self.planes = {
            plane.name: torch.zeros(
                (plane.layers, plane.heads, (num_blocks + 1) * layout.block_tokens, plane.fields[0].width),
                dtype=DTYPES[plane.fields[0].dtype],
                device=device,
            )
            for plane in layout.planes
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all planes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.planes.values())

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The piece's canonical bytes (see CacheStore)."""
        source = self._cut(piece).index_select(2, self._slots(owner, piece))
        rows = source.transpose(1, 2).to(DTYPES[wire.fields[0].dtype]).contiguous()
        raw = rows.view(torch.uint8).reshape(-1)
        return raw if out is None else out.copy_(raw)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        """Write a piece that `gather` gave, here or on another worker."""
        target = self._cut(piece)
        shape = (len(piece.layers), len(piece.entries), len(piece.heads), target.shape[-1])
        raw = data.view(DTYPES[wire.fields[0].dtype])
        rows = raw.view(shape).transpose(1, 2).to(target.device, target.dtype)
        target.index_copy_(2, self._slots(owner, piece), rows)

    def fence(self) -> None:
        """Wait until everything scattered can be read by the next step."""
        if next(iter(self.planes.values())).is_cuda:
            torch.cuda.synchronize()

    def copy_blocks(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole blocks within the cache."""
        if source:
            source_slots, target_slots = self._block_slots(source), self._block_slots(target)
            for tensor in self.planes.values():
                tensor.index_copy_(2, target_slots, tensor.index_select(2, source_slots))

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero blocks whose contents may be NaN: even masked positions enter a product with 0."""
        if blocks:
            for tensor in self.planes.values():
                tensor.index_fill_(2, self._block_slots(blocks), 0)

    def _cut(self, piece: Piece) -> torch.Tensor:
        plane = self.planes[piece.plane]
        return plane[piece.layers.start : piece.layers.stop, piece.heads.start : piece.heads.stop]

    def _slots(self, owner: bytes, piece: Piece) -> torch.Tensor:
        positions = np.arange(piece.entries.start, piece.entries.stop)
        size = self.layout.block_tokens
        blocks = np.asarray(self._blocks_of(owner), dtype=np.int64)
        slots = blocks[positions // size] * size + positions % size
        return torch.from_numpy(slots).to(self.planes[piece.plane].device)

    def _block_slots(self, blocks: Sequence[int]) -> torch.Tensor:
        size = self.layout.block_tokens
        slots = np.asarray(blocks, dtype=np.int64)[:, None] * size + np.arange(size)
        return torch.from_numpy(slots.reshape(-1)).to(next(iter(self.planes.values())).device)
