"""Manifold-constrained hyper-connections (arXiv:2606.19348, section 2.2): a residual of several streams.

A layer reads a weighted sum of the streams; its output is added to each of them with a weight of its own, while the
streams are mixed by a doubly stochastic matrix, which Sinkhorn and Knopp's iteration finds. All weights are functions
of the streams, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention import exp_
from engine.layers import RMSNorm
from engine.linear import Product
from engine.loops import balance
from engine.whole_vectors import in_whole_vectors


@dataclass(frozen=True, slots=True)
class Weave:
    """How a layer's output comes back: `share` [T, streams] of it for each stream, `mix` [T, streams, streams]: of old
    stream j for new stream k."""

    share: torch.Tensor
    mix: torch.Tensor

    def __call__(self, streams: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """streams [T, streams, hidden], out [T, hidden] → new streams."""
        woven = self.share.unsqueeze(-1) * out.unsqueeze(1)
        mixed = self.mix[:, 0].unsqueeze(-1) * streams[:, :1]
        for stream in range(1, streams.shape[1]):
            mixed = mixed + self.mix[:, stream].unsqueeze(-1) * streams[:, stream : stream + 1]
        return woven + mixed


class HyperConnection:
    """`project`: all streams, normed → 2 · n + n² numbers for n streams; `base` of that length and `scale` [3]."""

    def __init__(
        self,
        project: Product,
        base: torch.Tensor,
        scale: torch.Tensor,
        norm: RMSNorm,
        iterations: int,
        eps: float,
    ) -> None:
        self._project = project
        self._base = base
        self._scale = scale
        self._norm = norm
        self._iterations = iterations
        self._eps = eps

    def __call__(self, streams: torch.Tensor) -> tuple[torch.Tensor, Weave]:
        """streams [T, n, hidden] → what the layer reads, [T, hidden], and how its output comes back."""
        n = streams.shape[1]
        weights = self._project(self._norm(streams.flatten(1)))
        read, share, mix = weights.split((n, n, n * n), dim=1)
        read_base, share_base, mix_base = self._base.split((n, n, n * n))
        read = _sigmoid(read * self._scale[0] + read_base) + self._eps
        share = 2 * _sigmoid(share * self._scale[1] + share_base)
        mix = (mix * self._scale[2] + mix_base).unflatten(1, (n, n))
        mix = in_whole_vectors(exp_, (mix - mix.amax(dim=-1, keepdim=True)).contiguous())
        return weighted_sum(read, streams), Weave(share, self._balanced(mix))

    def _balanced(self, mix: torch.Tensor) -> torch.Tensor:
        """Rows of a softmax, brought to sums of 1 in rows and columns."""
        if mix.device.type == "cpu":
            balance(mix.numpy(), self._iterations, self._eps)
            return mix
        mix = mix / mix.sum(-1, keepdim=True) + self._eps
        mix = mix / (mix.sum(-2, keepdim=True) + self._eps)
        for _ in range(self._iterations - 1):
            mix = mix / (mix.sum(-1, keepdim=True) + self._eps)
            mix = mix / (mix.sum(-2, keepdim=True) + self._eps)
        return mix


class HyperHead:
    """All streams into one, before the last norm."""

    def __init__(
        self, project: Product, base: torch.Tensor, scale: torch.Tensor, norm: RMSNorm, eps: float
    ) -> None:
        self._project = project
        self._base = base
        self._scale = scale
        self._norm = norm
        self._eps = eps

    def __call__(self, streams: torch.Tensor) -> torch.Tensor:
        """streams [T, n, hidden] → [T, hidden]."""
        weights = self._project(self._norm(streams.flatten(1)))
        return weighted_sum(_sigmoid(weights * self._scale + self._base) + self._eps, streams)


def weighted_sum(weights: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """weights [T, n], streams [T, n, hidden] → [T, hidden], in the order of the streams."""
    total = weights[:, :1] * streams[:, 0]
    for stream in range(1, streams.shape[1]):
        total = total + weights[:, stream : stream + 1] * streams[:, stream]
    return total


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return in_whole_vectors(torch.sigmoid, x.contiguous())
