"""What is asked of a cluster under fire: conversations drawn by a seed, pure.

Prompts are stretches of a real text, some with a beginning in common, some turns of one chat whose later prompts hold
the answers before them. Greedy and seeded answers, several choices, stop strings, penalties, logprobs; a few requests
have a deadline that is too short on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

STOP_STRINGS = ((".",), ("\n\n", "the"), ("e",), ("ing", "?"))
SHORT_DEADLINE_SHARE = 0.08
CHAT_SHARE = 0.3
SHARED_HEAD_SHARE = 0.4
SDK_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSizes:
    """In tokens. `longest_prompt` with `longest_answer` must fit the model's context; a chat's prompts grow to it."""

    shortest_prompt: int = 20
    longest_prompt: int = 1500
    shortest_answer: int = 16
    longest_answer: int = 120
    shared_head: int = 192
    num_conversations: int = 12
    shortest_deadline_s: float = 0.3
    longest_deadline_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: tokens that come behind what was said before in its conversation, and how to answer.

    `deadline_s`: a short one; None for patience. `by_sdk`: asked through the SDK's client, else by one that checks
    every message of every connection.
    """

    new_tokens: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    by_sdk: bool = False


Conversation = tuple[Turn, ...]


def conversations(seed: int, text: Sequence[int], sizes: LoadSizes) -> list[Conversation]:
    """A round's. `text`: token ids to cut prompts from. Raises ValueError for a text shorter than a prompt."""
    if len(text) < sizes.longest_prompt:
        raise ValueError(f"a text of {len(text)} tokens has no prompts of {sizes.longest_prompt}")
    rng = random.Random(seed)
    head = _stretch(rng, text, sizes.shared_head)
    return [tuple(_turns(rng, text, head, sizes)) for _ in range(sizes.num_conversations)]


def _turns(
    rng: random.Random, text: Sequence[int], head: tuple[int, ...], sizes: LoadSizes
) -> Iterator[Turn]:
    num_turns = rng.randint(2, 3) if rng.random() < CHAT_SHARE else 1
    room = sizes.longest_prompt - (num_turns - 1) * sizes.longest_answer
    for number in range(num_turns):
        longest = max(sizes.shortest_prompt, room // num_turns)
        # Evenly over the orders of magnitude: many short ones, a few long.
        length = int(sizes.shortest_prompt * (longest / sizes.shortest_prompt) ** rng.random())
        tokens = _stretch(rng, text, length)
        if number == 0 and rng.random() < SHARED_HEAD_SHARE and length + len(head) <= longest:
            tokens = head + tokens
        deadline_s = None
        if num_turns == 1 and rng.random() < SHORT_DEADLINE_SHARE:
            deadline_s = round(rng.uniform(sizes.shortest_deadline_s, sizes.longest_deadline_s), 2)
        yield Turn(tokens, _sampling(rng, sizes), deadline_s, rng.random() < SDK_SHARE)


def _stretch(rng: random.Random, text: Sequence[int], length: int) -> tuple[int, ...]:
    start = rng.randrange(len(text) - length + 1)
    return tuple(text[start : start + length])


def _sampling(rng: random.Random, sizes: LoadSizes) -> dict[str, Any]:
    """Keyword arguments that both the SDK and SamplingParams take."""
    options: dict[str, Any] = {
        "max_tokens": rng.randint(sizes.shortest_answer, sizes.longest_answer),
        "seed": rng.getrandbits(63),
        "temperature": 0.0 if rng.random() < 0.4 else round(rng.uniform(0.5, 1.2), 2),
        "ignore_eos": rng.random() < 0.7,
    }
    if rng.random() < 0.25:
        options["n"] = 2
    if rng.random() < 0.25:
        options["stop"] = list(rng.choice(STOP_STRINGS))
    if rng.random() < 0.3:
        options["repetition_penalty"] = round(rng.uniform(1.05, 1.3), 2)
    if rng.random() < 0.2:
        options["frequency_penalty"] = round(rng.uniform(0.1, 0.8), 2)
    if rng.random() < 0.3:
        options["logprobs"] = rng.randint(0, 4)
    if options["temperature"] and rng.random() < 0.3:
        options["top_p"] = round(rng.uniform(0.6, 0.95), 2)
    return options
