"""What do guesses at the next tokens bring, and what do they cost where they bring nothing?

One int8 engine on all cores writes the same answers with guesses and without, in turns: `copy`, a text that stands in
the prompt (as when code or a document is edited), greedy; `greedy` and `seeded` (temperature 1), the continuation of a
text. Each alone and eight at a time (`_c8`). `_speedup`: tokens a second with guesses to those without; `_kept`: the
part of all tokens that were guessed. `different_tokens` must be 0.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from rich.console import Console

from bench.kv_sample import MODEL, real_tokens
from bench.report import BenchReport
from cluster.model_store import resolve
from engine.engine import Engine
from engine.events import TokenDrawn
from engine.request import SamplingParams
from engine.runner import EngineOptions

PROMPT_TOKENS = 320
CUE_TOKENS = 12
ANSWER_TOKENS = 160
NUM_TEXTS = 8
RUNS = 2


@dataclass(frozen=True, slots=True)
class _Written:
    seconds: float
    num_kept: int
    tokens: dict[bytes, list[int]]


def run(console: Console) -> BenchReport:
    """Measure."""
    num_threads = len(os.sched_getaffinity(0))
    options = EngineOptions(precision="int8", num_threads=num_threads, max_context=1024, kv_bytes=512 << 20)
    with console.status("opening the engine …"):
        engine = Engine.open(resolve(MODEL), options)
    texts = real_tokens(NUM_TEXTS * PROMPT_TOKENS)
    prompts = [texts[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(NUM_TEXTS)]
    # The beginning of the text once more: a model of any size goes on as the text did.
    copies = [prompt + prompt[:CUE_TOKENS] for prompt in prompts]
    metrics: dict[str, float] = {"different_tokens": 0.0}
    for name, asked, temperature in (
        ("copy", copies, 0.0),
        ("greedy", prompts, 0.0),
        ("seeded", prompts, 1.0),
    ):
        for suffix, groups in (("", [[prompt] for prompt in asked]), ("_c8", [asked])):
            with console.status(f"{name}{suffix} …"):
                metrics |= _compared(engine, groups, temperature, f"{name}%s{suffix}", metrics)
    notes = (f"{num_threads} threads; answers of {ANSWER_TOKENS} tokens after prompts of {PROMPT_TOKENS}",)
    return BenchReport("drafts", metrics, notes)


def _compared(
    engine: Engine, groups: list[list[list[int]]], temperature: float, name: str, metrics: dict[str, float]
) -> dict[str, float]:
    """Each group's answers, written side by side."""
    without_s = with_s = num_kept = num_tokens = different = 0.0
    for group in groups:
        for _ in range(RUNS):
            plain = _write(engine, group, temperature, max_drafts=0)
            guessed = _write(engine, group, temperature, max_drafts=EngineOptions().max_drafts)
            without_s, with_s = without_s + plain.seconds, with_s + guessed.seconds
            num_kept += guessed.num_kept
            num_tokens += sum(map(len, guessed.tokens.values()))
            different += sum(
                a != b
                for lease_id, tokens in plain.tokens.items()
                for a, b in zip(tokens, guessed.tokens[lease_id], strict=True)
            )
    return {
        name % "_speedup": without_s / with_s,
        name % "_kept": num_kept / num_tokens,
        "different_tokens": metrics["different_tokens"] + different,
    }


def _write(engine: Engine, prompts: list[list[int]], temperature: float, max_drafts: int) -> _Written:
    engine.scheduler.limits = replace(engine.scheduler.limits, max_drafts=max_drafts)
    written: dict[bytes, list[int]] = {}
    for number, prompt in enumerate(prompts):
        lease_id = number.to_bytes(16, "little")
        sampling = SamplingParams(
            temperature=temperature, seed=number, max_tokens=ANSWER_TOKENS, ignore_eos=True
        )
        engine.reserve(lease_id, prompt, 1, b"bench")
        engine.submit(lease_id, prompt, sampling, prefill_only=False)
        written[lease_id] = []
    seconds = num_kept = 0
    while engine.has_work():
        began = time.perf_counter()
        result = engine.step()
        if not result.num_prefill_tokens:
            seconds += time.perf_counter() - began
        num_kept += result.num_drafts_kept
        for event in result.events:
            assert isinstance(event, TokenDrawn)
            written[event.lease_id].append(event.drawn.token_id)
    for lease_id in written:
        engine.release(lease_id)
    return _Written(seconds, num_kept, written)
