"""One engine by itself, measured in a process of its own: `python -m bench.engine_process PRECISION THREADS`.

Prints one JSON object of numbers.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from bench.kv_sample import MODEL
from bench.prompts import distinct_prompt
from bench.speeds import speeds
from cluster.model_store import resolve
from engine.engine import Engine
from engine.events import PrefillDone
from engine.linear import Int8Linear, Linear, Product
from engine.models.config import ModelConfig
from engine.request import SamplingParams
from engine.runner import EngineOptions

PROMPTS = (128, 1024, 4096)
STREAMS = (1, 4, 16)
STREAM_PROMPT_TOKENS = 128
STEPS = 40
RUNS = 3
KV_BYTES = 1 << 30
LIMIT_ROWS = 512
STREAM_BYTES = 512 << 20
_MIB = 1 << 20
_PEAK = r"VmHWM:\s+(\d+) kB"  # of the program alone; getrusage also counts the process that started it
_TORCH_ALONE = f"import re, torch; print(re.search(r'{_PEAK}', open('/proc/self/status').read())[1])"


def measure(precision: str, num_threads: int) -> dict[str, float]:
    """All of it."""
    model_dir = resolve(MODEL)
    options = EngineOptions(
        precision=precision,
        num_threads=num_threads,
        kv_bytes=KV_BYTES,
        max_context=max(PROMPTS) + 64,
        max_drafts=0,  # a step is a token of each answer (`headrace bench drafts` measures guesses)
    )
    engine = Engine.open(model_dir, options)
    ready_s = time.time() - psutil.Process().create_time()
    found = {"ready_s": ready_s, "invariant": float(engine.invariant)}
    seeds = iter(range(10_000))
    prefill_s = {
        num_tokens: statistics.median(_prefill_s(engine, num_tokens, next(seeds)) for _ in range(RUNS))
        for num_tokens in PROMPTS
    }
    found |= speeds(prefill_s, {num_streams: _step_s(engine, num_streams, seeds) for num_streams in STREAMS})
    torch_mib = float(subprocess.check_output([sys.executable, "-c", _TORCH_ALONE], text=True)) / 1024
    kept_mib = (_weight_bytes(engine.config, precision) + engine.cache.num_bytes) / _MIB
    found["extra_rss_mib"] = _peak_rss_mib() - torch_mib - kept_mib
    return found | _limits(engine.config, precision)


def _prefill_s(engine: Engine, num_tokens: int, seed: int) -> float:
    lease_id, prompt = seed.to_bytes(16, "little"), distinct_prompt(num_tokens, seed)
    engine.reserve(lease_id, prompt, 1, b"bench")
    began = time.perf_counter()
    engine.submit(lease_id, prompt, SamplingParams(temperature=0.0), prefill_only=True)
    while not any(isinstance(event, PrefillDone) for event in engine.step().events):
        pass
    took_s = time.perf_counter() - began
    engine.release(lease_id)
    return took_s


def _step_s(engine: Engine, num_streams: int, seeds: Iterator[int]) -> float:
    """Median of steps in which every stream draws one token."""
    leases = [next(seeds) for _ in range(num_streams)]
    sampling = SamplingParams(temperature=0.0, max_tokens=STEPS + num_streams + 2, ignore_eos=True)
    for seed in leases:
        prompt = distinct_prompt(STREAM_PROMPT_TOKENS, seed)
        engine.reserve(seed.to_bytes(16, "little"), prompt, 1, b"bench")
        engine.submit(seed.to_bytes(16, "little"), prompt, sampling, prefill_only=False)
    taken = []
    while engine.has_work():
        began = time.perf_counter()
        events = engine.step().events
        if len(events) == num_streams:
            taken.append(time.perf_counter() - began)
    for seed in leases:
        engine.release(seed.to_bytes(16, "little"))
    return statistics.median(taken)


def _limits(config: ModelConfig, precision: str) -> dict[str, float]:
    """What this machine could do: tokens a second if prefill were its products alone, and milliseconds of a step if
    that were reading the weights alone."""
    products_s = sum(_product_s(shape, precision) for shape in _layer_shapes(config)) * config.num_layers
    stream = np.ones(STREAM_BYTES // 8, np.int64)
    seconds = min(_timed(stream.sum) for _ in range(RUNS))
    stream_s = _weight_bytes(config, precision) * seconds / STREAM_BYTES
    return {"gemm_limit_tok_s": LIMIT_ROWS / products_s, "stream_limit_ms": 1e3 * stream_s}


def _product_s(shape: tuple[int, int], precision: str) -> float:
    weight = torch.randn(shape)
    if precision == "int8":
        product: Product = Int8Linear(weight)
    else:
        product = Linear(weight.to(getattr(torch, precision)))
    rows = torch.randn(LIMIT_ROWS, shape[1])
    return min(_timed(lambda: product(rows)) for _ in range(3 * RUNS))


def _layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[out, in] of a layer's products."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]


def _weight_bytes(config: ModelConfig, precision: str) -> int:
    """As they lie in memory; the embedding is kept beside the output head."""
    products = config.num_layers * sum(out * width for out, width in _layer_shapes(config))
    head = config.vocab_size * config.hidden_size
    match precision:
        case "int8":
            return products + head + 2 * head
        case "bfloat16":
            return 2 * products + 2 * head + 2 * head
        case _:
            return 4 * (products + head)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak_rss_mib() -> float:
    found = re.search(_PEAK, Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))  # noqa: T201
