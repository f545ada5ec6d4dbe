"""Row-wise layers: norm, rotary embedding, gated MLP.

Each output row is a function of its input row alone, whatever the other rows: only elementwise operations
that IEEE 754 rounds exactly, and exponentials over rows that are a multiple of the vector width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.linear import Product


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight, over the last axis, in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight.float()
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # A dot product per row is several times faster on long chunks than F.rms_norm's square and mean.
        mean_square = torch.linalg.vecdot(x, x).unsqueeze(-1).mul_(1 / x.shape[-1])
        return x.mul(mean_square.add_(self._eps).rsqrt_()).mul_(self._weight)


class Rotary:
    """Rotary embedding in the half-rotated convention of the Hugging Face checkpoints.

    `cos`, `sin`: [max_context, head_dim] float32.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        half = cos.shape[-1] // 2
        self.cos = cos
        self.signed_sin = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, signed sin) of each position: [T, 1, head_dim] each."""
        return self.cos[positions].unsqueeze(1), self.signed_sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [T, heads, head_dim] by the rows of `Rotary.at`."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    # A fused multiply-add would round differently in a vector's body and in its tail.
    return x * cos + swapped * signed_sin


class GatedMLP:
    """down(silu(gate(x)) · up(x)), gate and up in one product."""

    def __init__(self, gate_up: Product, down: Product) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up)
