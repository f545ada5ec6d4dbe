"""Ray's GCS killed and started again: what runs goes on, and afterwards Ray restarts workers as before.

On the Ray that `headrace up` starts, and on a joined one whose GCS keeps its tables in Redis.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.gcs_keeper import is_alive
from headrace import AsyncClient, Client, HeadraceError, RetryPolicy
from tests.e2e.conftest import Home, wait_until
from tests.e2e.long_answers import ask, decode_workers, is_back
from tests.tiny_model import make_tiny_model

# Slow all of it, for the sake of `make test`: `make gcs-test` runs it.
pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

PROFILE = """
version: 1
name: gcs
model: {path: tiny}
prefill: {replicas: 1, kv_memory: 64MiB}
decode: {replicas: 2, kv_memory: 64MiB}
router: {grpc: "127.0.0.1:%d"}
"""
NUM_REQUESTS = 6
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Headrace cluster, its Ray's port, and the process that keeps the GCS."""

    router_address: str
    port: int
    keeper: psutil.Process

    def gcs(self) -> psutil.Process | None:
        """The GCS, where it lives."""
        for process in psutil.process_iter(["name", "cmdline"]):
            ours = f"--gcs_server_port={self.port}" in (process.info["cmdline"] or ())
            if process.info["name"] == "gcs_server" and ours and is_alive(process):
                return process
        return None

    @contextmanager
    def without_gcs(self) -> Iterator[None]:
        """Kill it, and let nobody start it again meanwhile."""
        gcs = self.gcs()
        assert gcs is not None
        self.keeper.suspend()
        try:
            gcs.kill()
            wait_until(lambda: self.gcs() is None, "the GCS's end")
            yield
            assert self.gcs() is None
        finally:
            self.keeper.resume()
        wait_until(self.gcs, "another GCS")


# --- two ways to a Ray whose GCS is kept --------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home with the tiny model in it; what is up in it at the end is taken down."""
    make_tiny_model(tmp_path / "models" / "tiny")
    home = Home(tmp_path)
    try:
        yield home
    finally:
        home.run("down")


@pytest.fixture(params=["ray of our own", "joined ray with redis"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "ray of our own":
        yield own(request.getfixturevalue("home"))
    else:
        yield request.getfixturevalue("on_redis").cluster


def own(home: Home) -> Cluster:
    started = home.up(PROFILE % 0)
    assert started.returncode == 0, started.stderr
    state = home.state()
    assert state.local_ray is not None
    port = int(state.ray_address.rpartition(":")[2])
    return Cluster(state.router_address, port, psutil.Process(state.local_ray.pid))


@dataclass(slots=True)
class OnRedis:
    """A Ray whose GCS keeps its tables in Redis, and the cluster that joined it."""

    home: Home
    temp_dir: str
    port: int
    start_command: list[str]
    cluster: Cluster = field(init=False)

    def start_head(self) -> None:
        subprocess.run(self.start_command, check=True, capture_output=True, timeout=120)

    def lose_head(self) -> None:
        """All of it at once, as when its machine goes down."""
        end_all_with(self.temp_dir)
        wait_until(lambda: not is_alive(self.cluster.keeper), "the end of what kept the GCS")


@pytest.fixture
def on_redis(home: Home, unused_tcp_port_factory: Any) -> Iterator[OnRedis]:
    redis = shutil.which("redis-server")
    if redis is None:
        pytest.skip("no redis-server is installed (Debian: apt-get install redis-server)")
    with ExitStack() as stack:
        yield joined(home, redis, unused_tcp_port_factory, stack)


def joined(home: Home, redis: str, free_port: Any, stack: ExitStack) -> OnRedis:
    redis_port, port, router_port = (free_port() for _ in range(3))
    command = [redis, "--port", str(redis_port), "--bind", LOOPBACK, "--save", "", "--dir", str(home.path)]
    stack.enter_context(process(command, home.path / "redis.log"))
    temp_dir = tempfile.mkdtemp(prefix="gcs-", dir="/tmp")  # Ray's sockets' paths must be short
    stack.callback(shutil.rmtree, temp_dir, ignore_errors=True)
    set_environment(home, f"{LOOPBACK}:{redis_port}", Path(temp_dir, "token"), stack)
    stack.callback(end_all_with, temp_dir)
    ray_start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=8"),
        *(f"--node-ip-address={LOOPBACK}", f"--temp-dir={temp_dir}", "--include-dashboard=false"),
        *("--no-monitor", "--include-log-monitor=false", "--disable-usage-stats"),
        *("--object-store-memory=100000000", f"--ray-client-server-port={free_port()}"),
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    on_redis = OnRedis(home, temp_dir, port, ray_start)
    on_redis.start_head()
    keeping = [sys.executable, "-m", "cluster.gcs_keeper", str(port)]
    keeper = stack.enter_context(process(keeping, home.path / "keeper.log"))
    profile = home.path / "profile.yaml"
    profile.write_text(PROFILE % router_port, encoding="utf-8")
    stack.callback(home.run, "down")
    started = home.run("up", str(profile), "--address", f"{LOOPBACK}:{port}")
    assert started.returncode == 0, started.stderr
    on_redis.cluster = Cluster(home.state().router_address, port, psutil.Process(keeper.pid))
    return on_redis


def set_environment(home: Home, redis_address: str, token: Path, stack: ExitStack) -> None:
    token.write_text("0" * 64, encoding="utf-8")
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    for name, value in {
        "RAY_REDIS_ADDRESS": redis_address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: stay at the loopback address
        "HEADRACE_HOME": str(home.path),
    }.items():
        patch.setenv(name, value)


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as started:
        try:
            yield started
        finally:
            started.kill()


def end_all_with(temp_dir: str) -> None:
    """Ends a Ray by the directory that its processes name; its actors end with its raylet."""
    for each in psutil.process_iter(["cmdline"]):
        if any(temp_dir in argument for argument in each.info["cmdline"] or ()):
            each.kill()


# --- what runs goes on ---------------------------------------------------------------------------------------


def test_answers_go_on_without_the_gcs_and_a_new_one_restarts_workers(cluster: Cluster) -> None:
    undisturbed = asyncio.run(answers(cluster))
    with Client(cluster.router_address) as client:
        before = decode_workers(client.status())
        assert asyncio.run(answers(cluster, without_gcs=True)) == undisturbed
        assert {name: worker.hello.epoch for name, worker in decode_workers(client.status()).items()} == {
            name: worker.hello.epoch for name, worker in before.items()
        }
        victim = before["decode-1"].hello
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: is_back(client, victim.epoch), "the killed worker's return")
        assert asyncio.run(answers(cluster)) == undisturbed
        assert client.status().failed_requests == 0


def test_a_head_that_was_lost_and_starts_again_on_its_redis_gets_its_actors_again(on_redis: OnRedis) -> None:
    cluster = on_redis.cluster
    undisturbed = asyncio.run(answers(cluster))
    with Client(cluster.router_address) as client:
        before = {name: worker.hello.epoch for name, worker in decode_workers(client.status()).items()}
        on_redis.lose_head()
        on_redis.start_head()

        def are_back() -> bool:
            with suppress(HeadraceError):
                now = {name: worker.hello.epoch for name, worker in decode_workers(client.status()).items()}
                return now.keys() == before.keys() and not set(now.values()) & set(before.values())
            return False

        wait_until(are_back, "the return of the router and of every worker")
    assert asyncio.run(answers(cluster)) == undisturbed


async def answers(cluster: Cluster, *, without_gcs: bool = False) -> list[list[int]]:
    """All answers at once, and one that begins later; `without_gcs`: it is killed once each of them has begun, and
    stays away until all have ended.
    """
    begun = asyncio.Semaphore(0)
    async with AsyncClient(cluster.router_address, retry=RetryPolicy(max_attempts=1)) as client:
        tasks = [asyncio.create_task(ask(client, number, begun)) for number in range(NUM_REQUESTS)]
        for _ in tasks:
            await asyncio.wait_for(begun.acquire(), 60)
        with ExitStack() as stack:
            if without_gcs:
                stack.enter_context(cluster.without_gcs())
            tasks.append(asyncio.create_task(ask(client, NUM_REQUESTS, begun)))
            return [answer.token_ids for answer in await asyncio.gather(*tasks)]
