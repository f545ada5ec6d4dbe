"""When not to split: is the default policy as good as the better of colocated and disaggregated, whatever is asked?

Short prompts, long prompts, and prompts of which nine tenths are cached, against two colocated workers, one prefill
and one decode worker that never prefills, and one colocated and one decode worker under the default policy, which may
prefill on either and decode on either. A core for each engine. The three clusters are up beside one another and asked
in turns, one at a time, so that a machine's slow minutes fall on all of them. Goodput is requests a second that kept
limits, which are multiples of what requests took that were alone; of several numbers of requests at a time, the best.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.clusters import BenchCluster
from bench.replay_load import Asked
from bench.report import BenchReport, percentile
from bench.shapes_load import SHAPES, Limits, Seen, Shape, ask_alone, ask_in_loops, limits_of, mean_gap_s
from bench.side_by_side import apart
from cluster.profile import parse_profile
from headrace import AsyncClient

ROUNDS = 4
TIMES_IDLE_TTFT = 5.0
TIMES_IDLE_ITL = 3.0
COLOCATED, SPLIT, DEFAULT = "colocated", "disaggregated", "default"
_HEAD = """
version: 1
name: shapes-{name}
model: {{path: smollm2-135m-instruct, precision: int8, max_context: 4096}}
router: {{grpc: "127.0.0.1:0", policy: {policy}}}
"""
_WORKER = "resources: {cpus: 1}, kv_memory: 384MiB, chunk: 256"
_DECODE = f"decode: {{{_WORKER}, max_drafts: 0}}\n"
_CONFIGS = {
    COLOCATED: ("cost", f"colocated: {{replicas: 2, {_WORKER}, max_drafts: 0}}\n"),
    SPLIT: ("least-loaded", f"prefill: {{{_WORKER}}}\n{_DECODE}"),
    DEFAULT: ("cost", f"colocated: {{{_WORKER}, max_drafts: 0}}\n{_DECODE}"),
}


@dataclass(slots=True)
class _Measured:
    """By shape: requests alone, of all clusters; and by shape, cluster and requests at a time, the others."""

    idle: dict[str, list[Asked]] = field(default_factory=dict)
    seen: dict[tuple[str, str, int], Seen] = field(default_factory=dict)

    def limits(self, shape: Shape) -> Limits:
        return limits_of(self.idle[shape.name], TIMES_IDLE_TTFT, TIMES_IDLE_ITL)

    def best_level(self, shape: Shape, config: str) -> int:
        limits = self.limits(shape)
        return max(shape.levels, key=lambda level: self.seen[shape.name, config, level].goodput(limits))

    def goodput(self, shape: Shape, config: str) -> float:
        level = self.best_level(shape, config)
        return self.seen[shape.name, config, level].goodput(self.limits(shape))


def run(console: Console) -> BenchReport:
    """Bring all three up, ask them in turns. Raises what cluster.launch.up raises."""
    with ExitStack() as stack:
        clusters = {
            name: stack.enter_context(
                apart(parse_profile(_HEAD.format(name=name, policy=policy) + sections, "bench"), console)
            )
            for name, (policy, sections) in _CONFIGS.items()
        }
        measured = asyncio.run(_measure(clusters, console))
        places = [f"{name}: {cluster.describe()}" for name, cluster in clusters.items()]
    metrics: dict[str, float] = {}
    for shape in SHAPES:
        metrics |= _metrics(shape, measured)
    return BenchReport("shapes", metrics, tuple(places))


async def _measure(clusters: Mapping[str, BenchCluster], console: Console) -> _Measured:
    measured = _Measured()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    num_steps = sum(len(clusters) * (1 + ROUNDS * len(shape.levels)) for shape in SHAPES)
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(AsyncClient(cluster.address))
            for name, cluster in clusters.items()
        }
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("alone", total=num_steps)
            step = partial(progress.advance, task)
            for shape in SHAPES:
                measured.idle[shape.name] = []
                for client in clients.values():
                    measured.idle[shape.name] += await ask_alone(client, shape, seed=-1)
                    progress.advance(task)
            for number in range(ROUNDS):
                for shape in SHAPES:
                    progress.update(task, description=f"round {number + 1}, {shape.name}")
                    await _round(clients, shape, number, measured, step)
    return measured


async def _round(
    clients: Mapping[str, AsyncClient],
    shape: Shape,
    number: int,
    measured: _Measured,
    step: Callable[[], None],
) -> None:
    """Every level, the clusters in another order each time."""
    names = list(clients)
    for place, level in enumerate(shape.levels):
        first = (number + place) % len(names)
        for name in names[first:] + names[:first]:
            seen = measured.seen.setdefault((shape.name, name, level), Seen())
            await ask_in_loops(clients[name], shape, level, number * 100 + level, seen)
            step()


def _metrics(shape: Shape, measured: _Measured) -> dict[str, float]:
    limits = measured.limits(shape)
    goodputs = {name: measured.goodput(shape, name) for name in _CONFIGS}
    metrics = {f"goodput_{shape.name}_{name}": value for name, value in goodputs.items()}
    metrics[f"ratio_{shape.name}"] = goodputs[DEFAULT] / max(goodputs[COLOCATED], goodputs[SPLIT])
    metrics[f"limit_ttft_{shape.name}_s"] = limits.ttft_s
    metrics[f"limit_itl_{shape.name}_ms"] = 1e3 * limits.itl_s
    for name in _CONFIGS:
        level = measured.best_level(shape, name)
        asked = measured.seen[shape.name, name, level].asked
        end = f"{shape.name}_{name}"
        metrics[f"best_level_{end}"] = level
        metrics[f"ttft_p50_{end}_s"] = percentile([each.ttft_s for each in asked], 50)
        metrics[f"itl_p50_{end}_ms"] = 1e3 * percentile([mean_gap_s(each) for each in asked], 50)
        metrics[f"hit_rate_{end}"] = sum(e.cached_tokens for e in asked) / sum(len(e.prompt) for e in asked)
        metrics[f"local_share_{end}"] = sum(each.is_local for each in asked) / len(asked)
        for other in shape.levels:
            metrics[f"goodput_{end}_c{other}"] = measured.seen[shape.name, name, other].goodput(limits)
    return metrics
