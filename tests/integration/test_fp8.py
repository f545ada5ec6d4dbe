"""Products in float8: torch's own on the CPU, with the arguments that a card gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.linear import Fp8Linear, quantize_fp8
from engine.runner import EngineError, EngineOptions, ModelRunner
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

STEP = 2.0**-4  # of float8 e4m3, relative: half of its last bit


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_number_is_kept_to_half_a_step_of_its_row() -> None:
    rows = noise(5, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).view(-1, 1)
    codes, scale = quantize_fp8(rows)
    smallest = rows.abs().amax(1, keepdim=True) * 2.0**-17  # below that codes are evenly spaced
    assert ((codes.float() * scale - rows).abs() <= rows.abs() * STEP + smallest).all()


def test_a_row_of_zeros_stays_one() -> None:
    codes, scale = quantize_fp8(torch.zeros(2, 16))
    assert torch.equal(codes.float() * scale, torch.zeros(2, 16))


def test_the_product_is_that_of_what_was_kept() -> None:
    weight, bias, x = noise(32, 64), noise(32), noise(7, 64)
    kept_x, kept_weight = (codes.float() * scale for codes, scale in map(quantize_fp8, (x, weight)))
    expected = kept_x @ kept_weight.T + bias
    result = Fp8Linear(weight, bias)(x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=5e-2)  # its result is bfloat16


def test_the_cpu_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    with pytest.raises(EngineError, match="precision fp8 runs on GPUs, not on cpu: use int8"):
        ModelRunner(model, EngineOptions(precision="fp8"))
