"""A worker that leaves: what it finishes, what it hands back, whom it serves meanwhile, and how its process ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1 import worker_pb2
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import HOST, StoreOptions
from tests.integration.test_worker_membership import Registry, serving
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    PATIENCE_S,
    SECRET,
    GatherGate,
    StepGate,
    assert_nothing_held,
    expect_loading_to_win,
    random_prompt,
    session,
    wait_until,
    worker,
)
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

SERVING = worker_pb2.WORKER_STATE_SERVING
NO_NEW = worker_pb2.WORKER_STATE_NO_NEW
KV_ONLY = worker_pb2.WORKER_STATE_KV_ONLY
GONE = worker_pb2.WORKER_STATE_GONE

BLOCK = 64
MIB = 1 << 20
KEY = request_key("the request")
LATER = request_key("a later request")
WORK = task(random_prompt(0, 40), max_tokens=60)
ROOT = Path(__file__).parents[2]
TERMINATED_WORKER = """
import sys
from pathlib import Path
from tests.worker_nodes import start_worker
from worker.config import WorkerRole
from worker.termination import drain_on_sigterm
node = start_worker(Path(sys.argv[1]), WorkerRole.BOTH)
drain_on_sigterm(node, float(sys.argv[2]))
print(node.address, flush=True)
node.wait_until_gone()
node.stop()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def node(model_dir: Path) -> Iterator[WorkerNode]:
    with worker(model_dir, WorkerRole.BOTH) as node:
        yield node


def _ask(client: SessionClient, state: worker_pb2.WorkerState) -> None:
    client.send(set_state=worker_pb2.SetState(state=state))


def _until(client: SessionClient, state: worker_pb2.WorkerState) -> None:
    def is_there() -> bool:
        reports = client.reports()
        return bool(reports) and reports[-1].state == state

    client.wait(is_there, worker_pb2.WorkerState.Name(state))


def _reserve(client: SessionClient, key: worker_pb2.RequestKey = KEY) -> None:
    client.send(reserve=worker_pb2.Reserve(key=key, task=WORK, remaining_s=60.0, local_prefill=True))


def _is_healthy(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Worker")
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answer_begun(client: SessionClient, gate: StepGate) -> None:
    """A running answer, some tokens long, of an engine that stands still."""
    _reserve(client)
    gate.allow(4)
    client.wait(lambda: client.num_tokens(KEY) > 0, "the answer's first tokens")


# --- finishing ---------------------------------------------------------------------------------


def test_what_runs_is_finished_what_comes_is_refused_and_then_only_the_cache_is_served(
    node: WorkerNode,
) -> None:
    with session(node) as client:
        expected = generate_locally(client, request_key("before"), WORK)[0].token_ids
        gate = StepGate(node.engine)
        _answer_begun(client, gate)
        _ask(client, NO_NEW)
        _until(client, NO_NEW)
        wait_until(lambda: not _is_healthy(node.address), "health checks to be told")
        _reserve(client, LATER)
        refusal = client.failed(LATER)
        assert (refusal.cause, refusal.retryable) == ("NOT_SERVING", True)
        gate.open()
        [answer] = client.answer(KEY)
        assert answer.token_ids == expected
        _until(client, KV_ONLY)
        assert not node.wait_until_gone(0)
    assert_nothing_held(node)


def test_a_drain_can_be_undone(node: WorkerNode) -> None:
    with session(node) as client:
        for state in (NO_NEW, KV_ONLY):
            _ask(client, state)
            _until(client, KV_ONLY)
            _ask(client, SERVING)
            _until(client, SERVING)
        [answer] = generate_locally(client, KEY, WORK)
        assert len(answer.token_ids) == 60
        wait_until(lambda: _is_healthy(node.address), "health checks to be told")


def test_a_prompt_being_handed_over_is_finished_too(model_dir: Path, node: WorkerNode) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        session(prefill) as sender,
        session(node) as receiver,
    ):
        gate = GatherGate(prefill.engine)
        work = task(random_prompt(3, 2 * BLOCK + 5), max_tokens=4)
        hand_over(sender, receiver, KEY, work)
        assert gate.reached.wait(PATIENCE_S)
        for client in (sender, receiver):
            _ask(client, NO_NEW)
            _until(client, NO_NEW)
        gate.open()
        assert len(receiver.answer(KEY)[0].token_ids) == 4
        for client in (sender, receiver):
            _until(client, KV_ONLY)
        assert_nothing_held(prefill, node)


def test_a_nonsensical_state_changes_nothing(node: WorkerNode) -> None:
    with session(node) as client:
        _ask(client, worker_pb2.WORKER_STATE_UNSPECIFIED)
        [answer] = generate_locally(client, KEY, WORK)
        assert len(answer.token_ids) == 60


# --- handing back ------------------------------------------------------------------------------


def test_an_answer_is_handed_back_and_what_it_computed_stays(node: WorkerNode) -> None:
    with session(node) as client:
        gate = StepGate(node.engine)
        _answer_begun(client, gate)
        _ask(client, KV_ONLY)
        failed = client.failed(KEY)
        assert (failed.stage, failed.cause, failed.retryable) == ("decode", "DRAINED", True)
        gate.open()
        _until(client, KV_ONLY)
        assert client.num_failures(KEY) == 1
    assert_nothing_held(node)


def test_a_prompt_is_handed_back_and_so_is_the_lease_it_was_pushed_into(
    model_dir: Path, node: WorkerNode
) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        session(prefill) as sender,
        session(node) as receiver,
    ):
        gate = StepGate(prefill.engine)
        hand_over(sender, receiver, KEY, task(random_prompt(4, 2 * BLOCK + 5)))
        gate.wait_until_held()
        _ask(sender, KV_ONLY)
        failed = sender.failed(KEY)
        assert (failed.stage, failed.cause, failed.retryable) == ("prefill", "DRAINED", True)
        gate.open()
        _until(sender, KV_ONLY)
        assert receiver.failed(KEY).retryable
        assert_nothing_held(prefill, node)


# --- serving the cache -------------------------------------------------------------------------


def test_others_fetch_what_a_drained_worker_has(model_dir: Path, node: WorkerNode) -> None:
    prompt = random_prompt(1, 5 * BLOCK + 20)
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as sender,
        session(decode) as receiver,
        session(node) as client,
    ):
        expected = generate_locally(client, request_key("before"), task(prompt))[0].token_ids
        _ask(client, KV_ONLY)
        _until(client, KV_ONLY)
        expect_loading_to_win(prefill, node.kv_address)
        source = worker_pb2.CacheSource(kv_address=node.kv_address, epoch=node.epoch, cached_tokens=5 * BLOCK)
        hand_over(sender, receiver, KEY, task(prompt), sources=[source])
        assert receiver.answer(KEY)[0].token_ids == expected
        finished = sender.prefill_finished(KEY)
        assert (finished.fetched_tokens, finished.fetched_from) == (5 * BLOCK, node.kv_address)


@contextmanager
def _store() -> Iterator[StoreServer]:
    store = StoreServer(StoreConfig(cluster_secret=SECRET, options=StoreOptions(host_bytes=64 * MIB)))
    store.start()
    try:
        assert store.wait_ready(PATIENCE_S)
        yield store
    finally:
        store.close()


def test_a_worker_that_goes_has_written_its_blocks_to_the_store(model_dir: Path) -> None:
    with _store() as store, worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        with session(node) as client:
            for number in range(6):
                work = task(random_prompt(number, 3 * BLOCK + 5), max_tokens=2)
                generate_locally(client, request_key(f"request {number}"), work)
            _ask(client, GONE)
            assert node.wait_until_gone(PATIENCE_S)
        assert next(tier.num_records for tier in store.stats().tiers if tier.tier == HOST) == 18


# --- going -------------------------------------------------------------------------------------


def test_one_that_is_gone_says_so_ends_its_sessions_and_announces_itself_no_more(model_dir: Path) -> None:
    registry = Registry(epoch=1)
    with (
        serving(registry) as port,
        worker(model_dir, WorkerRole.BOTH, routers=(f"127.0.0.1:{port}",)) as node,
    ):
        registry.wait_for(1)
        client = registry.client
        assert client is not None
        generate_locally(client, KEY, WORK)
        _ask(client, GONE)
        assert node.wait_until_gone(PATIENCE_S)
        wait_until(lambda: client.ended is not None, "the session's end")
        assert (client.ended, client.reports()[-1].state) == (grpc.StatusCode.OK, GONE)
        assert node.is_retired
        num_registrations = len(registry.registered)
        with session(node) as late:
            wait_until(lambda: late.ended is not None, "the refusal")
            assert late.ended == grpc.StatusCode.UNAVAILABLE
        assert len(registry.registered) == num_registrations
    assert_nothing_held(node)


def test_a_process_that_is_to_end_hands_back_what_runs_when_its_grace_is_over(node: WorkerNode) -> None:
    with session(node) as client:
        gate = StepGate(node.engine)
        _answer_begun(client, gate)
        node.terminate(0.0)
        failed = client.failed(KEY)
        assert (failed.cause, failed.retryable) == ("DRAINED", True)
        gate.open()
        _ask(client, SERVING)
        assert node.wait_until_gone(PATIENCE_S)
        assert not node.is_retired
    assert_nothing_held(node)


# --- SIGTERM -----------------------------------------------------------------------------------


@contextmanager
def _process(model_dir: Path, grace_s: float) -> Iterator[tuple[subprocess.Popen[str], SessionClient]]:
    command = [sys.executable, "-c", TERMINATED_WORKER, str(model_dir), str(grace_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            client = SessionClient(process.stdout.readline().strip(), SECRET)
            yield process, client
            client.close()
        finally:
            process.kill()


def test_a_process_finishes_its_answers_when_it_is_terminated(model_dir: Path) -> None:
    with _process(model_dir, grace_s=PATIENCE_S) as (process, client):
        work = task(random_prompt(0, 10), max_tokens=480, ignore_eos=True)
        client.send(reserve=worker_pb2.Reserve(key=KEY, task=work, remaining_s=60.0, local_prefill=True))
        client.wait(lambda: client.num_tokens(KEY) > 0, "the answer's first tokens")
        process.send_signal(signal.SIGTERM)
        assert len(client.answer(KEY)[0].token_ids) == 480
        assert process.wait(PATIENCE_S) == 0
