"""A chat on a real cluster: every turn computes and moves only what is new."""

from __future__ import annotations

import pytest

from headrace import Client
from tests.real_prompts import real_prompts
from text.tokenizer import Tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TURNS = 3
TURN_TOKENS = 330
ANSWER_TOKENS = 72
BLOCK_TOKENS = 64


@pytest.fixture(scope="module")
def said(smollm2_dir) -> list[int]:  # type: ignore[no-untyped-def]
    """What the user says, in all turns together."""
    text = max(real_prompts(), key=len)
    tokens = Tokenizer.open(smollm2_dir).encode("A chat about code.\n" + text)
    assert len(tokens) >= TURNS * TURN_TOKENS
    return tokens


def test_each_turn_computes_and_moves_only_what_is_new(laptop_client: Client, said: list[int]) -> None:
    """The answers' blocks lie on the decode worker; the prefill worker fetches them instead of computing."""
    prompt: list[int] = []
    known_tokens = 0
    for turn in range(TURNS):
        prompt = prompt + said[turn * TURN_TOKENS : (turn + 1) * TURN_TOKENS]
        answer = laptop_client.generate(prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        tokens = answer.read().choices[0].token_ids
        usage = answer.usage
        # An answer's last token has no KV, and a block that is not full is not kept.
        new_tokens = len(prompt) - known_tokens
        assert usage.computed_tokens <= new_tokens + BLOCK_TOKENS
        assert usage.transferred_tokens <= new_tokens + BLOCK_TOKENS
        assert usage.computed_tokens + usage.cached_tokens == len(prompt)
        if turn:
            assert usage.fetched_tokens >= BLOCK_TOKENS
            assert answer.timing.fetched_from
        prompt = prompt + list(tokens)
        known_tokens = len(prompt) - 1
