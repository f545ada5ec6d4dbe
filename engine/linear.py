"""Linear layers whose rows do not depend on each other's number.

On the CPU a matrix product is free to pick its summation order by the number of rows, and MKL's float32
does. oneDNN's keeps one order for two rows and more (probed at start, see engine/probe.py), so every
product here goes through oneDNN and no batch has a single row (design §3.7).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from engine.kernels.processor import SUMS_BYTES_EXACTLY
from engine.loops import quantize_rows, rotate_rows

_INT8_MAX = 127
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_MOST_MIXED = 64  # numbers; what divides the width may be less
_SMALLEST_SCALE = 1e-30  # of an output whose weights are all 0
MIN_ROWS = 2  # fewer rows would take a kernel of their own
_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Product(Protocol):
    """A linear layer: x [T, in] float32 → [T, out] float32."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Linear:
    """y = x Wᵀ + b with weights prepared for the device; x is [T, in] float32 with T ≥ MIN_ROWS on the CPU.

    Weights in bfloat16 take their input rounded to bfloat16; sums are float32 inside the kernel, and the
    result is float32 again. A processor without products of bfloat16 computes the same numbers in float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, repack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = bias.to(weight.dtype) if bias is not None else None
        self._onednn = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self._widens = self._onednn and self.dtype == torch.bfloat16 and not _HAS_BFLOAT16
        if self._widens:
            weight, repack = weight.float(), True
            self._bias = bias.float() if bias is not None else None
        # Repacking once halves a step; a shared weight (tied embeddings) must stay readable as it is.
        packs = self._onednn and repack
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if packs else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self._widens:
            x = x.float()
        if self._onednn:
            y = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            y = F.linear(x, self._weight, self._bias)
        return y.float()


class Int8Linear:
    """y = x Wᵀ + b in integers, on the CPU: weights in int8 with a scale per output, each row of x in uint8 around 128
    with a scale of its own.

    Sums are exact in int32, so a row's result depends on no other row and on no order. Inputs and weights are rotated
    by a Hadamard matrix first, which changes no product and spreads outliers, whose channels would take the steps of
    all others (QuaRot, Ashkboos et al., 2024; docs/precision.md has what it gives). oneDNN takes unsigned activations
    with zero point 128 through its fast kernels, signed ones through its reference. A processor whose sums of bytes
    are not exact multiplies the same integers as float32, which are exact for rows of up to 1,040 numbers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._size = min(_MOST_MIXED, self.in_features & -self.in_features)
        rotated = weight.to(torch.float32, copy=True).contiguous()
        rotate_rows(rotated.numpy(), self._size)
        codes, scale = quantize_weight(rotated)
        self._floats = None if SUMS_BYTES_EXACTLY else Linear(codes.float())
        self._codes = torch.ops.onednn.qlinear_prepack(codes, None) if self._floats is None else codes
        self._scale = scale / self._size  # both sides are √size times as large
        self._zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._bias = bias.float() if bias is not None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        scales = torch.empty(len(x), 1)
        quantize_rows(x.contiguous().numpy(), self._size, codes.numpy(), scales.view(-1).numpy())
        if self._floats is None:
            y = self._in_integers(codes)
        else:
            y = self._floats(codes.float().sub_(128)).mul_(self._scale)
        y.mul_(scales)
        return y if self._bias is None else y.add_(self._bias)

    def _in_integers(self, codes: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            codes,
            1.0,
            128,
            self._codes,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y


class Fp8Linear:
    """y = x Wᵀ + b in float8 e4m3, for cards that have its products: weights with a scale per output, each row of x
    with a scale of its own. Inner and outer width are multiples of 16. Not run on a card; torch's own product of the
    same arguments on the CPU has been."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._codes, scale = quantize_fp8(weight)
        self._scale = scale.view(1, -1)
        self._bias = bias.float() if bias is not None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = quantize_fp8(x)
        y: torch.Tensor = torch._scaled_mm(
            codes, self._codes.t(), scale_a=scale, scale_b=self._scale, out_dtype=torch.bfloat16
        )
        return y.float() if self._bias is None else y.float().add_(self._bias)


def quantize_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [T, width] → codes float8_e4m3fn [T, width] and scales float32 [T, 1]: codes · scale ≈ rows."""
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True).div_(_FP8_MAX).clamp_(min=_SMALLEST_SCALE)
    return (rows / scale).to(torch.float8_e4m3fn), scale


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight float32 [out, in], overwritten → codes int8 [out, in] and scales float32 [out]: codes · scale ≈ weight."""
    scale = weight.abs().amax(1).div_(_INT8_MAX).clamp_(min=_SMALLEST_SCALE)
    return weight.div_(scale[:, None]).round_().to(torch.int8), scale
