"""What does one engine do, beside what the machine could?

One process per precision, all cores, SmolLM2: tokens a second of prompts that nothing is known of, milliseconds of a
step of one answer, tokens a second of 4 and 16 answers together; seconds until it can serve, from the start of the
process; resident memory beyond weights, cache and torch's own import. `gemm_limit_tok_s` is what prefill would be if
it were its products alone, `stream_limit_ms` what a step would be if it were reading the weights alone, both
measured here. Names of float32 have nothing in front, the others their precision.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from rich.console import Console

from bench.engine_process import PROMPTS, STREAM_PROMPT_TOKENS, STREAMS
from bench.kv_sample import MODEL
from bench.report import BenchReport
from bench.vllm_server import asked_path, served
from cluster.model_store import resolve
from cluster.plan import MALLOC_ENVIRONMENT

PREFIXES = {"float32": "", "bfloat16": "bfloat16_", "int8": "int8_"}
TIMEOUT_S = 900.0


def run(console: Console, compare: str = "") -> BenchReport:
    """One precision after the other; first the peer that `compare` names, as `vllm=ENVIRONMENT`.

    Raises ClusterError for a peer that is not known or does not start.
    """
    metrics: dict[str, float] = {}
    num_threads = len(os.sched_getaffinity(0))
    if compare:
        environment = asked_path(compare)
        waiting = console.status("vLLM (its first start compiles for minutes) …")
        with waiting, served(environment, resolve(MODEL)) as server:
            measured = server.measure(PROMPTS, STREAMS, STREAM_PROMPT_TOKENS)
        metrics |= {f"vllm_{name}": value for name, value in measured.items()}
    for precision, prefix in PREFIXES.items():
        with console.status(f"{precision} on {num_threads} cores …"):
            done = subprocess.run(
                [sys.executable, "-m", "bench.engine_process", precision, str(num_threads)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT_S,
                env=os.environ | MALLOC_ENVIRONMENT,
            )
        metrics |= {f"{prefix}{name}": value for name, value in json.loads(done.stdout).items()}
    return BenchReport("engine", metrics, (f"{num_threads} threads; steps follow prompts of 128 tokens",))
