"""Does a long prompt stall somebody else's answer?

Four answers are written while nothing else happens (quiet), then while prompts of 2,048 tokens keep arriving,
one after the other (loaded). Measured where a user would: the time between two tokens at the client. The
same on 1P1D and on one colocated worker with all cores, at the chunk size that is best for it, and with chunks cut to
`router.slo.itl` (`colocated_slo_`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from rich.console import Console

from bench.clusters import BenchCluster, colocated, running, split
from bench.prompts import distinct_prompt
from bench.report import BenchReport, percentile
from headrace import AsyncClient

NUM_STREAMS = 4
STREAM_PROMPT_TOKENS = 128
LONG_PROMPT_TOKENS = 2048
QUIET_S = 10.0
LOADED_S = 40.0
WARM_TOKENS = 5
COLOCATED_CHUNKS = (128, 256, 512)
SLO_ITL = "150ms"
MAX_STREAM_TOKENS = 4000


@dataclass(slots=True)
class _Phase:
    """Token gaps seen in one phase, in seconds."""

    gaps_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)

    def itl_ms(self, percent: float) -> float:
        return percentile(self.gaps_s, percent) * 1e3


@dataclass(slots=True)
class _Recorder:
    """Where the streams put their gaps: the phase that is on."""

    phase: _Phase | None = None


def run(console: Console) -> BenchReport:
    """Bring up each cluster in turn and measure both phases on it."""
    metrics: dict[str, float] = {}
    notes: list[str] = []
    with running(split(), console) as cluster:
        quiet, loaded = asyncio.run(_measure(cluster, LOADED_S))
        metrics |= _metrics("", quiet, loaded)
        notes.append(f"1P1D: {cluster.describe()}")
    best: tuple[float, int, str, _Phase, _Phase] | None = None
    for chunk_tokens in COLOCATED_CHUNKS:
        with running(colocated(chunk_tokens), console) as cluster:
            quiet, loaded = asyncio.run(_measure(cluster, LOADED_S))
            found = (loaded.itl_ms(99), chunk_tokens, cluster.describe(), quiet, loaded)
            notes.append(
                f"colocated, chunk {chunk_tokens}: loaded p50 {loaded.itl_ms(50):.0f} ms, p99 {found[0]:.0f} ms, "
                f"TTFT p50 {percentile(loaded.ttfts_s, 50) * 1e3:.0f} ms"
            )
            best = found if best is None or found[0] < best[0] else best
    assert best is not None
    metrics |= _metrics("colocated_", best[3], best[4])
    metrics["colocated_chunk_tokens"] = float(best[1])
    metrics["loaded_p99_per_quiet_p50"] = metrics["itl_p99_loaded_ms"] / metrics["itl_p50_quiet_ms"]
    metrics["colocated_loaded_p99_per_quiet_p50"] = (
        metrics["colocated_itl_p99_loaded_ms"] / metrics["colocated_itl_p50_quiet_ms"]
    )
    notes.append(f"colocated: {best[2]}")
    with running(colocated(max(COLOCATED_CHUNKS), SLO_ITL), console) as cluster:
        quiet, loaded = asyncio.run(_measure(cluster, LOADED_S))
        metrics |= _metrics("colocated_slo_", quiet, loaded)
        notes.append(f"colocated_slo: chunks of at most {max(COLOCATED_CHUNKS)}, router.slo.itl {SLO_ITL}")
    return BenchReport("isolation", metrics, tuple(notes))


def _metrics(prefix: str, quiet: _Phase, loaded: _Phase) -> dict[str, float]:
    return {
        f"{prefix}itl_p50_quiet_ms": quiet.itl_ms(50),
        f"{prefix}itl_p99_quiet_ms": quiet.itl_ms(99),
        f"{prefix}itl_p50_loaded_ms": loaded.itl_ms(50),
        f"{prefix}itl_p99_loaded_ms": loaded.itl_ms(99),
        f"{prefix}ttft_p50_loaded_ms": percentile(loaded.ttfts_s, 50) * 1e3,
        f"{prefix}loaded_prompts": float(len(loaded.ttfts_s)),
    }


async def _measure(cluster: BenchCluster, loaded_s: float) -> tuple[_Phase, _Phase]:
    quiet, loaded, recorder = _Phase(), _Phase(), _Recorder()
    async with AsyncClient(cluster.address) as client:
        started = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [
            asyncio.create_task(_stream(client, seed, recorder, started[seed])) for seed in range(NUM_STREAMS)
        ]
        try:
            for event in started:
                await asyncio.wait_for(event.wait(), 120)
            recorder.phase = quiet
            await asyncio.sleep(QUIET_S)
            recorder.phase = loaded
            await _load(client, loaded, loaded_s)
            recorder.phase = None
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    return quiet, loaded


async def _stream(client: AsyncClient, seed: int, recorder: _Recorder, started: asyncio.Event) -> None:
    """One answer; every gap between two tokens goes to the phase that is on when it ends."""
    answer = client.generate(
        distinct_prompt(STREAM_PROMPT_TOKENS, seed),
        max_tokens=MAX_STREAM_TOKENS,
        temperature=0.0,
        ignore_eos=True,
        timeout_s=600,
    )
    num_seen, last = 0, time.monotonic()
    async with answer:
        async for delta in answer.deltas():
            now = time.monotonic()
            num_new = len(delta.token_ids)
            if num_seen > WARM_TOKENS and recorder.phase is not None and num_new:
                # Tokens that come together are one gap and the rest none: that is what a reader sees.
                recorder.phase.gaps_s.extend([now - last] + [0.0] * (num_new - 1))
            num_seen, last = num_seen + num_new, now
            if num_seen > WARM_TOKENS:
                started.set()


async def _load(client: AsyncClient, phase: _Phase, duration_s: float) -> None:
    """Long prompts, the next as soon as one has its first token, until the time is up."""
    end, seed = time.monotonic() + duration_s, 1000
    while time.monotonic() < end:
        seed += 1
        began = time.monotonic()
        answer = client.generate(
            distinct_prompt(LONG_PROMPT_TOKENS, seed),
            max_tokens=2,
            temperature=0.0,
            ignore_eos=True,
            timeout_s=300,
        )
        async with answer:
            first = True
            async for delta in answer.deltas():
                if first and delta.token_ids:
                    phase.ttfts_s.append(time.monotonic() - began)
                    first = False
