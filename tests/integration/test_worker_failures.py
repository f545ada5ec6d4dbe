"""What a worker refuses, and what goes wrong in one request without touching the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.batch import StepBatch
from engine.engine import Engine
from headrace.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc, worker_pb2
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    SECRET,
    StepGate,
    assert_nothing_held,
    random_prompt,
    session,
    start_worker,
    worker,
)
from worker.config import WorkerRole
from worker.facts import ModelDirectoryError
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

KEY = request_key("the request")
OTHER = request_key("another request")
NAN_TOKEN = 7


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), nan_token_id=NAN_TOKEN)


@pytest.fixture
def node(model_dir: Path) -> Iterator[WorkerNode]:
    with worker(model_dir, WorkerRole.BOTH) as running:
        yield running


def _prompt(seed: int, num_tokens: int) -> list[int]:
    return [token for token in random_prompt(seed, num_tokens) if token != NAN_TOKEN]


def _reserve(
    client: SessionClient, work: worker_pb2.GenerationTask, key: worker_pb2.RequestKey = KEY
) -> None:
    client.send(reserve=worker_pb2.Reserve(key=key, task=work, remaining_s=60.0, local_prefill=True))


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (task([]), "no tokens"),
        (task([1], max_tokens=0), "max_tokens"),
        (task([1], max_tokens=-1), "max_tokens"),
        (task([1] * 512), "no room"),
        (task([100_000]), "outside the vocabulary"),
        (task([1], n=17), "sequences"),
    ],
)
def test_a_task_that_can_never_run_is_refused(
    node: WorkerNode, work: worker_pb2.GenerationTask, reason: str
) -> None:
    with session(node) as client:
        _reserve(client, work)
        error = client.failed(KEY)
        assert (error.stage, error.cause, error.retryable) == ("reserve", "INVALID_TASK", False)
        assert reason in error.message
        lease = worker_pb2.Reserved(lease_id=b"x" * 16, kv_address="127.0.0.1:9")
        start = worker_pb2.StartPrefill(key=OTHER, task=work, remaining_s=60.0, lease=lease)
        client.send(start_prefill=start)
        assert (client.failed(OTHER).stage, client.failed(OTHER).cause) == ("prefill", "INVALID_TASK")
    assert_nothing_held(node)


def test_a_request_without_room_is_refused_and_may_come_again(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    with session(node) as client:
        keys = [request_key(f"fills-{number}") for number in range(16)]
        for key in keys:
            _reserve(client, task(_prompt(0, 20)), key)
        _reserve(client, task(_prompt(1, 20)))
        error = client.failed(KEY)
        assert (error.stage, error.cause, error.retryable) == ("reserve", "NO_CAPACITY", True)
        gate.open()
        for key in keys:
            client.answer(key)
        [choice] = generate_locally(client, request_key("the request", attempt=2), task(_prompt(1, 20)))
        assert len(choice.token_ids) == 16
    assert_nothing_held(node)


def test_a_role_that_is_not_offered_is_refused(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        _reserve(to_prefill, task([1, 2, 3]))
        start = worker_pb2.StartPrefill(key=KEY, task=task([1, 2, 3]), remaining_s=60.0)
        to_decode.send(start_prefill=start)
        assert (to_prefill.failed(KEY).stage, to_prefill.failed(KEY).cause) == ("reserve", "WRONG_ROLE")
        assert (to_decode.failed(KEY).stage, to_decode.failed(KEY).cause) == ("prefill", "WRONG_ROLE")
        assert prefill.kv_address  # it serves fetches there, and takes no pushes


def test_more_prompts_than_a_prefill_worker_holds_are_refused(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL, prompt_window_tokens=150) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        gate = StepGate(prefill.engine)
        keys = [request_key(f"prompt-{number}") for number in range(3)]
        for key in keys:
            hand_over(to_prefill, to_decode, key, task(_prompt(0, 60)))
        error = to_prefill.failed(keys[2])
        assert (error.stage, error.cause, error.retryable) == ("prefill", "PREFILL_QUEUE_FULL", True)
        gate.open()
        for key in keys[:2]:
            assert len(to_decode.answer(key)[0].token_ids) == 16
        to_decode.send(cancel=worker_pb2.CancelAttempt(key=keys[2]))
        assert_nothing_held(prefill, decode)


# --- one sequence fails ------------------------------------------------------------------------


def test_nan_logits_in_a_local_prompt_end_that_request_only(node: WorkerNode) -> None:
    with session(node) as client:
        _reserve(client, task(_prompt(0, 100), max_tokens=30), OTHER)
        _reserve(client, task([*_prompt(1, 50), NAN_TOKEN, 1]))
        error = client.failed(KEY)
        assert (error.cause, error.stage, error.retryable) == ("NAN_LOGITS", "prefill", False)
        assert len(client.answer(OTHER)[0].token_ids) == 30
    assert_nothing_held(node)


def test_nan_logits_on_the_prefill_worker_end_the_request_on_both(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        hand_over(to_prefill, to_decode, OTHER, task(_prompt(0, 100), max_tokens=30))
        hand_over(to_prefill, to_decode, KEY, task([*_prompt(1, 100), NAN_TOKEN, 1]))
        assert (to_prefill.failed(KEY).stage, to_prefill.failed(KEY).cause) == ("prefill", "NAN_LOGITS")
        assert to_decode.failed(KEY).cause == "NAN_LOGITS"
        assert len(to_decode.answer(OTHER)[0].token_ids) == 30
        assert_nothing_held(prefill, decode)


def test_nan_logits_in_the_answer_end_that_request_only(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        hand_over(to_prefill, to_decode, OTHER, task(_prompt(0, 100), max_tokens=30))
        hand_over(to_prefill, to_decode, KEY, task(_prompt(1, 100), logit_bias={NAN_TOKEN: 100.0}))
        error = to_decode.failed(KEY)
        assert (error.stage, error.cause, error.retryable) == ("decode", "NAN_LOGITS", False)
        assert to_decode.num_tokens(KEY) <= 1
        assert to_prefill.num_failures(KEY) == 0
        assert len(to_decode.answer(OTHER)[0].token_ids) == 30
        assert_nothing_held(prefill, decode)


# --- the engine fails --------------------------------------------------------------------------


class BrokenForward:
    """Makes the next forwards of an engine raise."""

    def __init__(self, engine: Engine, num_failures: int) -> None:
        self._forward = engine.runner.forward
        self._left = num_failures
        engine.runner.forward = self._run  # type: ignore[method-assign, assignment]

    def _run(self, batch: StepBatch, after_layer: Callable[[int], None]) -> object:
        if self._left:
            self._left -= 1
            raise RuntimeError("the device fell off the bus")
        return self._forward(batch, after_layer)


def test_a_failed_step_ends_the_requests_in_it_and_the_worker_goes_on(node: WorkerNode) -> None:
    with session(node) as client:
        BrokenForward(node.engine, num_failures=1)
        _reserve(client, task(_prompt(0, 50)))
        error = client.failed(KEY)
        assert (error.cause, error.stage, error.retryable) == ("ENGINE_FAILED", "prefill", True)
        assert "RuntimeError" in error.message
        assert "bus" not in error.message
        [choice] = generate_locally(client, OTHER, task(_prompt(0, 50)))
        assert len(choice.token_ids) == 16
        assert node.healthy
    assert_nothing_held(node)


def test_a_worker_whose_steps_fail_again_and_again_says_so_and_takes_no_more(node: WorkerNode) -> None:
    with session(node) as client, grpc.insecure_channel(node.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert _health(health) == health_pb2.HealthCheckResponse.SERVING
        BrokenForward(node.engine, num_failures=1000)
        for number in range(3):
            key = request_key(f"victim-{number}")
            _reserve(client, task(_prompt(0, 50)), key)
            assert client.failed(key).cause == "ENGINE_FAILED"
        client.wait(lambda: client.reports()[-1].state == worker_pb2.WORKER_STATE_GONE, "the end")
        assert not node.healthy
        assert _health(health) == health_pb2.HealthCheckResponse.NOT_SERVING
        _reserve(client, task(_prompt(0, 50)))
        assert client.failed(KEY).cause == "NOT_SERVING"
    assert_nothing_held(node)


def _health(stub: health_pb2_grpc.HealthStub) -> int:
    return stub.Check(health_pb2.HealthCheckRequest(service="headrace.v1.Worker"), timeout=30).status


# --- workers that do not fit -------------------------------------------------------------------


def test_a_handoff_between_different_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other_weights = make_tiny_model(tmp_path / "other", seed=1)
    with (
        worker(other_weights, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        hand_over(to_prefill, to_decode, KEY, task(_prompt(0, 100)))
        error = to_prefill.failed(KEY)
        assert (error.stage, error.cause) == ("handoff", "IDENTITY_MISMATCH")
        assert to_decode.failed(KEY).cause == "IDENTITY_MISMATCH"
        assert_nothing_held(prefill, decode)


def test_a_handoff_between_different_layouts_is_refused(model_dir: Path, tmp_path: Path) -> None:
    more_layers = make_tiny_model(tmp_path / "deeper", num_layers=3)
    with (
        worker(more_layers, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        hand_over(to_prefill, to_decode, KEY, task(_prompt(0, 100)))
        assert to_prefill.failed(KEY).stage in ("transfer", "handoff")
        assert to_decode.failed(KEY).cause == to_prefill.failed(KEY).cause
        assert_nothing_held(prefill, decode)


def test_a_handoff_for_another_request_is_refused(node: WorkerNode) -> None:
    """A sender that holds the lease but names another request, as no prefill worker of ours does."""
    with session(node) as client, grpc.insecure_channel(node.kv_address) as channel:
        client.send(reserve=worker_pb2.Reserve(key=KEY, task=task(_prompt(0, 20)), remaining_s=60.0))
        lease = client.reserved(KEY)
        request = kvtransfer_pb2.CommitRequest(
            lease=kvtransfer_pb2.LeaseRef(
                lease_id=lease.lease_id, attempt=1, sender_epoch=5, receiver_epoch=lease.decode_epoch
            ),
            handoff=kvtransfer_pb2.Handoff(key=OTHER, num_tokens=0, handoff_major=1),
            remaining_s=30.0,
        )
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Commit(request, timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        request.handoff.layout = node.engine.layout.identity()
        response = stub.Commit(request, timeout=30, metadata=client.metadata)
        assert response.state == kvtransfer_pb2.LEASE_STATE_ABORTED
        assert client.failed(KEY).stage == "transfer"
    assert_nothing_held(node)


def test_a_decode_worker_that_dies_fails_the_transfer_with_a_cause(model_dir: Path) -> None:
    decode = start_worker(model_dir, WorkerRole.DECODE)
    with worker(model_dir, WorkerRole.PREFILL) as prefill, session(prefill) as to_prefill:
        gate = StepGate(prefill.engine)
        with session(decode) as to_decode:
            hand_over(to_prefill, to_decode, KEY, task(_prompt(0, 200)))
        decode.stop()
        gate.open()
        error = to_prefill.failed(KEY)
        assert (error.stage, error.cause, error.retryable) == ("transfer", "PEER_UNAVAILABLE", True)
        assert_nothing_held(prefill)


# --- starting ----------------------------------------------------------------------------------


def test_a_directory_without_a_manifest_is_refused_by_name(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    (model / "headrace.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"headrace\.json.*headrace model prepare"):
        start_worker(model, WorkerRole.BOTH)


@pytest.mark.parametrize("setting", ["port", "kv_port"])
def test_a_port_in_use_is_refused(node: WorkerNode, model_dir: Path, setting: str) -> None:
    address = node.address if setting == "port" else node.kv_address
    with pytest.raises(RuntimeError, match=address):
        start_worker(model_dir, WorkerRole.BOTH, **{setting: int(address.rpartition(":")[2])})


def test_a_worker_that_stops_ends_its_requests_with_a_cause(model_dir: Path) -> None:
    node = start_worker(model_dir, WorkerRole.BOTH)
    gate = StepGate(node.engine)
    client = SessionClient(node.address, SECRET)
    _reserve(client, task(_prompt(0, 20), max_tokens=200))
    gate.allow(2)
    client.wait(lambda: client.num_tokens(KEY) == 2, "two tokens")
    gate.open()
    node.stop()
    client.close()
    assert client.num_failures(KEY) == 1
    assert client.failed(KEY).cause == "WORKER_STOPPED"
