"""Does placement find what is cached, on a trace of real conversations?

A slice of the trace is asked of two 2P2D clusters whose prefill workers have small caches, and whose decode workers
have room for what they write, one placed by predicted cost and one in turn, part by part in alternation. A hit rate is
the share of the prompts' tokens that nobody computed, beside what one worker with an infinite cache would have had of
the same prompts in the same order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.clusters import BenchCluster
from bench.replay_load import Asked, replayed, requests_per_s
from bench.replay_trace import Replay, infinite_hits, read_trace, scaled, slice_of
from bench.report import BenchReport, percentile
from bench.side_by_side import apart
from cluster.errors import ClusterError
from cluster.profile import LoadedProfile, parse_profile
from headrace import AsyncClient
from headrace.v1.cluster_pb2 import PrefixIndexStatus

NUM_REQUESTS = 120
NUM_PARTS = 6
SEED = 0
LOAD = 0.85
"""Of what the cluster can compute where no prompt is computed twice."""
CACHE_PART = 0.6
"""Of all the blocks of the slice, what a prefill worker has room for: two hold it, if they share it out; one does
not."""
DECODE_PROMPTS = 4
"""What a decode worker has room for: so many of the longest prompts with their answers."""
KV_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2
"""SmolLM2-135M's: 30 layers, keys and values of 3 heads of 64, in bfloat16."""
LENGTH_FACTOR = 32
LONGEST_PROMPT = 4096
LONGEST_ANSWER = 256
BLOCK_TOKENS = 64
POLICIES = ("cost", "round-robin")
_PROFILE = """
version: 1
name: replay-{policy}
model: {{path: smollm2-135m-instruct, precision: int8, max_context: 4608}}
prefill: {{replicas: 2, chunk: 256, kv_memory: {memory}MiB}}
decode: {{replicas: 2, chunk: 256, kv_memory: {decode_memory}MiB, max_drafts: 0}}
router: {{grpc: "127.0.0.1:0", policy: {policy}}}
"""


@dataclass(slots=True)
class _Run:
    """One policy's, over all parts."""

    place: str
    asked: list[Asked] = field(default_factory=list)
    index: PrefixIndexStatus = field(default_factory=PrefixIndexStatus)

    @property
    def hit_rate(self) -> float:
        return sum(each.cached_tokens for each in self.asked) / self.num_tokens

    @property
    def infinite_hit_rate(self) -> float:
        return sum(infinite_hits([each.prompt for each in self.asked], BLOCK_TOKENS)) / self.num_tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(each.prompt) for each in self.asked)

    def metrics(self, name: str) -> dict[str, float]:
        ttfts_s = [each.ttft_s for each in self.asked]
        return {
            f"ttft_p50_{name}_s": percentile(ttfts_s, 50),
            f"ttft_p90_{name}_s": percentile(ttfts_s, 90),
            f"hit_rate_{name}": self.hit_rate,
            f"fetched_rate_{name}": sum(each.fetched_tokens for each in self.asked) / self.num_tokens,
            f"local_share_{name}": sum(each.is_local for each in self.asked) / len(self.asked),
        }


def run(console: Console, trace: str = "") -> BenchReport:
    """Both policies, in turns. Raises ClusterError for a trace that cannot be replayed."""
    if not trace:
        raise ClusterError("replay needs a trace of requests: --trace FILE")
    try:
        chosen = slice_of(read_trace(Path(trace)), NUM_REQUESTS, LENGTH_FACTOR * LONGEST_PROMPT, SEED)
        replay = scaled(chosen, LENGTH_FACTOR, LONGEST_ANSWER)
    except (OSError, ValueError) as error:
        raise ClusterError(f"the trace cannot be replayed: {error}") from error
    with ExitStack() as stack:
        clusters = {
            policy: stack.enter_context(apart(_profile(policy, replay), console)) for policy in POLICIES
        }
        runs = {policy: _Run(cluster.describe()) for policy, cluster in clusters.items()}
        speed = asyncio.run(_replay(clusters, replay, runs, console))
    return BenchReport("replay", _metrics(replay, runs, speed), _notes(replay, runs))


async def _replay(
    clusters: Mapping[str, BenchCluster], replay: Replay, runs: Mapping[str, _Run], console: Console
) -> float:
    """Every part of one and then of the other, the other way round the next time; returns the speed of time."""
    num = len(replay.requests)
    answers = sum(request.answer_tokens for request in replay.requests)
    async with AsyncExitStack() as stack:
        clients = {
            policy: await stack.enter_async_context(AsyncClient(cluster.address))
            for policy, cluster in clusters.items()
        }
        with console.status("warming up …"):
            # Both, so that each router has seen how fast its workers are.
            capacity = [
                await requests_per_s(client, _lacking(replay) // num, answers // num)
                for client in clients.values()
            ]
        speed = replay.span_s / (num / (LOAD * min(capacity)))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("replay", total=num * len(clients))
            for number, part in enumerate(replay.parts(NUM_PARTS)):
                for policy in POLICIES if number % 2 == 0 else reversed(POLICIES):
                    progress.update(task, description=policy)
                    runs[policy].asked += await replayed(
                        clients[policy], part, speed, lambda: progress.advance(task)
                    )
        for policy, client in clients.items():
            runs[policy].index = (await client.status()).prefix_index
    return speed


def _profile(policy: str, replay: Replay) -> LoadedProfile:
    text = _PROFILE.format(
        policy=policy,
        memory=_memory_mib(replay),
        decode_memory=_mib(DECODE_PROMPTS * _longest(replay)),
    )
    return parse_profile(text, "bench")


def _memory_mib(replay: Replay) -> int:
    """Of one prefill worker's cache; at least two of the longest prompts with their answers."""
    return _mib(max(CACHE_PART * _lacking(replay), 2 * _longest(replay)))


def _longest(replay: Replay) -> int:
    return max(len(request.prompt) + request.answer_tokens for request in replay.requests)


def _mib(num_tokens: float) -> int:
    return int(num_tokens * KV_BYTES_PER_TOKEN / (1 << 20)) + 1


def _lacking(replay: Replay) -> int:
    prompts = [request.prompt for request in replay.requests]
    return sum(map(len, prompts)) - sum(infinite_hits(prompts, BLOCK_TOKENS))


def _metrics(replay: Replay, runs: Mapping[str, _Run], speed: float) -> dict[str, float]:
    cost, in_turn = runs["cost"], runs["round-robin"]
    metrics = {
        "hit_rate": cost.hit_rate,
        "infinite_hit_rate": cost.infinite_hit_rate,
        "hit_ratio": cost.hit_rate / cost.infinite_hit_rate,
        **cost.metrics("cost"),
        **in_turn.metrics("round_robin"),
    }
    del metrics["hit_rate_cost"]
    return metrics | {
        "ttft_ratio": metrics["ttft_p50_cost_s"] / metrics["ttft_p50_round_robin_s"],
        "false_hit_rate": cost.index.false_hit_rate,
        "num_requests": len(replay.requests),
        "prompt_tokens_mean": cost.num_tokens / len(replay.requests),
        "length_factor": replay.factor,
        "time_factor": speed,
        "cache_mib": _memory_mib(replay),
        "decode_cache_mib": _mib(DECODE_PROMPTS * _longest(replay)),
        "working_set_mib": _lacking(replay) * KV_BYTES_PER_TOKEN / (1 << 20),
    }


def _notes(replay: Replay, runs: Mapping[str, _Run]) -> tuple[str, ...]:
    sessions = len({request.session for request in replay.requests})
    return (
        f"{len(replay.requests)} requests of {sessions} conversations; lengths divided by {replay.factor}, times so "
        f"that {LOAD:.0%} of what the cluster can do is asked of it where no prompt is computed twice",
        *(f"{policy}: {each.place}" for policy, each in runs.items()),
    )
