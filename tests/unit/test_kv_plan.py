"""What contexts take, against the numbers that others have published and counted."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.kv_plan import plan_kv
from engine.models.published_models import published_config, published_names
from engine.models.shapes import expected_shapes

pytestmark = pytest.mark.unit

MIB, GIB = 2**20, 2**30

# Compressed entries, indexer keys and windows; the papers' "10 %" and "2 %" follow from them.
PUBLISHED = [
    ("deepseek-v4-pro", "bfloat16", {8192: 84.6 * MIB, 131072: 1.210 * GIB, 1048576: 9.625 * GIB}),
    ("deepseek-v4-pro", "fp8", {8192: 43.7 * MIB, 131072: 633.3 * MIB, 1048576: 4.918 * GIB}),
    ("deepseek-v4-flash", "bfloat16", {8192: 59.1 * MIB, 131072: 865.4 * MIB, 1048576: 6.724 * GIB}),
    ("deepseek-v4-flash", "fp8", {8192: 30.5 * MIB, 131072: 442.4 * MIB, 1048576: 3.435 * GIB}),
    ("deepseek-v3.2", "bfloat16", {8192: 671 * MIB, 131072: 10.48 * GIB, 1048576: 83.9 * GIB}),
    ("deepseek-v3.2", "fp8", {8192: 375.5 * MIB, 131072: 5.87 * GIB, 1048576: 46.9 * GIB}),
    ("llama-70b", "bfloat16", {8192: 2.5 * GIB, 131072: 40 * GIB, 1048576: 320 * GIB}),
]


@pytest.mark.parametrize(("model", "kv_dtype", "sizes"), PUBLISHED)
def test_sizes_are_the_published_ones(model: str, kv_dtype: str, sizes: dict[int, float]) -> None:
    for context_tokens, expected in sizes.items():
        planned = plan_kv(published_config(model), context_tokens, kv_dtype=kv_dtype)
        assert planned.cache_bytes == pytest.approx(expected, rel=0.005)
        assert planned.request_bytes == sum(plane.kv_bytes for plane in planned.planes)


def test_growth_and_fixed_part() -> None:
    pro, flash = (plan_kv(published_config(f"deepseek-v4-{name}"), 2**20) for name in ("pro", "flash"))
    assert (pro.bytes_per_token, flash.bytes_per_token) == (9848, 6880)
    assert pro.most_fixed_bytes == pytest.approx((7.62 + 17.84) * MIB, rel=0.02)
    assert flash.most_fixed_bytes == pytest.approx((5.38 + 11.64) * MIB, rel=0.02)
    dense = plan_kv(published_config("llama-70b"), 2**20)
    assert (dense.fixed_bytes, dense.most_fixed_bytes) == (0, 0)


def test_weights_as_published() -> None:
    """Of Flash 159.6 GB lie in its files, 3.6 of them in layers that predict further tokens."""
    assert plan_kv(published_config("deepseek-v4-flash"), 1).weights_bytes == pytest.approx(
        156.0e9, rel=0.005
    )
    assert plan_kv(published_config("deepseek-v3.2"), 1).weights_bytes == pytest.approx(674e9, rel=0.01)


def test_every_published_config_is_served_by_a_family() -> None:
    for name in published_names():
        config = published_config(name)
        assert len(expected_shapes(config)) > config.num_layers
        assert config.max_context >= 131072


def test_link_codec_and_memory() -> None:
    config = published_config("deepseek-v4-pro")
    raw = plan_kv(config, 2**20, link_bits_per_s=400e9, memory_bytes=64 * GIB)
    small = plan_kv(config, 2**20, codec_ratio=2.0, link_bits_per_s=400e9)
    assert raw.wire_s == pytest.approx(raw.request_bytes * 8 / 400e9)
    assert raw.num_fit == 6
    assert small.wire_bytes == pytest.approx(raw.cache_bytes / 2 + raw.tail_bytes, abs=1)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", "kv", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_one_object_or_a_table() -> None:
    facts = json.loads(run("--model", "deepseek-v4-pro", "--context", "1M", "--kv-dtype", "fp8", "--json"))
    assert facts["kv_bytes"] == pytest.approx(9.625 * GIB, rel=0.005)
    assert facts["cache_bytes"] == pytest.approx(4.918 * GIB, rel=0.005)
    assert "csa_tail" in run("--model", "deepseek-v4-flash", "--codec", "split", "--link", "10Gbit")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "deepseek-v5"], "known without being prepared"),
        (["--model", "deepseek-v4-pro", "--context", "1X"], "number of tokens"),
        (["--model", "llama-70b", "--kv-dtype", "fp8"], "bfloat16, float32"),
        (["--model", "deepseek-v4-pro", "--codec", "zip"], "codecs are raw"),
        (["--model", "deepseek-v4-pro", "--kv-dtype", "fp8", "--codec", "split"], "measured for bfloat16"),
        (["--model", "deepseek-v4-pro", "--link", "fast"], "not a rate"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["plan", "kv", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert words in result.output
