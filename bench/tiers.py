"""What do cached prefixes save: turn after turn of a chat, and after the whole cluster was restarted?

One chat of five turns grows to 4,000 tokens through 1P1D. The decode worker keeps each answer's blocks; the
prefill worker lacks them and fetches them. Then the cluster is taken down and brought up again, twice: once its
disk tier holds the chat, once it is empty, and the last prompt is asked again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

from rich.console import Console

from bench.clusters import running, split
from bench.kv_sample import real_tokens
from bench.report import BenchReport
from headrace import Client, Timing, Usage

TURNS = 5
TURN_TOKENS = 700
ANSWER_TOKENS = 100
LAST_PROMPT_TOKENS = TURNS * TURN_TOKENS + (TURNS - 1) * ANSWER_TOKENS
WRITE_BACK_S = 60.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of the chat, and what of its prompt was new."""

    new_tokens: int
    usage: Usage
    timing: Timing


def run(console: Console) -> BenchReport:
    """One chat, two restarts."""
    with tempfile.TemporaryDirectory(prefix="headrace-tiers-") as disk:
        with running(split(disk), console) as cluster, Client(cluster.address) as client:
            _ask(client, real_tokens(64))
            turns, last_prompt = chat(client)
            cluster.wait_written(LAST_PROMPT_TOKENS // 64, WRITE_BACK_S)
            note = cluster.describe()
        with running(split(disk), console) as cluster, Client(cluster.address) as client:
            from_disk = _ask(client, last_prompt)
    with running(split(), console) as cluster, Client(cluster.address) as client:
        computed = _ask(client, last_prompt)
    metrics: dict[str, float] = {}
    for number, turn in enumerate(turns, 1):
        metrics |= {
            f"new_tokens_{number}": turn.new_tokens,
            f"computed_tokens_{number}": turn.usage.computed_tokens,
            f"fetched_tokens_{number}": turn.usage.fetched_tokens,
            f"transferred_tokens_{number}": turn.usage.transferred_tokens,
            f"ttft_ms_{number}": turn.timing.ttft_s * 1e3,
        }
    metrics |= {
        "restart_fetched_tokens": from_disk[0].fetched_tokens,
        "restart_ttft_ms": from_disk[1].ttft_s * 1e3,
        "computed_ttft_ms": computed[1].ttft_s * 1e3,
        "restart_to_computed": from_disk[1].ttft_s / computed[1].ttft_s,
    }
    return BenchReport("tiers", metrics, (note,))


def chat(client: Client) -> tuple[list[Turn], list[int]]:
    """Five turns, each with the answers before it in its prompt; the last prompt too."""
    said = real_tokens(TURNS * TURN_TOKENS)
    prompt: list[int] = []
    turns = []
    for number in range(TURNS):
        known = len(prompt)
        prompt = prompt + said[number * TURN_TOKENS : (number + 1) * TURN_TOKENS]
        answer = client.generate(
            prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, timeout_s=300
        )
        tokens = answer.read().choices[0].token_ids
        turns.append(Turn(len(prompt) - known, answer.usage, answer.timing))
        last_prompt = prompt
        prompt = prompt + list(tokens)
    return turns, last_prompt


def _ask(client: Client, prompt: list[int]) -> tuple[Usage, Timing]:
    answer = client.generate(prompt, max_tokens=2, temperature=0.0, ignore_eos=True, timeout_s=300)
    answer.read()
    return answer.usage, answer.timing
