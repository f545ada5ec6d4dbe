"""Linear layers whose rows do not depend on each other's number.

On the CPU a matrix product is free to pick its summation order by the number of rows, and MKL's float32
does. oneDNN's keeps one order for two rows and more (probed at start, see engine/probe.py), so every
product here goes through oneDNN and no batch has a single row (design §3.7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MIN_ROWS = 2  # fewer rows would take a kernel of their own


class Linear:
    """y = x Wᵀ + b with weights prepared for the device; x is [T, in] float32 with T ≥ MIN_ROWS on the CPU.

    Weights in bfloat16 take their input rounded to bfloat16; sums are float32 inside the kernel, and the
    result is float32 again.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, repack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = bias.to(weight.dtype) if bias is not None else None
        self._onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        # Repacking once halves a step; a shared weight (tied embeddings) must stay readable as it is.
        packs = self._onednn and repack
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if packs else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self._onednn:
            y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            y = F.linear(x, self._weight, self._bias)
        return y.float()
