"""Linear layers in integers: what comes back, and that no row depends on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.linear import Int8Linear
from engine.loops import quantize_rows, rotate_rows
from engine.runner import EngineError, EngineOptions, ModelRunner
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

WIDTHS = [1, 2, 7, 64, 96, 576]


def rows(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """With channels that are outliers, as hidden states have them."""
    numbers = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    numbers[:, ::37] *= 30
    return numbers


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_keeps_every_product(width: int) -> None:
    size = min(64, width & -width)
    one, other = rows(5, width), rows(3, width, seed=1)
    expected = one.double() @ other.double().T * size
    for numbers in (one, other):
        rotate_rows(numbers.numpy(), size)
    torch.testing.assert_close(one.double() @ other.double().T, expected, rtol=1e-5, atol=1e-3)


def test_a_rotation_is_hadamards() -> None:
    unit = torch.eye(4)
    rotate_rows(unit.numpy(), 4)
    assert unit.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_are_the_nearest(width: int) -> None:
    numbers, codes, scales = rows(9, width), torch.empty(9, width, dtype=torch.uint8), torch.empty(9)
    before = numbers.clone()
    quantize_rows(numbers.numpy(), 1, codes.numpy(), scales.numpy())
    assert torch.equal(numbers, before)
    off = (codes.float() - 128) * scales[:, None] - numbers
    assert bool((off.abs() <= 0.501 * scales[:, None]).all())
    assert bool((codes.float() - 128).abs().amax(1).eq(127).all())


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (64, 3), (7, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_close_to_the_exact_one(inputs: int, outputs: int, has_bias: bool) -> None:
    weight, x = rows(outputs, inputs, seed=2) / 20, rows(33, inputs)
    bias = torch.arange(float(outputs)) if has_bias else None
    exact = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    off = Int8Linear(weight, bias)(x).double() - exact
    assert float(off.norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("num_rows", [2, 3, 16, 17, 64, 200])
def test_a_row_is_the_same_alone_and_among_others(num_rows: int) -> None:
    product, x = Int8Linear(rows(960, 576, seed=3)), rows(num_rows, 576)
    together = product(x)
    for i in range(0, num_rows, 7):
        assert torch.equal(product(x[i : i + 1])[0], together[i])


def test_zeros_and_numbers_that_are_none_stay_in_their_rows() -> None:
    product, x = Int8Linear(rows(8, 64, seed=4)), rows(4, 64)
    expected = product(x)
    x[0] = 0
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    result = product(x)
    assert torch.equal(result[0], torch.zeros(8))
    assert not result[1:3].isfinite().any()
    assert torch.equal(result[3], expected[3])


def test_weights_of_zero_give_zero() -> None:
    assert torch.equal(Int8Linear(torch.zeros(3, 64))(rows(2, 64)), torch.zeros(2, 3))


def test_another_device_than_the_cpu_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    with pytest.raises(EngineError, match="precision int8 runs on the CPU"):
        ModelRunner(model, EngineOptions(precision="int8", device="cuda:0"))
