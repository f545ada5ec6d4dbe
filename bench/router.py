"""What does the router itself weigh?

A real router in a process of its own, with the model's tokenizer; mock workers (1P1D) and a bare gRPC server
in a second process, clients in a third. Time to first token through the router is compared with calls to the
bare server, which sends messages of the same size: legs take turns, and answers last so long that about 200
requests a second are under way at each concurrency. CPU seconds are those of the router's process under paced
load: 200 requests a second of 512 bytes and 16 tokens, and 128 streams with a token every 20 ms; `_direct`:
while the clients stream these from the workers, past the router. `bare_` are the bare server's under the same
load: what gRPC for Python takes by itself. At saturation mock workers do not wait between steps; clients and
workers share the machine then. Placement is measured in this process
(`bench.router_placement`).
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console

from bench import router_placement
from bench.report import BenchReport, percentile
from bench.router_cluster import DIRECT, ROUTED, BenchCluster, Window, running
from bench.router_load import Load
from bench.router_report import RouterReport
from cluster.errors import ClusterError

CONCURRENCIES = (1, 16, 64)
ANSWER_TOKENS = 16
REQUESTS_PER_S = 200
PACED_RATES = (200, 100, 50, 25)
"""The first that this machine keeps up with counts."""
STEP_S = 0.02
NUM_STREAMS = 128
STREAM_TOKENS = 7000
SATURATING = 128
WORKERS = (10, 100, 1000)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long and how often."""

    repeats: int = 3
    warm_up_s: float = 3.0  # in which 128 streams begin: a request costs as much as a hundred tokens
    window_s: float = 6.0
    num_prompts: int = 2000
    num_blocks: int = router_placement.NUM_BLOCKS


QUICK = Sizes(repeats=1, warm_up_s=2.0, window_s=2.0, num_prompts=300)


def run(console: Console, quick: str = "") -> RouterReport:
    """Medians of the repeats. `quick`: not empty, one short repeat. Raises ClusterError where it cannot be."""
    return measure(console, QUICK if quick else Sizes())


def measure(console: Console, sizes: Sizes) -> RouterReport:
    """All of it."""
    load_before = os.getloadavg()[0]
    found: list[dict[str, float]] = []
    with running(dict(os.environ)) as cluster:
        bench = _Bench(cluster, sizes, console)
        for number in range(sizes.repeats):
            found.append(bench.repeat(f"{number + 1} of {sizes.repeats}"))
        elsewhere, tokenizer = cluster.prefilled_elsewhere(), cluster.tokenizer
    load_after = os.getloadavg()[0]
    metrics = medians(found) | _placement(console, sizes)
    notes = (
        f"tokenizer: {tokenizer}; {100 * elsewhere:.0f} % of the prompts went to the prefill worker",
        f"load of the machine: {load_before:.1f} before, {load_after:.1f} under traffic, {os.getloadavg()[0]:.1f} "
        "at the end; CPU seconds and times grow when others use it",
    )
    return RouterReport(BenchReport("router", metrics, notes))


class _Bench:
    """One repeat after the other."""

    def __init__(self, cluster: BenchCluster, sizes: Sizes, console: Console) -> None:
        self._cluster = cluster
        self._sizes = sizes
        self._console = console
        self._rates = list(PACED_RATES)

    def repeat(self, which: str) -> dict[str, float]:
        """Every load once."""
        metrics: dict[str, float] = {}
        for concurrency in CONCURRENCIES:
            with self._console.status(f"{which}: time to first token at {concurrency} …"):
                metrics |= self._added_ttft(concurrency)
        with self._console.status(f"{which}: paced requests …"):
            metrics |= self._paced_requests()
        with self._console.status(f"{which}: paced tokens …"):
            metrics |= self._paced_tokens()
        with self._console.status(f"{which}: saturation …"):
            metrics |= self._saturated()
        return metrics

    def _added_ttft(self, concurrency: int) -> dict[str, float]:
        step_s = concurrency / REQUESTS_PER_S / ANSWER_TOKENS
        direct, routed = (
            self._under(Load(target=target, num_tokens=ANSWER_TOKENS, concurrency=concurrency), step_s)
            for target in (DIRECT, ROUTED)
        )
        return added_ttft(concurrency, direct.ttft_s, routed.ttft_s)

    def _paced_requests(self) -> dict[str, float]:
        while True:
            rate = self._rates[0]
            load = Load(target=ROUTED, num_tokens=ANSWER_TOKENS, rate=rate)
            try:
                routed = self._under(load, STEP_S)
                break
            except ClusterError:
                if len(self._rates) == 1:
                    raise
                del self._rates[0]
        bare = self._under(Load(target=DIRECT, num_tokens=ANSWER_TOKENS, rate=rate), STEP_S)
        return {
            "paced_requests_per_s": rate,
            "cpu_s_per_1k_requests": 1e3 * routed.router_cpu_s / routed.num_requests,
            "bare_cpu_s_per_1k_requests": 1e3 * bare.workers_cpu_s / bare.num_requests,
        }

    def _paced_tokens(self) -> dict[str, float]:
        routed, bare = (
            self._under(Load(target=target, num_tokens=STREAM_TOKENS, concurrency=NUM_STREAMS), STEP_S)
            for target in (ROUTED, DIRECT)
        )
        past_router = self._under(
            Load(target=ROUTED, num_tokens=STREAM_TOKENS, concurrency=NUM_STREAMS, direct=True), STEP_S
        )
        return {
            "cpu_s_per_100k_tokens_direct": 1e5 * past_router.router_cpu_s / past_router.num_tokens,
            "paced_tokens_per_s_direct": past_router.num_tokens / past_router.seconds,
            "paced_tokens_per_s": routed.num_tokens / routed.seconds,
            "paced_tokens_per_message": routed.num_tokens / routed.num_messages,
            "cpu_s_per_100k_tokens": 1e5 * routed.router_cpu_s / routed.num_tokens,
            "bare_cpu_s_per_100k_tokens": 1e5 * bare.workers_cpu_s / bare.num_tokens,
        }

    def _saturated(self) -> dict[str, float]:
        requests = self._under(Load(target=ROUTED, num_tokens=ANSWER_TOKENS, concurrency=SATURATING), 0.0)
        tokens = self._under(Load(target=ROUTED, num_tokens=STREAM_TOKENS, concurrency=NUM_STREAMS), 0.0)
        return {
            "requests_per_s": requests.num_requests / requests.seconds,
            "cpu_s_per_1k_requests_saturated": 1e3 * requests.router_cpu_s / requests.num_requests,
            "relayed_tokens_per_s": tokens.num_tokens / tokens.seconds,
            "cpu_s_per_100k_tokens_saturated": 1e5 * tokens.router_cpu_s / tokens.num_tokens,
        }

    def _under(self, load: Load, step_s: float) -> Window:
        window = self._cluster.under(load, step_s, self._sizes.warm_up_s, self._sizes.window_s)
        if not window.num_tokens or not (window.num_requests or load.num_tokens == STREAM_TOKENS):
            raise ClusterError(f"nothing was answered in {window.seconds:.1f} s of {load}")
        return window


def added_ttft(concurrency: int, direct_s: list[float], routed_s: list[float]) -> dict[str, float]:
    """What the router adds to the median and to the 99th percentile, in milliseconds."""
    return {
        f"added_ttft_{name}_ms_c{concurrency}": 1e3
        * (percentile(routed_s, percent) - percentile(direct_s, percent))
        for name, percent in (("p50", 50), ("p99", 99))
    }


def medians(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each metric over the repeats."""
    values: dict[str, list[float]] = defaultdict(list)
    for metrics in found:
        for name, value in metrics.items():
            values[name].append(value)
    return {name: statistics.median(each) for name, each in values.items()}


def _placement(console: Console, sizes: Sizes) -> dict[str, float]:
    metrics: dict[str, float] = {}
    hash_s: list[float] = []
    for num_workers in WORKERS:
        with console.status(f"placement among {num_workers} workers …"):
            times = router_placement.measure(num_workers, sizes.num_prompts, sizes.num_blocks)
        metrics |= times.metrics(num_workers)
        hash_s += times.hash_s
    return metrics | {"hashing_us": 1e6 * statistics.median(hash_s)}
