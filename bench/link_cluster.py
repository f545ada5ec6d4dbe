"""1P1D without Ray, with a link between them: prefill on one end, decode, router and client on the other.

The decode worker's memory holds one prompt, the prefill worker's all of them: asked for a second time, a prompt is
computed already and its KV has to travel all the same. That is a long prefix known to prefill, with a decode worker
that is new to it.
"""

from __future__ import annotations

import os
import pickle
import secrets
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.kv_sample import MODEL, real_tokens
from bench.links import Link
from cluster.model_store import resolve
from cluster.plan import MALLOC_ENVIRONMENT
from router.config import RouterConfig
from worker.config import WorkerConfig, WorkerRole

PROMPT_TOKENS = 1536
MAX_CONTEXT = PROMPT_TOKENS + 64
NUM_PROMPTS = 2
ROUTER_PORT = 8460
TIMEOUT_S = 300.0
KV_DTYPE = "bfloat16"
KV_BYTES_PER_TOKEN = 23_040


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Median times to first token in seconds: of prompts that nobody knows, and of those that prefill knows."""

    cold_s: float
    cached_s: float


def first_tokens(link: Link, directory: Path, codec: str) -> FirstTokens:
    """Ask for `NUM_PROMPTS` real prompts one after the other, then for all of them again."""
    with _cluster(link, directory, codec) as router:
        ask = [*link.receiver_prefix, sys.executable, "-m", "bench.link_client", router]
        answers = subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    seconds = [float(line) for line in answers.stdout.split()]
    return FirstTokens(statistics.median(seconds[:NUM_PROMPTS]), statistics.median(seconds[NUM_PROMPTS:]))


def prompts() -> list[list[int]]:
    """Stretches of the real text, different from their first token on."""
    tokens = real_tokens(PROMPT_TOKENS * NUM_PROMPTS)
    return [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(NUM_PROMPTS)]


@contextmanager
def _cluster(link: Link, directory: Path, codec: str) -> Iterator[str]:
    secret = secrets.token_bytes(32)
    router = f"{link.receiver_host}:{ROUTER_PORT}"
    common = {"model_dir": resolve(MODEL), "cluster_secret": secret}
    cores = sorted(os.sched_getaffinity(0))
    configs: Sequence[tuple[tuple[str, ...], RouterConfig | WorkerConfig]] = (
        (
            link.receiver_prefix,
            RouterConfig(
                router_id="router-0",
                policy="least-loaded",
                model_name=MODEL,
                listen=router,
                max_context=MAX_CONTEXT,
                **common,
            ),
        ),
        *(
            (
                prefix,
                WorkerConfig(
                    worker_id=f"{role}-0",
                    role=role,
                    kv_dtype=KV_DTYPE,
                    max_context=MAX_CONTEXT,
                    kv_bytes=num_contexts * (MAX_CONTEXT + 64) * KV_BYTES_PER_TOKEN,
                    cpus=(core,),
                    service_cpus=(cores[0],),
                    routers=(router,),
                    host=host,
                    codec=codec,
                    **common,
                ),
            )
            for role, prefix, host, core, num_contexts in (
                (WorkerRole.PREFILL, link.sender_prefix, link.sender_host, cores[0], NUM_PROMPTS + 1),
                (WorkerRole.DECODE, link.receiver_prefix, link.receiver_host, cores[-1], 1),
            )
        ),
    )
    with ExitStack() as stack:
        for index, (prefix, config) in enumerate(configs):
            file = directory / f"{codec}-{index}.pickle"
            file.touch(mode=0o600)
            file.write_bytes(pickle.dumps(config))
            stack.enter_context(_process(prefix, file))
        yield router


@contextmanager
def _process(prefix: Sequence[str], file: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "bench.link_process", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | MALLOC_ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RuntimeError("a process of the benchmark did not start; its error is above")
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
