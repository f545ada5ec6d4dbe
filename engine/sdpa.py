"""Attention through torch's fused kernels, for accelerators: answers in padded shapes, chunks one by one.

Their summation order is the library's and moves with the shapes, so that the numeric contract holds within a
tolerance only (design §3.7). On a card it has not been run by the project's tests; the same code on a CPU has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch import ChunkTiles, PaddedAnswers, StepBatch


class FusedAttention:
    """Grouped-query attention of one step against one layer of the cache; in the place of PagedAttention."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, block_tokens: int) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._block_tokens = block_tokens

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """q [T, heads, head_dim] float32; k, v [kv heads, slots, head_dim] of the layer → [T, heads · head_dim]."""
        out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=torch.float32, device=q.device)
        if batch.padded is not None:
            num_rows = batch.padded.num_rows
            out[:num_rows] = self._answers(q[:num_rows], k, v, batch.padded)
        for chunk in batch.chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            out[rows] = self._chunk(q[rows], k, v, chunk)
        return out

    def _answers(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padded: PaddedAnswers
    ) -> torch.Tensor:
        keys, values = (self._gathered(plane, padded.blocks).transpose(0, 1) for plane in (k, v))
        seen = torch.arange(keys.shape[2], device=q.device) < padded.lengths[:, None]
        result = F.scaled_dot_product_attention(
            q.unsqueeze(2).to(keys.dtype), keys, values, attn_mask=seen[:, None, None, :], enable_gqa=True
        )
        return result.squeeze(2).flatten(1).float()

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: ChunkTiles) -> torch.Tensor:
        keys, values = (self._gathered(plane, chunk.blocks[None])[:, 0] for plane in (k, v))
        positions = torch.arange(chunk.start, chunk.start + chunk.num_tokens, device=q.device)
        seen = torch.arange(keys.shape[1], device=q.device) <= positions[:, None]
        result = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None].to(keys.dtype), keys[None], values[None], attn_mask=seen, enable_gqa=True
        )
        return result[0].transpose(0, 1).flatten(1).float()

    def _gathered(self, plane: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks [S, B] of [kv heads, slots, D] → [kv heads, S, B · block tokens, D]."""
        by_block = plane.view(self._num_kv_heads, -1, self._block_tokens * self._head_dim)
        taken = by_block.index_select(1, blocks.reshape(-1))
        return taken.view(self._num_kv_heads, blocks.shape[0], -1, self._head_dim)
