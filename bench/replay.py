"""Does placement find what is cached, on a trace of real conversations?

A slice of the trace is asked of 2P2D clusters of small caches, once placed by predicted cost and once in turn, at
the same times. A hit rate is the share of the prompts' tokens that nobody computed, beside what one worker with an
infinite cache would have had of the same prompts in the same order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.replay_load import Asked, replayed, requests_per_s
from bench.replay_trace import Replay, infinite_hits, read_trace, scaled, slice_of
from bench.report import BenchReport, percentile
from bench.side_by_side import apart
from cluster.errors import ClusterError
from cluster.profile import LoadedProfile, parse_profile
from headrace import AsyncClient
from headrace.v1.cluster_pb2 import PrefixIndexStatus

NUM_REQUESTS = 100
SEED = 0
LOAD = 0.65
"""Of what the cluster can compute where no prompt is computed twice."""
LENGTH_FACTOR = 32
LONGEST_PROMPT = 4096
LONGEST_ANSWER = 256
BLOCK_TOKENS = 64
POLICIES = ("cost", "round-robin")
_PROFILE = """
version: 1
name: replay-{policy}
model: {{path: smollm2-135m-instruct, precision: int8, max_context: 4608}}
prefill: {{replicas: 2, chunk: 256, kv_memory: 512MiB}}
decode: {{replicas: 2, chunk: 256, kv_memory: 512MiB, max_drafts: 0}}
router: {{grpc: "127.0.0.1:0", policy: {policy}}}
"""


@dataclass(frozen=True, slots=True)
class _Run:
    """One policy's."""

    asked: Sequence[Asked]
    index: PrefixIndexStatus
    speed: float
    place: str

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
    """Both policies, one after the other. Raises ClusterError for a trace that cannot be replayed."""
    if not trace:
        raise ClusterError("replay needs a trace of requests: --trace FILE")
    try:
        chosen = slice_of(read_trace(Path(trace)), NUM_REQUESTS, LENGTH_FACTOR * LONGEST_PROMPT, SEED)
        replay = scaled(chosen, LENGTH_FACTOR, LONGEST_ANSWER)
    except (OSError, ValueError) as error:
        raise ClusterError(f"the trace cannot be replayed: {error}") from error
    runs: dict[str, _Run] = {}
    speed = 0.0
    for policy in POLICIES:
        profile = parse_profile(_PROFILE.format(policy=policy), "bench")
        runs[policy] = asyncio.run(_replay(profile, replay, speed, console))
        speed = runs[policy].speed
    return BenchReport("replay", _metrics(replay, runs), _notes(replay, runs))


async def _replay(profile: LoadedProfile, replay: Replay, speed: float, console: Console) -> _Run:
    """`speed`: of time; 0 to measure what the cluster can do and take LOAD of that."""
    lacking = _lacking(replay)
    answers = sum(request.answer_tokens for request in replay.requests)
    with apart(profile, console) as cluster:
        async with AsyncClient(cluster.address) as client:
            with console.status(f"{cluster.name}: warming up …"):
                # Under each policy, so that each router has seen how fast its workers are.
                num = len(replay.requests)
                capacity = await requests_per_s(client, lacking // num, answers // num)
            speed = speed or replay.span_s / (num / (LOAD * capacity))
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=console) as progress:
                task = progress.add_task(cluster.name, total=num)
                asked = await replayed(client, replay, speed, lambda: progress.advance(task))
            index = (await client.status()).prefix_index
        return _Run(asked, index, speed, cluster.describe())


def _lacking(replay: Replay) -> int:
    prompts = [request.prompt for request in replay.requests]
    return sum(map(len, prompts)) - sum(infinite_hits(prompts, BLOCK_TOKENS))


def _metrics(replay: Replay, runs: dict[str, _Run]) -> dict[str, float]:
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
        "time_factor": cost.speed,
    }


def _notes(replay: Replay, runs: dict[str, _Run]) -> tuple[str, ...]:
    sessions = len({request.session for request in replay.requests})
    return (
        f"{len(replay.requests)} requests of {sessions} conversations; lengths divided by {replay.factor}, times so "
        f"that {LOAD:.0%} of what the cluster can do is asked of it where no prompt is computed twice",
        *(f"{policy}: {each.place}" for policy, each in runs.items()),
    )
