"""Broken streams, routers that come back and routers that start anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from headrace.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.cluster_token import cluster_metadata
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import SECRET, StepGate, assert_nothing_held, random_prompt, session, worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

KEY = request_key("the request")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def node(model_dir: Path) -> Iterator[WorkerNode]:
    with worker(model_dir, WorkerRole.BOTH, resume_grace_s=1.0) as running:
        yield running


def _start(client: SessionClient, key: worker_pb2.RequestKey = KEY, **sampling: object) -> None:
    work = task(random_prompt(0, 40), **{"max_tokens": 12, **sampling})
    client.send(reserve=worker_pb2.Reserve(key=key, task=work, remaining_s=60.0, local_prefill=True))


def _expected(client: SessionClient) -> list[int]:
    [choice] = generate_locally(client, request_key("expected"), task(random_prompt(0, 40), max_tokens=12))
    return choice.token_ids


def _resume(client: SessionClient, *next_index: int, key: worker_pb2.RequestKey = KEY) -> None:
    client.send(resume=worker_pb2.ResumeStream(key=key, next_index=next_index))


def test_the_first_message_each_way_is_a_hello(node: WorkerNode) -> None:
    with session(node) as client:
        hello = client.hello()
        assert client.messages[0].HasField("hello")
    assert (hello.epoch, hello.worker_id, hello.role) == (node.epoch, "both-worker", worker_pb2.ROLE_BOTH)
    assert hello.kv_address == node.kv_address
    assert hello.state == worker_pb2.WORKER_STATE_SERVING
    assert hello.vocab_size == 277
    assert hello.invariant


@pytest.mark.parametrize("sent_before", [1, 5, 12])
def test_after_a_broken_stream_tokens_are_replayed_from_the_index_named(
    node: WorkerNode, sent_before: int
) -> None:
    gate = StepGate(node.engine)
    first = SessionClient(node.address, SECRET)
    _start(first)
    gate.allow(sent_before)
    first.wait(lambda: first.num_tokens(KEY) == sent_before, "some tokens")
    seen = first.so_far(KEY)[0].token_ids[: sent_before // 2]
    first.break_off()
    with session(node) as second:
        _resume(second, len(seen))
        gate.open()
        [rest] = second.answer(KEY)
        assert seen + rest.token_ids == _expected(second)
    assert_nothing_held(node)


def test_an_answer_that_ended_while_nobody_listened_is_replayed(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    first = SessionClient(node.address, SECRET)
    _start(first)
    first.wait(lambda: any(m.HasField("reserved") for m in first.messages), "a lease")
    first.break_off()
    gate.open()
    assert_nothing_held(node)
    with session(node) as second:
        _resume(second, 0)
        [answer] = second.answer(KEY)
        assert answer.token_ids == _expected(second)
        assert second.reserved(KEY).lease_id  # what was said before is said again
        second.acknowledge(KEY, 0, 12)
        _resume(second, 12)
        assert second.failed(KEY).cause == "UNKNOWN_REQUEST"  # acknowledged whole, so forgotten


def test_tokens_that_were_acknowledged_cannot_be_replayed(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    with session(node) as client:
        _start(client)
        gate.allow(6)
        client.wait(lambda: client.num_tokens(KEY) == 6, "six tokens")
        client.acknowledge(KEY, 0, 4)
        _resume(client, 2)
        assert client.failed(KEY).cause == "REPLAY_GONE"
        gate.open()
        assert_nothing_held(node)


def test_requests_that_are_not_resumed_within_the_grace_are_cancelled(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    kept, lost = request_key("kept"), request_key("lost")
    first = SessionClient(node.address, SECRET)
    for key in (kept, lost):
        _start(first, key)
    first.wait(lambda: first.reports()[-1:] and first.reports()[-1].leases == 2, "both")
    gate.allow(2)
    first.wait(lambda: all(first.num_tokens(key) >= 1 for key in (kept, lost)), "tokens of both")
    first.break_off()
    with session(node) as second:
        _resume(second, 0, key=kept)
        second.wait(lambda: second.reports()[-1:] and second.reports()[-1].leases == 1, "one lease")
        gate.open()
        assert len(second.answer(kept)[0].token_ids) == 12
        _resume(second, 0, key=lost)
        assert second.failed(lost).cause == "UNKNOWN_REQUEST"
    assert_nothing_held(node)


def test_a_router_that_never_comes_back_leaves_nothing(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    client = SessionClient(node.address, SECRET)
    _start(client, max_tokens=400)
    gate.allow(2)
    client.wait(lambda: client.num_tokens(KEY) == 2, "two tokens")
    client.break_off()
    assert_nothing_held(node)
    gate.open()


def test_a_new_incarnation_of_a_router_ends_what_the_old_one_began(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    with session(node, "router", epoch=1) as old, session(node, "bystander", epoch=1) as bystander:
        _start(old, max_tokens=400)
        other = request_key("of the bystander")
        _start(bystander, other)
        gate.allow(2)
        old.wait(lambda: old.num_tokens(KEY) >= 1, "a token")
        with session(node, "router", epoch=2) as new:
            new.hello()
            _resume(new, 0)
            assert new.failed(KEY).cause == "UNKNOWN_REQUEST"
            gate.open()
            assert len(bystander.answer(other)[0].token_ids) == 12
    assert_nothing_held(node)


def test_a_repeated_reserve_is_answered_as_the_first_was(node: WorkerNode) -> None:
    with session(node) as client:
        work = task(random_prompt(0, 40))
        for _ in range(2):
            client.send(reserve=worker_pb2.Reserve(key=KEY, task=work, remaining_s=60.0))
        client.wait(lambda: sum(m.HasField("reserved") for m in client.messages) == 2, "two answers")
        one, two = [m.reserved for m in client.messages if m.HasField("reserved")]
        assert one == two
        client.send(cancel=worker_pb2.CancelAttempt(key=KEY))
        assert_nothing_held(node)


def test_a_repeated_start_of_a_prefill_is_answered_as_the_first_was(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        work = task(random_prompt(0, 100))
        lease = hand_over(to_prefill, to_decode, KEY, work)
        finished = to_prefill.prefill_finished(KEY)
        again = worker_pb2.StartPrefill(key=KEY, task=work, remaining_s=60.0, lease=lease)
        to_prefill.send(start_prefill=again)
        to_prefill.wait(
            lambda: sum(m.HasField("prefill_finished") for m in to_prefill.messages) == 2, "a repeat"
        )
        assert to_prefill.prefill_finished(KEY) == finished
        to_decode.answer(KEY)
        assert_nothing_held(prefill, decode)


def test_two_choices_are_resumed_each_at_its_own_index(node: WorkerNode) -> None:
    gate = StepGate(node.engine)
    sampling = {"n": 2, "temperature": 1.0, "seed": 5}
    first = SessionClient(node.address, SECRET)
    _start(first, **sampling)
    gate.allow(4)
    first.wait(lambda: first.num_tokens(KEY) == 8, "four tokens of each")
    seen = [first.so_far(KEY)[choice].token_ids for choice in range(2)]
    first.break_off()
    with session(node) as second:
        _resume(second, 1, 3)
        gate.open()
        rest = [choice.token_ids for choice in second.answer(KEY, 2)]
        work = task(random_prompt(0, 40), max_tokens=12, **sampling)
        whole = [choice.token_ids for choice in generate_locally(second, request_key("whole"), work)]
    assert [seen[0][:1] + rest[0], seen[1][:3] + rest[1]] == whole
    assert_nothing_held(node)


def test_a_stream_without_a_hello_is_refused(node: WorkerNode) -> None:
    with grpc.insecure_channel(node.address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        first = worker_pb2.RouterMessage(cancel=worker_pb2.CancelAttempt(key=KEY))
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Session(iter([first]), metadata=cluster_metadata(SECRET), timeout=30))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_caller_without_the_clusters_secret_is_refused(node: WorkerNode) -> None:
    for metadata in ((), cluster_metadata(b"another cluster's secret")):
        with grpc.insecure_channel(node.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            hello = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id="r"))
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Session(iter([hello]), metadata=metadata, timeout=30))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
