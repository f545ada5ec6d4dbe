"""What does a cluster do with three times the load that it can serve?

1P1D of SmolLM2 in int8, asked by three tenants of weights 1, 2 and 4, each of whom offers a third of all requests:
prompts of 100 to 600 tokens, answers of 16, Poisson arrivals, nothing asked again. The service level is five times the
median time to first token of the idle cluster, which a cluster without one measures first, with the rate at which it
answers requests in a closed loop. Then, on a cluster with that service level: rising rates, each for a while, until
goodput does not rise any more; the rate at which it was highest, for longer; three times as many requests as were
answered then, which is the capacity. Goodput counts the requests that ended within the load's own time, whose first
token came within the service level. Requests come in bursts, so that more is answered in time where more is asked for
than can be: the rate is not the capacity.

Clients are one process, which shares the machine with the cluster; `client_lag_*` is how late it sent.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from rich.console import Console

from bench import overload_figures as figures
from bench.clusters import BenchCluster, running
from bench.overload_load import Clients, Outcome, poisson
from bench.report import BenchReport, percentile
from cluster.errors import ClusterError
from cluster.profile import LoadedProfile, parse_profile
from router.auth import key_digest

WEIGHTS = {"small": 1.0, "middle": 2.0, "large": 4.0}
SLO_TIMES_IDLE = 5.0
OVERLOAD = 3.0
SATURATING = 8
FIRST_STEP, STEP_GROWTH, MAX_STEPS = 0.6, 1.25, 10
"""Of the rate in a closed loop; each next one is so much more."""
SECONDS = 60.0
SEED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds of load: in a closed loop, at each of the rising rates, at the best of them and beyond the capacity."""

    saturated_s: float
    step_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class Subject:
    """The model: a name in the store or a directory. Prompts are drawn from `first_id` up to `vocab_size`."""

    model: str = "smollm2-135m-instruct"
    precision: str = "int8"
    first_id: int = 1_000
    vocab_size: int = 40_000

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Different from any other's from its first tokens on, so that no prefix cache helps."""
        rng = random.Random(seed)
        return [rng.randrange(self.first_id, self.vocab_size) for _ in range(num_tokens)]


@dataclass(frozen=True, slots=True)
class Idle:
    """A cluster without a service level: its median time to first token, and what it answers in a closed loop."""

    ttft_s: float
    requests_per_s: float


def run(console: Console, seconds: str = "") -> BenchReport:
    """`seconds`: how long each measured load lasts. Raises ClusterError where it cannot be."""
    return measure(console, Subject(), float(seconds) if seconds else SECONDS)


def measure(console: Console, subject: Subject, seconds: float) -> BenchReport:
    """All of it, of any model."""
    durations = Durations(saturated_s=seconds / 4, step_s=seconds / 4, measured_s=seconds)
    api_keys = {tenant: f"hr-{secrets.token_urlsafe(32)}" for tenant in WEIGHTS}
    load_before = os.getloadavg()[0]
    with running(profile(subject, api_keys), console) as cluster:
        idle = asyncio.run(_idle(_opening(cluster, subject, api_keys), durations))
    slo_s = round(SLO_TIMES_IDLE * idle.ttft_s, 3)
    with running(profile(subject, api_keys, slo_s), console) as cluster:
        opening = _opening(cluster, subject, api_keys)
        metrics = asyncio.run(_under_load(opening, durations, idle, slo_s))
    weights = ", ".join(f"{each:g}" for each in WEIGHTS.values())
    notes = (
        f"load of the machine: {load_before:.1f} before, {os.getloadavg()[0]:.1f} at the end; "
        "clients and cluster share its cores",
        f"{subject.model} in {subject.precision}; tenants of weights {weights}; {seconds:g} s of each load",
    )
    return BenchReport("overload", metrics, notes)


def profile(subject: Subject, api_keys: Mapping[str, str], slo_s: float | None = None) -> LoadedProfile:
    """1P1D for those tenants."""
    tenants = ", ".join(
        f"{tenant}: {{keys: ['{key_digest(key)}'], weight: {WEIGHTS[tenant]:g}}}"
        for tenant, key in api_keys.items()
    )
    slo = f", slo: {{ttft: {round(1e3 * slo_s)}ms}}" if slo_s is not None else ""
    text = (
        "version: 1\nname: bench-overload\n"
        f"model: {{path: {subject.model}, precision: {subject.precision}}}\n"
        "prefill: {replicas: 1}\ndecode: {replicas: 1, max_drafts: 0}\n"
        f'router: {{grpc: "127.0.0.1:0"{slo}, tenants: {{{tenants}}}}}\n'
    )
    return parse_profile(text, "bench")


def _opening(
    cluster: BenchCluster, subject: Subject, api_keys: Mapping[str, str]
) -> AbstractAsyncContextManager[Clients]:
    return Clients.open(cluster.address, api_keys, subject.prompt)


async def _idle(opening: AbstractAsyncContextManager[Clients], durations: Durations) -> Idle:
    async with opening as clients:
        await clients.saturate(1, durations.saturated_s / 4, SEED)  # warms what the first requests find cold
        alone = await clients.saturate(1, durations.saturated_s / 2, SEED + 1)
        saturated = await clients.saturate(SATURATING, durations.saturated_s, SEED + 2)
    ttft_s = [each.ttft_s for each in _whole(alone) if each.ttft_s is not None]
    ended_s = [each.ended_s for each in _whole(saturated)]
    return Idle(percentile(ttft_s, 50), len(ended_s) / max(ended_s))


async def _under_load(
    opening: AbstractAsyncContextManager[Clients], durations: Durations, idle: Idle, slo_s: float
) -> dict[str, float]:
    async with opening as clients:
        await clients.saturate(1, durations.saturated_s / 4, SEED)

        async def offered(seed: int, rate: float, seconds: float) -> list[Outcome]:
            found: list[Outcome] = await clients.offer(poisson(SEED + seed, rate, seconds, list(WEIGHTS)))
            return found

        goodputs: dict[float, float] = {}
        while len(goodputs) < MAX_STEPS and not figures.is_saturated(list(goodputs.values())):
            rate = FIRST_STEP * STEP_GROWTH ** len(goodputs) * idle.requests_per_s
            outcomes = await offered(10 + len(goodputs), rate, durations.step_s)
            goodputs[rate] = figures.goodput(outcomes, slo_s, durations.step_s)
        best_rate = figures.best_rate(goodputs)
        at_best = await offered(30, best_rate, durations.measured_s)
        capacity = _goodput(at_best, slo_s, durations.measured_s)
        beyond = await offered(31, OVERLOAD * capacity, durations.measured_s)
    steps = {f"goodput_at_{rate / idle.requests_per_s:.2f}": goodput for rate, goodput in goodputs.items()}
    return {
        "idle_ttft_p50_s": idle.ttft_s,
        "slo_s": slo_s,
        "closed_loop_rps": idle.requests_per_s,
        "best_rate_rps": best_rate,
        "capacity_rps": capacity,
        **steps,
        **compared(at_best, beyond, slo_s, durations.measured_s),
    }


def compared(at_best: list[Outcome], beyond: list[Outcome], slo_s: float, seconds: float) -> dict[str, float]:
    """What the overload is judged by, and what explains it."""
    goodput = [_goodput(each, slo_s, seconds) for each in (at_best, beyond)]
    tokens = [figures.goodput_tokens(each, slo_s, seconds) for each in (at_best, beyond)]
    errors = figures.share_errors(figures.service(beyond, seconds), WEIGHTS)
    return {
        "goodput_1x": goodput[0],
        "goodput_3x": goodput[1],
        "goodput_ratio": goodput[1] / goodput[0],
        "goodput_tokens_1x": tokens[0],
        "goodput_tokens_3x": tokens[1],
        "goodput_tokens_ratio": tokens[1] / tokens[0],
        "share_error_max": max(map(abs, errors.values())),
        **{f"share_error_{tenant}": error for tenant, error in errors.items()},
        **figures.latencies(at_best, "_1x"),
        **figures.latencies(beyond),
        **figures.causes(at_best, "1x"),
        **figures.causes(beyond, "3x"),
    }


def _goodput(outcomes: list[Outcome], slo_s: float, seconds: float) -> float:
    """Raises ClusterError where there is none."""
    goodput = figures.goodput(outcomes, slo_s, seconds)
    if not goodput:
        raise ClusterError("nothing was answered within the service level: there is no goodput to compare")
    return goodput


def _whole(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that were answered. Raises ClusterError where none was."""
    whole = [each for each in outcomes if not each.cause]
    if not whole:
        why = outcomes[0].cause if outcomes else "nothing was asked"
        raise ClusterError(f"the cluster answers nothing: {why}")
    return whole
