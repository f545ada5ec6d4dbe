"""What does one engine do, beside what the machine could?

One process per precision, all cores, SmolLM2: tokens a second of prompts that nothing is known of, milliseconds of a
step of one answer, tokens a second of 4 and 16 answers together; seconds until it can serve, from the start of the
process; resident memory beyond weights, cache and torch's own import. `gemm_limit_tok_s` is what prefill would be if
it were its products alone, `stream_limit_ms` what a step would be if it were reading the weights alone, both
measured here. Names of float32 have nothing in front, the others their precision.

A peer is measured before each precision and after it, since a shared machine is not the same one half a minute later:
`vllm_` or `llama_cpp_` gives medians, `_times` how many times as fast as the mean of the two a precision was.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise

from rich.console import Console

from bench.engine_process import PROMPTS, STREAM_PROMPT_TOKENS, STREAMS
from bench.kv_sample import MODEL
from bench.peer import LLAMA_CPP, VLLM, Peer, asked, there
from bench.report import BenchReport, times_as_fast
from cluster.model_store import resolve
from cluster.plan import MALLOC_ENVIRONMENT

PREFIXES = {"float32": "", "bfloat16": "bfloat16_", "int8": "int8_"}
TIMEOUT_S = 900.0


def run(console: Console, compare: str = "") -> BenchReport:
    """One precision after the other; in between the peer that `compare` names, as `PEER=ENVIRONMENT`.

    Raises ClusterError for a peer that is not known or does not start.
    """
    num_threads = len(os.sched_getaffinity(0))
    metrics: dict[str, float] = {}
    ours: dict[str, dict[str, float]] = {}
    theirs: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        name, peer = "", None
        if compare:
            name, environment = asked(compare, (VLLM, LLAMA_CPP))
            with console.status(f"{name} (vLLM's first start compiles for minutes) …"):
                peer = stack.enter_context(there(name, environment, resolve(MODEL)))
                theirs.append(_ask(peer))
        for precision, prefix in PREFIXES.items():
            waiting = console.status(f"{precision} on {num_threads} cores …")
            with waiting, peer.stopped() if peer is not None else contextlib.nullcontext():
                ours[precision] = _measure(precision, num_threads)
                metrics |= {f"{prefix}{metric}": value for metric, value in ours[precision].items()}
            if peer is not None:
                with console.status(f"{name} …"):
                    theirs.append(_ask(peer))
    if theirs:
        front = name.replace("-", "_")
        metrics |= {
            f"{front}_{metric}": statistics.median(each[metric] for each in theirs) for metric in theirs[0]
        }
        metrics |= _times(ours, theirs)
    return BenchReport("engine", metrics, (f"{num_threads} threads; steps follow prompts of 128 tokens",))


def _ask(peer: Peer) -> dict[str, float]:
    return peer.measure(PROMPTS, STREAMS, STREAM_PROMPT_TOKENS)


def _measure(precision: str, num_threads: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.engine_process", precision, str(num_threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | MALLOC_ENVIRONMENT,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _times(ours: dict[str, dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """How many times as fast as the peer was just before and just after."""
    found = {}
    for (precision, measured), (before, after) in zip(ours.items(), pairwise(theirs), strict=True):
        for name in before:
            peer = (before[name] + after[name]) / 2
            found[f"{PREFIXES[precision]}{name}_times"] = times_as_fast(name, measured[name], peer)
    return found
