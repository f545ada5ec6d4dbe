"""Clusters that benchmarks bring up and take down: real Ray, real processes, the profiles that users have."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from cluster.launch import down, up
from cluster.profile import LoadedProfile, parse_profile
from cluster.stores import store_address
from headrace import Client
from kvtransfer.tiers.client import StoreClient
from kvtransfer.tiers.store_types import DISK

HANDED_OVER = ", policy: least-loaded"
"""What is measured is prompts that are handed over; by cost short ones would not be."""
_HEAD = """
version: 1
name: bench-{name}
model: {{path: smollm2-135m-instruct, precision: {precision}}}
router: {{grpc: "127.0.0.1:0"{router}}}
"""


@dataclass(frozen=True, slots=True)
class BenchCluster:
    """A cluster that is up."""

    name: str
    address: str
    cluster_secret: bytes

    def describe(self) -> str:
        """Where each process runs, from the workers' own reports."""
        with Client(self.address) as client:
            workers = client.status().workers
        places = [
            f"{worker.hello.worker_id} pid {worker.hello.pid} engine on cores {list(worker.hello.cpus)}"
            for worker in workers
        ]
        rest = "router, Ray and the workers' other threads off the decode core; this client anywhere"
        return f"{'; '.join(places)}; {rest}"

    def wait_written(self, num_blocks: int, timeout_s: float) -> None:
        """Until the disk tier holds so many blocks. Raises TimeoutError."""
        give_up_at = time.monotonic() + timeout_s
        store = StoreClient(store_address(self.cluster_secret), self.cluster_secret)
        while sum(tier.num_records for tier in store.stat().tiers if tier.tier == DISK) < num_blocks:
            if time.monotonic() >= give_up_at:
                raise TimeoutError(f"{num_blocks} blocks were not written to disk in {timeout_s:g} s")
            time.sleep(0.2)
        store.close()


def split(disk: str = "", precision: str = "auto") -> LoadedProfile:
    """1P1D, as deploy/profiles/laptop.yaml has it, but a token a step; with cache tiers where `disk` names a
    directory."""
    tiers = f"kvtransfer: {{tiers: {{host: 512MiB, disk: {{path: {disk}, size: 2GiB}}}}}}\n" if disk else ""
    sections = "prefill: {replicas: 1}\ndecode: {replicas: 1, max_drafts: 0}\n"
    return parse_profile(
        _HEAD.format(name="1p1d", precision=precision, router=HANDED_OVER) + sections + tiers, "bench"
    )


def colocated(chunk_tokens: int, itl: str = "") -> LoadedProfile:
    """One worker for both, on all cores; a token a step; chunks cut to `itl` where that is given."""
    section = f"colocated: {{replicas: 1, chunk: {chunk_tokens}, max_drafts: 0}}\n"
    router = f", slo: {{itl: {itl}}}" if itl else ""
    head = _HEAD.format(name=f"colocated-{chunk_tokens}", precision="auto", router=router)
    return parse_profile(head + section, "bench")


@contextmanager
def running(profile: LoadedProfile, console: Console) -> Iterator[BenchCluster]:
    """A cluster of the profile, taken down at the end whatever happens.

    Raises what cluster.launch.up raises, also where another cluster is up already.
    """
    name = profile.profile.name
    with console.status(f"{name}: starting …"):
        state = up(profile)
    try:
        with console.status(f"{name}: measuring …"):
            yield BenchCluster(name, state.router_address, bytes.fromhex(state.cluster_secret))
    finally:
        down()
