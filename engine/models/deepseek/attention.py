"""Attention of many heads over keys that all of them share, the same to the last bit however a sequence is computed.

Each query row has a list of keys of its own, in tiles of KEY_TILE, ascending; every product has the shape of one row's
heads and one tile, whatever else is in the step, and tiles are merged in order (engine/attention.py). A tile that is
masked whole weighs exactly nothing, so that rows of different length may be padded to one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.attention import attend_tile, exp_column, pad_rows
from engine.models.deepseek.step import KEY_TILE

_GROUP_NUMBERS = 8 << 20  # of keys that are gathered at once
_GROUP_ROWS = 64


def row_groups(num_rows: int, numbers_per_row: int) -> Iterator[slice]:
    """Rows, as many at a time as may gather so many numbers each."""
    size = max(1, min(_GROUP_ROWS, _GROUP_NUMBERS // max(numbers_per_row, 1)))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    masked: torch.Tensor,
    value_dim: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [G, heads, D] float32, scaled; keys [G, K, D] float32, K in whole tiles, the first `value_dim` numbers of each
    are its value; masked bool [G, K]; sinks [heads]: a score that takes weight and gives nothing → [G, heads,
    value_dim]."""
    num_rows, num_heads = q.shape[:2]
    tiles = keys.view(num_rows, -1, KEY_TILE, keys.shape[-1])
    queries = pad_rows(q).unsqueeze(1).expand(-1, tiles.shape[1], -1, -1)
    o, m, total = attend_tile(queries, tiles, tiles[..., :value_dim], masked.view(num_rows, -1, 1, KEY_TILE))
    o, m, total = o[:, :, :num_heads], m[:, :, :num_heads], total[:, :, :num_heads]
    peak = m.amax(dim=1)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.view(1, -1, 1))
    weight = exp_column(m - peak.unsqueeze(1))
    acc, norm = o[:, 0] * weight[:, 0], total[:, 0] * weight[:, 0]
    for tile in range(1, tiles.shape[1]):
        acc += o[:, tile] * weight[:, tile]
        norm += total[:, tile] * weight[:, tile]
    if sinks is not None:
        norm += exp_column(sinks.view(1, -1, 1) - peak)
    return acc / norm
