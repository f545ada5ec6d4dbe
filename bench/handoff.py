"""What does it cost to hand a prompt's KV cache over?

Prompts of 512, 2,048 and 4,096 tokens through 1P1D, alone. `handoff_ms_N` is the time from the end of prefill
(the first token drawn) to the decode worker's first own token; the decode step in it (`step_ms_N`) would
have been needed anyway. `hidden_share_N` is 1 - exposed / Σ frames: how much of the transfer ran beside
the prompt's computation.
"""

from __future__ import annotations

import itertools
import statistics
import time

from rich.console import Console

from bench.clusters import running, split
from bench.prompts import distinct_prompt
from bench.report import BenchReport
from headrace import Client, Timing, Usage

LENGTHS = (512, 2048, 4096)
REPEATS = 3
ANSWER_TOKENS = 16


def run(console: Console) -> BenchReport:
    """Medians over `REPEATS` prompts of each length, all different."""
    metrics: dict[str, float] = {}
    with running(split(), console) as cluster, Client(cluster.address) as client:
        _one(client, 64, seed=1)
        for length in LENGTHS:
            runs = [_one(client, length, seed=length * 100 + repeat) for repeat in range(REPEATS)]
            metrics |= _metrics(length, runs)
        note = cluster.describe()
    return BenchReport("handoff", metrics, (note,))


def _one(client: Client, num_tokens: int, seed: int) -> tuple[Timing, Usage, float]:
    """Timing, usage, and the median time between the answer's later tokens in seconds."""
    answer = client.generate(
        distinct_prompt(num_tokens, seed),
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        timeout_s=300,
    )
    arrivals = []
    for delta in answer.deltas():
        arrivals += [time.monotonic()] * len(delta.token_ids)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals[2:])]
    return answer.timing, answer.usage, statistics.median(gaps)


def _metrics(length: int, runs: list[tuple[Timing, Usage, float]]) -> dict[str, float]:
    def median_ms(values: list[float]) -> float:
        return statistics.median(values) * 1e3

    timings = [timing for timing, _, _ in runs]
    handoff_ms = median_ms([timing.handoff_s + timing.first_step_s for timing in timings])
    step_ms = median_ms([step_s for _, _, step_s in runs])
    return {
        f"prefill_ms_{length}": median_ms([timing.prefill_s for timing in timings]),
        f"handoff_ms_{length}": handoff_ms,
        f"step_ms_{length}": step_ms,
        f"handoff_beyond_step_ms_{length}": handoff_ms - step_ms,
        f"hidden_share_{length}": statistics.median(
            [1 - timing.handoff_s / timing.frame_s for timing in timings]
        ),
        f"kv_bytes_{length}": statistics.median([usage.kv_bytes for _, usage, _ in runs]),
        f"wire_bytes_{length}": statistics.median([usage.wire_bytes for _, usage, _ in runs]),
    }
