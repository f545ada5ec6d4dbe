"""A worker that was cut off or frozen for too long gives up what it held and rejoins as a new incarnation."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from headrace.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc, worker_pb2
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.frames import FrameHeader, LeaseRef, decode_ack, encode_frame
from kvtransfer.layouts import Piece
from kvtransfer.lease_types import Refusal
from tests.integration.test_worker_membership import Registry, serving
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    PATIENCE_S,
    SECRET,
    StepGate,
    assert_nothing_held,
    random_prompt,
    session,
    worker,
)
from worker.config import WorkerRole
from worker.fencing import running_s

pytestmark = pytest.mark.integration

KEY = request_key("the request")
OTHER = request_key("another request")
WORK = task(random_prompt(0, 40), max_tokens=12)
QUICK = {"dead_after_s": 1.5, "resume_grace_s": 0.3}
ROOT = Path(__file__).parents[2]
FROZEN_WORKER = """
import sys
from pathlib import Path
from tests.worker_nodes import start_worker
from worker.config import WorkerRole
node = start_worker(Path(sys.argv[1]), WorkerRole.BOTH, dead_after_s=1.5, resume_grace_s=0.3, lease_ttl_s=60.0)
print(node.address, node.kv_address, flush=True)
sys.stdin.read()
node.stop()
"""


class TurnedClock:
    """The clock of a node's fence watch; turned ahead, the node has stood still as far as it can tell."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return running_s() + self.ahead_s


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def _reserve(client: SessionClient, key: worker_pb2.RequestKey, *, local: bool) -> None:
    client.send(reserve=worker_pb2.Reserve(key=key, task=WORK, remaining_s=60.0, local_prefill=local))


def _old_frame(lease: worker_pb2.Reserved) -> bytes:
    """A frame for a lease that was reserved here; what is in it does not matter, its epoch is looked at first."""
    ref = LeaseRef(lease.lease_id, 1, 99, lease.decode_epoch)
    piece = Piece("k", range(2), range(2), range(1))
    raw = bytes(2 * 2 * 16 * 4)
    message, _ = encode_frame(FrameHeader(ref, 0, piece, "raw", 1, len(raw), ("float32",)), raw)
    return message


def _assert_refused_as_stale(kv_address: str, lease: worker_pb2.Reserved) -> None:
    """Neither a frame nor a commit of the old incarnation's lease has any effect."""
    with grpc.insecure_channel(kv_address) as channel:
        metadata = cluster_metadata(SECRET)
        push = channel.stream_stream("/headrace.v1.KvBulk/Push")
        _, answer = push(iter([_old_frame(lease)]), metadata=metadata, timeout=PATIENCE_S)
        ack = decode_ack(answer)
        assert not ack.ok
        assert ack.cause == Refusal.STALE_EPOCH
        stub = kvtransfer_pb2_grpc.KvTransferStub(channel)
        ref = kvtransfer_pb2.LeaseRef(
            lease_id=lease.lease_id, attempt=1, sender_epoch=99, receiver_epoch=lease.decode_epoch
        )
        commit = kvtransfer_pb2.CommitRequest(lease=ref, remaining_s=5.0)
        response = stub.Commit(commit, metadata=metadata, timeout=PATIENCE_S)
        assert response.state == kvtransfer_pb2.LEASE_STATE_UNSPECIFIED
        assert response.reason.startswith("STALE_EPOCH")


def _assert_serves(client: SessionClient) -> None:
    [choice] = generate_locally(client, request_key("afterwards"), WORK)
    assert len(choice.token_ids) == 12


def test_a_worker_whose_router_is_away_for_too_long_rejoins_as_another_incarnation(model_dir: Path) -> None:
    with serving(Registry(epoch=0)) as port:
        pass  # a port that nobody listens on now
    with worker(model_dir, WorkerRole.BOTH, routers=(f"127.0.0.1:{port}",), **QUICK) as node:
        registry = Registry(epoch=1)
        with serving(registry, port):
            registry.wait_for(1)
            assert registry.client is not None
            _reserve(registry.client, KEY, local=False)
            lease = registry.client.reserved(KEY)
            old_epoch = node.epoch
            assert lease.decode_epoch == old_epoch
        _wait(lambda: node.epoch != old_epoch, "the worker to fence itself")
        assert_nothing_held(node)
        _assert_refused_as_stale(node.kv_address, lease)
        registry = Registry(epoch=1)
        with serving(registry, port):
            registry.wait_for(1)
            assert registry.client is not None
            assert registry.client.hello().epoch == node.epoch == registry.registered[-1].epoch
            _assert_serves(registry.client)


def test_what_a_frozen_worker_held_fails_as_fenced_and_its_sessions_end(model_dir: Path) -> None:
    clock = TurnedClock()
    with worker(model_dir, WorkerRole.BOTH, running_clock=clock) as node:
        old_epoch = node.epoch
        gate = StepGate(node.engine)
        with session(node) as client:
            _reserve(client, KEY, local=False)  # waits for its prompt
            lease = client.reserved(KEY)
            _reserve(client, OTHER, local=True)  # is computing
            gate.wait_until_held()
            clock.ahead_s = 31.0
            for key in (KEY, OTHER):
                error = client.failed(key)
                assert (error.cause, error.retryable) == ("FENCED", True)
            _wait(lambda: client.ended is not None, "the session to end")
        gate.open()
        assert node.epoch != old_epoch
        assert_nothing_held(node)
        _assert_refused_as_stale(node.kv_address, lease)
        with session(node) as client:
            assert client.hello().epoch == node.epoch
            _assert_serves(client)
        assert_nothing_held(node)


def test_a_prefill_worker_that_fences_itself_ends_its_pushes_over_there_too(model_dir: Path) -> None:
    clock = TurnedClock()
    with worker(model_dir, WorkerRole.PREFILL, running_clock=clock) as prefill:
        with (
            worker(model_dir, WorkerRole.DECODE) as decode,
            session(prefill) as to_prefill,
            session(decode) as to_decode,
        ):
            gate = StepGate(prefill.engine)
            hand_over(to_prefill, to_decode, KEY, WORK)
            gate.wait_until_held()
            clock.ahead_s = 31.0
            assert to_prefill.failed(KEY).cause == "FENCED"
            assert to_decode.failed(KEY).cause == "FENCED"  # the aborted push tells why
            gate.open()
            assert_nothing_held(prefill, decode)
            with session(prefill) as again:
                assert again.hello().epoch == prefill.epoch
                key = request_key("the request", attempt=2)
                hand_over(again, to_decode, key, WORK)
                assert len(to_decode.answer(key)[0].token_ids) == 12
        assert_nothing_held(prefill)


@contextmanager
def _worker_process(model_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN_WORKER, str(model_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        address, kv_address = process.stdout.readline().split()
        yield process, address, kv_address
    finally:
        process.send_signal(signal.SIGCONT)
        try:
            process.communicate("", timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def test_a_stopped_process_that_wakes_is_another_incarnation(model_dir: Path) -> None:
    with _worker_process(model_dir) as (process, address, kv_address):
        client = SessionClient(address, SECRET)
        old_epoch = client.hello().epoch
        _reserve(client, KEY, local=False)
        lease = client.reserved(KEY)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)  # longer than its dead_after_s, shorter than its lease's TTL
        process.send_signal(signal.SIGCONT)
        assert client.failed(KEY).cause == "FENCED"
        _wait(lambda: client.ended is not None, "the session to end")
        client.close()
        _assert_refused_as_stale(kv_address, lease)
        again = SessionClient(address, SECRET)
        assert again.hello().epoch != old_epoch
        _assert_serves(again)
        again.close()
