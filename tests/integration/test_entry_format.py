"""Records of several fields: what they keep of an entry, and that they are functions of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.entry_format import format_of
from engine.models.deepseek.layouts import CSA, FP8, INDEX, LATENT, mla_layout, v4_layout
from engine.models.published_models import published_config
from kvtransfer.layouts import Plane

pytestmark = pytest.mark.integration

V4 = v4_layout(published_config("deepseek-v4-flash"), FP8)  # type: ignore[arg-type]
V32 = mla_layout(published_config("deepseek-v3.2"), FP8, 64)  # type: ignore[arg-type]
PLANES = {
    "csa": V4.plane(CSA),
    "index": V4.plane(INDEX),
    "latent": V32.plane(LATENT),
    "key": V32.plane(INDEX),
}
WIDTHS = {"csa": 512, "index": 128, "latent": 576, "key": 128}
BYTES = {"csa": 448 + 128 + 7, "index": 64 + 4, "latent": 512 + 128 + 16, "key": 128 + 4}
FP4_NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("name", PLANES)
def test_what_is_kept_is_close(name: str) -> None:
    numbers = torch.randn((5, 3, WIDTHS[name]), generator=torch.Generator().manual_seed(1))
    packed = format_of(PLANES[name]).pack(numbers)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, 3, BYTES[name]))
    assert PLANES[name].record_bytes == BYTES[name]
    kept = format_of(PLANES[name]).unpack(packed)
    is_fp4 = name == "index"
    torch.testing.assert_close(kept, numbers, rtol=0.34 if is_fp4 else 0.07, atol=0.3 if is_fp4 else 0.01)
    if name in ("csa", "latent"):
        rotated = slice(WIDTHS[name] - 64, None)
        assert torch.equal(kept[..., rotated], numbers[..., rotated].bfloat16().float())


@pytest.mark.parametrize("name", PLANES)
def test_what_is_kept_is_kept_again(name: str) -> None:
    entry_format = format_of(PLANES[name])
    kept = entry_format.unpack(entry_format.pack(torch.randn(7, WIDTHS[name])))
    assert torch.equal(entry_format.unpack(entry_format.pack(kept)), kept)
    nothing = torch.zeros(2, WIDTHS[name])
    assert torch.equal(entry_format.unpack(entry_format.pack(nothing)), nothing)


@given(
    numbers=st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32),
    name=st.sampled_from(sorted(PLANES)),
)
@settings(max_examples=60, deadline=None)
def test_a_record_is_a_function_of_its_entry(numbers: list[float], name: str) -> None:
    width = WIDTHS[name]
    row = torch.tensor((numbers * (width // 32))[:width])
    beside = torch.randn(3, width)
    entry_format = format_of(PLANES[name])
    together = entry_format.pack(torch.cat((beside, row[None], beside)))
    assert torch.equal(together[3], entry_format.pack(row[None])[0])


@pytest.mark.parametrize("exponent", [-20, 0, 9])
def test_fp4_rounds_to_the_nearest_and_ties_to_even(exponent: int) -> None:
    scale = 2.0**exponent
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row = torch.zeros(128)
    row[:16] = torch.tensor([*ties, 6.0, *(-tie for tie in ties), 0.1]) * scale
    kept = _kept(PLANES["index"], row)[:16] / scale
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert kept.tolist() == [*expected, 6.0, *(-number for number in expected), 0.0]


def test_a_scale_is_the_least_power_of_two_that_fits() -> None:
    for most in (448.0, 449.0, 896.0, 900.0, 1.0):
        row = torch.zeros(512)
        row[0] = most
        raw = format_of(PLANES["csa"]).pack(row[None])[0]
        scale = 2.0 ** (int(raw[-7]) - 127)
        assert scale / 2 < most / 448 <= scale


def _kept(plane: Plane, row: torch.Tensor) -> torch.Tensor:
    return format_of(plane).unpack(format_of(plane).pack(row[None]))[0]
