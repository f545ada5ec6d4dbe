"""Whole workers in the test's process, over real gRPC, and ways to hold them still."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.services import services_of
from engine.engine import Engine
from engine.events import StepResult
from kvtransfer.load_speeds import LoadSpeeds
from tests import waiting
from tests.scripted_router import SessionClient
from worker.config import WorkerConfig, WorkerRole
from worker.fencing import running_s
from worker.node import WorkerNode

SECRET = b"a secret of the test's own cluster"
MAX_CONTEXT = 512
PATIENCE_S = 30.0


def start_worker(
    model_dir: Path,
    role: WorkerRole,
    *,
    running_clock: Callable[[], float] = running_s,
    **overrides: object,
) -> WorkerNode:
    """A worker of a tiny model with room for 128 blocks; `overrides` are WorkerConfig's."""
    settings: dict[str, object] = {
        "worker_id": f"{role}-worker",
        "max_context": MAX_CONTEXT,
        "chunk_tokens": 64,
        "max_sequences": 16,
        "kv_bytes": 4 << 20,
        **overrides,
    }
    config = WorkerConfig(role=role, model_dir=model_dir, cluster_secret=SECRET, **settings)
    node = WorkerNode(config, services_of(role), running_clock=running_clock)
    node.start()
    return node


@contextmanager
def worker(model_dir: Path, role: WorkerRole, **overrides: object) -> Iterator[WorkerNode]:
    """A running worker that is stopped afterwards, and must have held nothing while idle."""
    node = start_worker(model_dir, role, **overrides)
    try:
        yield node
        assert node.num_idle_violations == 0
    finally:
        node.stop()


@contextmanager
def prefill_decode_and_alone(model_dir: Path) -> Iterator[tuple[WorkerNode, WorkerNode, WorkerNode]]:
    """A prefill worker, a decode worker, and one that does both, for comparison."""
    with (
        worker(model_dir, WorkerRole.PREFILL, max_prompts=8, codec="raw") as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        worker(model_dir, WorkerRole.BOTH) as alone,
    ):
        yield prefill, decode, alone
        assert_nothing_held(prefill, decode, alone)


@contextmanager
def three_sessions(
    nodes: tuple[WorkerNode, WorkerNode, WorkerNode],
) -> Iterator[tuple[SessionClient, SessionClient, SessionClient]]:
    """A router's stream to each, after which they hold nothing."""
    first, second, third = nodes
    with session(first) as to_first, session(second) as to_second, session(third) as to_third:
        yield to_first, to_second, to_third
    assert_nothing_held(*nodes)


@contextmanager
def session(node: WorkerNode, router_id: str = "router", epoch: int = 1) -> Iterator[SessionClient]:
    """A router's stream to `node`."""
    client = SessionClient(node.address, SECRET, router_id, epoch)
    try:
        yield client
    finally:
        client.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Until `condition` holds; fails when it never does."""
    waiting.wait_until(condition, what, patience_s=PATIENCE_S)


def assert_nothing_held(*nodes: WorkerNode) -> None:
    """Each worker comes to 0 leases, 0 pins and 0 private blocks, and its pool is sound."""
    deadline = time.monotonic() + PATIENCE_S
    for node in nodes:
        while held := _held(node):
            assert time.monotonic() < deadline, f"{node.config.worker_id} still holds {held}"
            time.sleep(0.01)
        with node.engine.lock:
            node.engine.pool.check()


def _held(node: WorkerNode) -> dict[str, int]:
    report = node.report()
    counts = {
        "leases": report.leases,
        "pins": report.pins,
        "private blocks": report.private_blocks,
        "engine leases": node.engine.num_leases,
    }
    return {name: count for name, count in counts.items() if count}


def expect_loading_to_win(node: WorkerNode, *sources: str) -> None:
    """As if computing had been slow so far, and loading from these sources fast. A tiny model computes faster than
    anything is loaded, so that what was really measured would decide otherwise."""
    node.kv.speeds = LoadSpeeds(node.kv.clock)
    node.kv.speeds.note_prefill(1, 1e3)
    for source in sources:
        node.kv.speeds.note_load(source, 2 << 20, 1e-3)


def expect_computing_to_win(node: WorkerNode, *sources: str) -> None:
    """The other way round."""
    node.kv.speeds = LoadSpeeds(node.kv.clock)
    node.kv.speeds.note_prefill(1 << 30, 1e3)
    for source in sources:
        node.kv.speeds.note_load(source, 2 << 20, 1e3)


def random_prompt(seed: int, num_tokens: int) -> Sequence[int]:
    """Bytes as tokens: no control tokens."""
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(num_tokens)]


class StepGate:
    """Lets an engine step only as far as a test allows. Open it before the worker stops."""

    def __init__(self, engine: Engine) -> None:
        self._engine_step = engine.step
        self._permits = threading.Semaphore(0)
        self._opened = threading.Event()
        self._waiting = threading.Event()
        engine.step = self._step  # type: ignore[method-assign]

    def allow(self, num_steps: int) -> None:
        """So many steps more."""
        self._permits.release(num_steps)

    def open(self) -> None:
        """As many steps as there are."""
        self._opened.set()

    def wait_until_held(self) -> None:
        """Until the engine stands before a step that it may not take."""
        self._waiting.clear()
        assert self._waiting.wait(PATIENCE_S), "the engine never came to the gate"

    def _step(self) -> StepResult:
        while not self._permits.acquire(timeout=0.01):
            if self._opened.is_set():
                break
            self._waiting.set()
        return self._engine_step()


class _CacheGate:
    """Holds back one kind of access to a worker's cache."""

    def __init__(self, access: Callable[..., Any]) -> None:
        self._access = access
        self._opened = threading.Event()
        self.reached = threading.Event()

    def open(self) -> None:
        """Let everything pass."""
        self._opened.set()

    def _held(self, *arguments: object) -> Any:
        self.reached.set()
        assert self._opened.wait(PATIENCE_S)
        return self._access(*arguments)


class ScatterGate(_CacheGate):
    """Holds back KV that arrives at a worker, just before it is written."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.cache.scatter)
        engine.cache.scatter = self._held  # type: ignore[method-assign]


class GatherGate(_CacheGate):
    """Holds back KV that leaves a worker, just before it is read."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.cache.gather)
        engine.cache.gather = self._held  # type: ignore[method-assign]
