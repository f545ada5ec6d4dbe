"""Attention over paged keys and values, the same to the last bit however a sequence is computed.

For one query row and one tile t of keys: scores s, m_t = max s, p = exp(s - m_t), l_t = Σp, o_t = p V.
A row's result is (Σ_t w_t o_t) / (Σ_t w_t l_t) with w_t = exp(m_t - max_t m_t), summed in ascending order of
tiles. Every step of it has a fixed shape in keys (TILE_TOKENS), and query rows come in multiples of ROW_TILE,
for which the product's rows do not depend on how many there are; so a position computed alone, in a chunk
or in a batch gives the same bits (engine/probe.py checks it at start). Flash attention's split form
(Dao, 2022; "Flash-Decoding", 2023) with the split fixed by position instead of by load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.batch import TILE_TOKENS, AnswerTiles, ChunkTiles, StepBatch

ROW_TILE = 4
MASKED = -1e30  # finite: a row that a tile masks whole then weighs exactly 0 instead of NaN
SMALLEST_EXPONENT, SMALLEST_WEIGHT = -80.0, 1.81e-35  # the second just above exp of the first
EXP_LANES = 16  # one vector: shorter runs would take the scalar exponential, which rounds differently


class PagedAttention:
    """Grouped-query attention of one step against one layer of the cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._num_kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """q [T, heads, head_dim] float32; k, v [kv heads, slots, head_dim] of the layer → [T, heads · head_dim].

        The keys and values of the step's own tokens are in their slots already. Padding rows give 0.
        """
        out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=torch.float32, device=q.device)
        q = q * self._scale
        if batch.answers is not None:
            num_rows = batch.answers.num_rows
            out[:num_rows] = self._answers(q[:num_rows], k, v, batch.answers)
        for chunk in batch.chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            out[rows] = self._chunk(q[rows], k, v, chunk)
        return out

    def _answers(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: AnswerTiles) -> torch.Tensor:
        queries = self._grouped(q).transpose(0, 1)  # [kv heads, S, group, D]
        queries = pad_rows(queries)
        if len(tiles.runs) > 1:
            queries = queries.index_select(1, tiles.sequence_of_tile)
        keys, values = self._tiles(k, tiles.blocks), self._tiles(v, tiles.blocks)
        o, m, total = attend_tile(queries, keys, values, tiles.masked)
        if len(tiles.runs) > 1:  # else all weights are exactly 1
            self._weigh(o, m, total, tiles)
        acc, norm = o[:, : tiles.num_rows], total[:, : tiles.num_rows]
        for first, count in tiles.runs[1:]:
            acc[:, :count] += o[:, first : first + count]
            norm[:, :count] += total[:, first : first + count]
        result = (acc / norm)[:, :, : self._group]
        return result.transpose(0, 1).reshape(q.shape[0], -1)

    def _weigh(self, o: torch.Tensor, m: torch.Tensor, total: torch.Tensor, tiles: AnswerTiles) -> None:
        """Bring every tile's output and sum under the maximum of its sequence."""
        peak = m[:, : tiles.num_rows].clone()
        for first, count in tiles.runs[1:]:
            torch.maximum(peak[:, :count], m[:, first : first + count], out=peak[:, :count])
        weight = exp_column(m - peak.index_select(1, tiles.sequence_of_tile))
        o.mul_(weight)
        total.mul_(weight)

    def _chunk(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: ChunkTiles) -> torch.Tensor:
        # Rows in order of position, the heads of a group side by side: [kv heads, n · group, D].
        queries = self._grouped(q).transpose(0, 1).reshape(self._num_kv_heads, -1, self._head_dim)
        num_rows = queries.shape[1]
        queries = pad_rows(queries)
        keys, values = self._tiles(k, chunk.blocks), self._tiles(v, chunk.blocks)
        parts = []
        for tile in range(chunk.num_tiles):
            first = self._first_row(chunk, tile)
            masked = self._chunk_mask(chunk, tile, first, queries.shape[1], q.device)
            parts.append((first, *attend_tile(queries[:, first:], keys[:, tile], values[:, tile], masked)))
        peak = parts[0][2].clone()
        for first, _, m, _ in parts[1:]:
            torch.maximum(peak[:, first:], m, out=peak[:, first:])
        for first, o, m, total in parts:
            weight = exp_column(m - peak[:, first:])
            o.mul_(weight)
            total.mul_(weight)
        _, acc, _, norm = parts[0]
        for first, o, _, total in parts[1:]:
            acc[:, first:] += o
            norm[:, first:] += total
        result = (acc / norm)[:, :num_rows].reshape(self._num_kv_heads, -1, self._group, self._head_dim)
        return result.transpose(0, 1).reshape(q.shape[0], -1)

    def _grouped(self, q: torch.Tensor) -> torch.Tensor:
        return q.reshape(q.shape[0], self._num_kv_heads, self._group, self._head_dim)

    def _first_row(self, chunk: ChunkTiles, tile: int) -> int:
        """First query row, rounded down to a whole row tile, that sees anything of a key tile."""
        first_position = max(0, tile * TILE_TOKENS - chunk.start)
        return first_position * self._group // ROW_TILE * ROW_TILE

    def _chunk_mask(
        self, chunk: ChunkTiles, tile: int, first: int, num_rows: int, device: torch.device
    ) -> torch.Tensor | None:
        """[rows from `first`, TILE_TOKENS] true where a key lies after the row's position; None where nowhere."""
        tile_start = tile * TILE_TOKENS
        if tile_start + TILE_TOKENS <= chunk.start + 1 and first == 0:
            return None
        rows = torch.arange(first, num_rows, device=device) // self._group + chunk.start
        keys = torch.arange(tile_start, tile_start + TILE_TOKENS, device=device)
        return keys[None, :] > rows[:, None]

    def _tiles(self, plane: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Gather blocks of [kv heads, slots, D] into tiles [kv heads, tiles, TILE_TOKENS, D] in float32."""
        by_block = plane.view(plane.shape[0], -1, self._block_tokens * self._head_dim)
        gathered = by_block.index_select(1, blocks)
        return gathered.view(plane.shape[0], -1, TILE_TOKENS, self._head_dim).float()


def attend_tile(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masked: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one tile each: unnormalized output [..., rows, D], peak score and sum of weights [..., rows, 1]."""
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    if masked is not None:
        scores.masked_fill_(masked, MASKED)
    peak = scores.amax(dim=-1, keepdim=True)
    weights = exp_(scores.sub_(peak))
    return torch.matmul(weights, values), peak, weights.sum(dim=-1, keepdim=True)


def pad_rows(queries: torch.Tensor) -> torch.Tensor:
    """Zero rows up to a multiple of ROW_TILE along the second last axis."""
    missing = -queries.shape[-2] % ROW_TILE
    return F.pad(queries, (0, 0, 0, missing)) if missing else queries.contiguous()


def exp_column(x: torch.Tensor) -> torch.Tensor:
    """exp of [..., 1], each value computed in a whole vector of its own."""
    return exp_(x.expand(*x.shape[:-1], EXP_LANES).contiguous())[..., :1]


def exp_(x: torch.Tensor) -> torch.Tensor:
    """exp in place, x ≤ 0; exactly 0 from SMALLEST_EXPONENT down.

    The vectorized exponential takes results near the end of float32's range one by one, twenty times as slow;
    half of a causal mask would go that way.
    """
    return F.threshold_(x.clamp_(min=SMALLEST_EXPONENT).exp_(), SMALLEST_WEIGHT, 0.0)
