"""How weights become layers: in what precision, on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.layers import RMSNorm
from engine.linear import Fp8Linear, Int8Linear, Linear, Product
from engine.weights import Weights


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go and in what precision (EngineOptions.precision)."""

    weights: Weights
    precision: str
    device: torch.device
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        """Of weights that are not quantized."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def linear(self, *names: str, bias: bool = False) -> Product:
        """One product for the rows of all `names`, in order."""
        weight = self.weights.fused([f"{name}.weight" for name in names], self.dtype).to(self.device)
        offset = None
        if bias:
            offset = self.weights.fused([f"{name}.bias" for name in names], torch.float32).to(self.device)
        return self.product(weight, offset)

    def product(self, weight: torch.Tensor, offset: torch.Tensor | None = None) -> Product:
        """A product of weights that are on the device already."""
        match self.precision:
            case "int8":
                return Int8Linear(weight, offset)
            case "fp8":
                return Fp8Linear(weight, offset)
            case _:
                return Linear(weight, offset)

    def exact(self, *names: str) -> Product:
        """One product in float32 whatever the precision, for what decides instead of contributing."""
        weight = self.weights.fused([f"{name}.weight" for name in names], torch.float32)
        return Linear(weight.to(self.device))

    def vector(self, name: str) -> torch.Tensor:
        """A tensor in float32, on the device."""
        return self.weights.get(name).to(device=self.device, dtype=torch.float32, copy=True)

    def head(self, embedding: torch.Tensor) -> Product:
        """The output head that an embedding [vocabulary, hidden] is, too."""
        return Int8Linear(embedding) if self.precision == "int8" else Linear(embedding, repack=False)

    def norm(self, name: str, eps: float | None = None) -> RMSNorm:
        """The norm with the weight of that name, and the model's eps where it has none of its own."""
        return RMSNorm(self.weights.get(f"{name}.weight").to(self.device), eps or self.eps)
