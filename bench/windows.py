"""`headrace bench windows`: what each strategy for DeepSeek-V4's windows keeps, and what it computes again.

One conversation with the model of random weights: a prompt, its answer, then the same prompt again, the next turn, and
two prompts that part from the first in its middle. Counted are records and tokens, which are the same everywhere; the
bytes are those of a record of V4-Flash in the paper's storage.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.report import BenchReport
from cluster.model_store import prepare
from engine.cache_size import paged_block_bytes, record_bytes
from engine.engine import Engine, EngineOptions
from engine.events import TokenDrawn
from engine.models.layouts import cache_layout
from engine.models.published_models import published_config
from engine.record_policy import RecordPolicy
from engine.request import SamplingParams

MODEL, REAL_MODEL = "deepseek-v4-tiny", "deepseek-v4-flash"
PROMPT_TOKENS, ANSWER_TOKENS, TURN_TOKENS = 4000, 200, 100
POLICIES = {
    "ends": RecordPolicy("ends"),
    "full": RecordPolicy("full"),
    "periodic_1024": RecordPolicy("periodic", 1024),
    "zero": RecordPolicy("zero"),
}


def run(console: Console) -> BenchReport:
    """Count. Raises ClusterError and ModelStoreError."""
    flash = cache_layout(published_config(REAL_MODEL), "fp8")
    blocks_bytes = (PROMPT_TOKENS + ANSWER_TOKENS) // flash.block_tokens * paged_block_bytes(flash)
    metrics: dict[str, float] = {
        "blocks_mib": blocks_bytes / 2**20,
        "record_mib": record_bytes(flash) / 2**20,
    }
    with tempfile.TemporaryDirectory() as home:
        model_dir = prepare(MODEL, name=MODEL, root=Path(home))
        for name, policy in POLICIES.items():
            with console.status(f"{name} …"):
                metrics |= {f"{name}_{what}": value for what, value in _talk(model_dir, policy).items()}
            metrics[f"{name}_records_mib"] = metrics[f"{name}_records"] * metrics["record_mib"]
    note = (
        f"a prompt of {PROMPT_TOKENS} tokens, an answer of {ANSWER_TOKENS}; again_, turn_, parting_, junction_tokens: "
        "computed for the same prompt again, for the next turn, for a prompt that parts from it in the middle, and for "
        f"another one there; MiB: of {REAL_MODEL} in fp8, zero replays a window for each of {MODEL}'s layers"
    )
    return BenchReport("windows", metrics, (note,))


def _talk(model_dir: Path, policy: RecordPolicy) -> dict[str, float]:
    options = EngineOptions(
        max_context=8192,
        kv_bytes=512 << 20,
        max_sequences=4,
        max_drafts=0,
        window_records=policy,
        num_threads=2,
    )
    engine = Engine.open(model_dir, options)
    rng = random.Random(1)

    def words(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    prompt = words(PROMPT_TOKENS)
    told, _ = _answer(engine, prompt, ANSWER_TOKENS)
    windows = engine.pool.windows
    assert windows is not None
    counts: dict[str, float] = {"records": windows.num_kept}
    half = prompt[: PROMPT_TOKENS // 2]
    prompts = {
        "again": prompt,
        "turn": [*prompt, *told, *words(TURN_TOKENS)],
        "parting": [*half, *words(PROMPT_TOKENS // 2)],
        "junction": [*half, *words(PROMPT_TOKENS // 2)],
    }
    for name, tokens in prompts.items():
        counts[f"{name}_tokens"] = _answer(engine, tokens, max_tokens=1)[1]
    return counts


def _answer(engine: Engine, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], int]:
    """Greedy tokens, and how many of the prompt were computed."""
    lease_id = b"windows bench"
    cached = engine.reserve(lease_id, prompt, 1, b"bench")
    assert cached is not None
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.submit(lease_id, prompt, sampling, prefill_only=False)
    told: list[int] = []
    while engine.has_work():
        told += [event.drawn.token_id for event in engine.step().events if isinstance(event, TokenDrawn)]
    engine.release(lease_id)
    return told, len(prompt) - cached
