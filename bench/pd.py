"""What does 1P1D do for a client, beside another system's?

One prefill and one decode worker in int8, a core each, asked over gRPC: time to the first token and what that makes
in tokens a second of the prompt, milliseconds a token of one answer, tokens a second of 4 and 16 answers with all that
belongs to them. `--compare vllm=ENVIRONMENT`: the same questions to two vLLM servers in bfloat16, a core each, that
hand the cache over through NIXL (the recipe of its documentation; a prompt goes to the first, then to the second).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from bench.clusters import running, split
from bench.kv_sample import MODEL
from bench.peer import VLLM, asked
from bench.prompts import distinct_prompt
from bench.report import BenchReport, times_as_fast
from bench.vllm_server import served_pair
from cluster.model_store import resolve
from headrace import Client

PROMPTS = (128, 1024, 4096)
STREAMS = (4, 16)
STREAM_PROMPT_TOKENS = 128
ANSWER_TOKENS = 96
RUNS = 2

Ask = Callable[[list[int], int], list[float]]
"""Of a prompt and a number of tokens: when each token came."""


def run(console: Console, compare: str = "") -> BenchReport:
    """The peer first. Raises ClusterError for one that is not known or does not start."""
    metrics: dict[str, float] = {}
    if compare:
        _, environment = asked(compare, (VLLM,))
        waiting = console.status("vLLM 1P1D (its first start compiles for minutes) …")
        with waiting, served_pair(environment, resolve(MODEL)) as ask:
            metrics |= {f"vllm_{name}": value for name, value in _measured(ask).items()}
    with running(split(precision="int8"), console) as cluster, Client(cluster.address) as client:
        metrics |= _measured(_asking(client))
        note = cluster.describe()
    if compare:
        metrics |= _ratios(metrics)
    return BenchReport("pd", metrics, (note,))


def _asking(client: Client) -> Ask:
    def ask(prompt: list[int], max_tokens: int) -> list[float]:
        answer = client.generate(
            prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout_s=300
        )
        return [now for delta in answer.deltas() for now in [time.perf_counter()] * len(delta.token_ids)]

    return ask


def _measured(ask: Ask) -> dict[str, float]:
    seeds = iter(range(1_000_000, 2_000_000))
    ask(distinct_prompt(64, next(seeds)), 8)
    found = {}
    for num_tokens in PROMPTS:
        waited = []
        for _ in range(RUNS):
            prompt, began = distinct_prompt(num_tokens, next(seeds)), time.perf_counter()
            waited.append(ask(prompt, 2)[0] - began)
        found[f"ttft_ms_{num_tokens}"] = 1e3 * min(waited)
        found[f"prefill_tok_s_{num_tokens}"] = num_tokens / min(waited)
    times = ask(distinct_prompt(STREAM_PROMPT_TOKENS, next(seeds)), ANSWER_TOKENS)
    found["decode_ms_b1"] = 1e3 * (times[-1] - times[0]) / (len(times) - 1)
    for num_streams in STREAMS:
        prompts = [distinct_prompt(STREAM_PROMPT_TOKENS, next(seeds)) for _ in range(num_streams)]
        began = time.perf_counter()
        with ThreadPoolExecutor(num_streams) as pool:
            answers = list(pool.map(lambda prompt: ask(prompt, ANSWER_TOKENS), prompts))
        num_tokens = sum(map(len, answers))
        found[f"out_tok_s_c{num_streams}"] = num_tokens / (time.perf_counter() - began)
    return found


def _ratios(metrics: dict[str, float]) -> dict[str, float]:
    """How many times as fast as vLLM."""
    ours = {name: value for name, value in metrics.items() if not name.startswith("vllm_")}
    return {f"{n}_times": times_as_fast(n, value, metrics[f"vllm_{n}"]) for n, value in ours.items()}
