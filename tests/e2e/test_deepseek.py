"""DeepSeek-V4's architecture on a real cluster: one worker computes prompts, another answers them, and every token is
that of one engine alone. As the demo profile brings it up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.engine import Engine, EngineOptions
from headrace import Client
from tests.e2e.conftest import Home
from tests.e2e.test_equality import cluster_answers, colocated_answers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DEMO = Path(__file__).parents[2] / "deploy" / "profiles" / "deepseek-v4-tiny.yaml"
HANDED_OVER = "127.0.0.1:0\n  policy: least-loaded"  # by cost, short prompts would not be
TEXT = "A headrace carries the stored water to the turbine, and this one carries the cache. "
LENGTHS = [1, 4, 127, 128, 129, 300, 515]


@pytest.fixture(scope="module")
def deepseek_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("deepseek"))
    try:
        prepared = home.run("model", "prepare", "deepseek-v4-tiny")
        assert prepared.returncode == 0, prepared.stderr
        started = home.up(DEMO.read_text().replace("127.0.0.1:8460", HANDED_OVER))
        assert started.returncode == 0, started.stderr
        yield home
    finally:
        home.run("down")


def test_answers_equal_one_engines(deepseek_home: Home) -> None:
    with Client(deepseek_home.state().router_address) as client:
        prompts = [client.tokenize(TEXT * 8)[:length] for length in LENGTHS]
        there = [cluster_answers(client, prompts, seeded=seeded) for seeded in (False, True)]
    options = EngineOptions(max_context=8192, kv_bytes=256 << 20, max_sequences=16, chunk_tokens=200)
    engine = Engine.open(deepseek_home.path / "models" / "deepseek-v4-tiny", options)
    assert engine.invariant
    assert there == [colocated_answers(engine, prompts, seeded=seeded) for seeded in (False, True)]
