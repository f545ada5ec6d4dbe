"""`headrace bench router` in small: its processes come up, answers come whole, and what fails says why."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.router_cluster import DIRECT, ROUTED, BenchCluster, BenchProcess, running
from bench.router_load import Load
from bench.router_settings import ClientsSettings

pytestmark = pytest.mark.integration

WAIT_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[BenchCluster]:
    with running(dict(os.environ)) as cluster:
        yield cluster


def test_answers_come_through_the_router_and_without_it(cluster: BenchCluster) -> None:
    for target in (DIRECT, ROUTED):
        window = cluster.under(Load(target=target, num_tokens=4, concurrency=2), 0.0, 0.0, 0.5)
        assert window.num_requests > 0
        assert window.num_tokens >= 4 * (window.num_requests - 2)
        assert len(window.ttft_s) >= window.num_requests
    assert cluster.prefilled_elsewhere() > 0.5


def test_answers_come_past_the_router(cluster: BenchCluster) -> None:
    load = Load(target=ROUTED, num_tokens=40, concurrency=2, direct=True)
    assert cluster.workers.ask("streamed")["num_streams"] == 0
    window = cluster.under(load, 0.005, 0.0, 1.0)
    assert window.num_requests > 0
    assert cluster.workers.ask("streamed")["num_streams"] > 0


def test_paced_calls_come_whole(cluster: BenchCluster) -> None:
    window = cluster.under(Load(target=ROUTED, num_tokens=4, rate=20), 0.01, 0.0, 0.5)
    assert window.num_requests > 0


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    settings = ClientsSettings(targets={"nobody": "127.0.0.1:1"})
    clients = BenchProcess("clients", settings, tmp_path, dict(os.environ))
    try:
        clients.ask("begin", target="nobody", num_tokens=1, concurrency=1)
        give_up_at = time.monotonic() + WAIT_S
        while not (failure := clients.ask("look")["failure"]) and time.monotonic() < give_up_at:
            time.sleep(0.02)
        assert "UNAVAILABLE" in failure
    finally:
        clients.close()


def test_a_process_that_cannot_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the odd process failed at 'start'"):
        BenchProcess("odd", "no settings", tmp_path, dict(os.environ))
