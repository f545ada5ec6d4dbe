"""Rotary embedding of a part of each head, in neighbouring pairs as DeepSeek trains it, or in halves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.models.rope_config import RopeConfig
from engine.rope import angle_tables


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines of some positions: [T, 1, rotated dimensions / 2] float32 each."""

    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def inverse(self) -> Angles:
        """Those that turn back."""
        return Angles(self.cos, -self.sin)

    def turn_pairs(self, heads: torch.Tensor) -> torch.Tensor:
        """heads [T, H, D]: the last dimensions of each, in pairs (0, 1), (2, 3), …"""
        rotated_dim = 2 * self.cos.shape[-1]
        still, turned = heads[..., :-rotated_dim], heads[..., -rotated_dim:].unflatten(-1, (-1, 2))
        even, odd = self._turned(turned[..., 0], turned[..., 1])
        return torch.cat((still, torch.stack((even, odd), -1).flatten(-2)), -1)

    def turn_halves(self, heads: torch.Tensor) -> torch.Tensor:
        """heads [T, H, D]: the first dimensions of each, dimension i with i + half of them."""
        half = self.cos.shape[-1]
        first, second = self._turned(heads[..., :half], heads[..., half : 2 * half])
        return torch.cat((first, second, heads[..., 2 * half :]), -1)

    def _turned(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return one * self.cos - other * self.sin, other * self.cos + one * self.sin


class Turning:
    """Angles of every position up to `max_context`, on the model's device."""

    def __init__(self, rope: RopeConfig, rotated_dim: int, max_context: int, device: torch.device) -> None:
        self._cos, self._sin = (table.to(device) for table in angle_tables(rope, rotated_dim, max_context))

    def at(self, positions: torch.Tensor) -> Angles:
        """positions int64 [T]."""
        return Angles(self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1))
