"""Which entries a query reads: the `top_k` of the highest scores, of equal scores the entries with the lowest index.

Scores are the lightning indexer's (arXiv:2512.02556, section 2.1): the weighted sum over its heads of ReLU(q · k).
Equal ones are common, at 0; a stated order makes the choice a function of the scores, and these of the tokens before.
"""

from __future__ import annotations

import torch

from engine.attention import pad_rows
from engine.models.deepseek.step import KEY_TILE, in_tiles
from engine.whole_vectors import sum_in_order


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [G, heads, D], weights [G, heads], keys [G, K, D] with K in whole tiles → scores [G, K]; all float32."""
    num_rows, num_heads = q.shape[:2]
    tiles = keys.view(num_rows, -1, KEY_TILE, keys.shape[-1])
    queries = pad_rows(q).unsqueeze(1).expand(-1, tiles.shape[1], -1, -1)
    products = torch.matmul(queries, tiles.transpose(-1, -2))[:, :, :num_heads].relu_()
    return sum_in_order(products * weights.view(num_rows, 1, num_heads, 1), 2).view(num_rows, -1)


def best_entries(
    scores: torch.Tensor, visible: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [G, K], of which a row may read the first `visible` [G], K ≥ top_k → entries int64 [G, top_k in whole
    tiles], ascending, and `masked` bool of the same shape where there are fewer."""
    num_rows, num_entries = scores.shape
    hidden = torch.arange(num_entries, device=scores.device) >= visible.unsqueeze(1)
    # What is not a number is read, so that its sequence fails, and its row chooses as many as others do.
    scores = scores.masked_fill(scores.isnan(), float("inf")).masked_fill(hidden, float("-inf"))
    least = scores.topk(top_k, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    left = top_k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= left))
    entries = chosen.nonzero()[:, 1].view(num_rows, top_k)
    entries = torch.nn.functional.pad(entries, (0, in_tiles(top_k) - top_k), value=num_entries - 1)
    masked = entries >= visible.unsqueeze(1)
    masked[:, top_k:] = True
    return entries, masked
