"""Mixtures of experts, grouped by expert: an expert's product is one for all rows that take it.

A row's sum is in ascending order of its experts, whichever other rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.linear import MIN_ROWS, Product
from engine.models.deepseek.config import MoeConfig
from engine.whole_vectors import in_whole_vectors

_LEAST_SUM = 1e-20  # of the weights of a row's experts

SCORINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt_(),
}


class ClampedMLP:
    """down(silu(min(gate, limit)) · clamp(up, ±limit)), gate and up in one product."""

    def __init__(self, gate_up: Product, down: Product, limit: float = float("inf")) -> None:
        self._gate_up = gate_up
        self._down = down
        self._limit = limit

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        return self._down(in_whole_vectors(F.silu, gate) * up)


@dataclass(frozen=True, slots=True)
class Router:
    """`gate`: hidden → a logit for each expert. `bias` [experts] is added to choose, not to weigh; `table` int64
    [vocabulary, per token] chooses by token id instead."""

    config: MoeConfig
    gate: Product
    bias: torch.Tensor | None = None
    table: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] → weights float32 and experts int64, [T, per token] each."""
        scores = in_whole_vectors(SCORINGS[self.config.scoring], self.gate(x).contiguous())
        experts = self.table[token_ids] if self.table is not None else self._best(scores)
        weights = scores.gather(1, experts)
        if self.config.normalized:
            total = weights[:, 0]
            for place in range(1, weights.shape[1]):
                total = total + weights[:, place]
            weights = weights / (total.unsqueeze(1) + _LEAST_SUM)
        return weights * self.config.scaling, experts

    def _best(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts with the highest biased scores, of equal ones the first."""
        config = self.config
        biased = scores if self.bias is None else scores + self.bias
        if config.num_groups > 1:
            best_two = _descending(biased.unflatten(1, (config.num_groups, -1)))[0][..., :2]
            groups = _descending(best_two[..., 0] + best_two[..., 1])[1][:, : config.top_groups]
            left_out = torch.ones(len(scores), config.num_groups, dtype=torch.bool, device=scores.device)
            left_out.scatter_(1, groups, False)
            width = config.num_experts // config.num_groups
            biased = biased.masked_fill(left_out.repeat_interleave(width, dim=1), float("-inf"))
        return _descending(biased)[1][:, : config.per_token]


def _descending(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.sort(scores, dim=-1, descending=True, stable=True)


class MixtureOfExperts:
    """The experts that each row is routed to, and the one that all take."""

    def __init__(self, router: Router, experts: list[ClampedMLP], shared: ClampedMLP) -> None:
        self._router = router
        self._experts = experts
        self._shared = shared

    def __call__(self, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] float32 → the same shape."""
        weights, chosen = self._router(x, token_ids)
        in_order, places = torch.sort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(in_order, minlength=len(self._experts)).tolist()
        weights, rows = weights.reshape(-1)[places].unsqueeze(1), places // chosen.shape[1]
        out, first = torch.zeros_like(x), 0
        for expert, count in enumerate(counts):
            if count:
                mine = slice(first, first + count)
                y = self._experts[expert](_at_least(x[rows[mine]], MIN_ROWS))[:count]
                out.index_add_(0, rows[mine], y * weights[mine])
                first += count
        return out + self._shared(x)


def _at_least(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x if len(x) >= num_rows else F.pad(x, (0, 0, 0, num_rows - len(x)))
