"""Cache tiers that outlive the cluster: real processes, a real disk, the real model."""

from __future__ import annotations

import json

import pytest

from headrace import Answer, Client
from tests.e2e.conftest import Home, wait_until
from tests.real_prompts import real_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROFILE = """
version: 1
name: tiers
model: {path: smollm2-135m-instruct, max_context: 2048}
prefill: {kv_memory: 256MiB}
decode: {kv_memory: 256MiB}
kvtransfer: {tiers: {host: 256MiB, disk: {path: kv, size: 512MiB}}}
router: {grpc: "127.0.0.1:0"}
"""
BLOCK_TOKENS = 64


def long_prompt() -> str:
    return next(prompt for prompt in sorted(real_prompts(), key=len) if len(prompt) > 2500)[:3500]


def ask(home: Home) -> Answer:
    with Client(home.state().router_address) as client:
        answer = client.generate(long_prompt(), max_tokens=8, temperature=0.0, timeout_s=120)
        answer.read()
        return answer


def num_on_disk(home: Home) -> int:
    stat = json.loads(home.run("cache", "stat", "--json").stdout)
    return sum(tier["num_records"] for tier in stat["tiers"] if tier["tier"] == "disk")


def test_after_a_restart_a_long_prompt_is_a_disk_hit(smollm2_home: Home) -> None:
    started = smollm2_home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    computed = ask(smollm2_home)
    assert computed.usage.fetched_tokens == 0
    num_blocks = (computed.usage.prompt_tokens - 1) // BLOCK_TOKENS
    wait_until(lambda: num_on_disk(smollm2_home) >= num_blocks, "the prompt's blocks on disk")
    assert smollm2_home.run("down").returncode == 0

    verified = smollm2_home.run("cache", "verify", "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["bad"] == 0

    started = smollm2_home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    loaded = ask(smollm2_home)
    assert loaded.timing.fetched_from == "store"
    assert loaded.usage.fetched_tokens == num_blocks * BLOCK_TOKENS
    assert loaded.usage.computed_tokens <= BLOCK_TOKENS
    assert loaded.text == computed.text
