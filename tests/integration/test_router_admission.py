"""Who may call, with what: bad input, authentication, readiness, membership, and what is told of errors."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from headrace.v1 import cluster_pb2, worker_pb2
from headrace.v1 import inference_pb2 as pb
from kvtransfer.cluster_token import cluster_token
from router.auth import CLUSTER_TOKEN_KEY
from tests.integration.router_harness import STOP, Harness, error_detail, running_router
from tests.integration.scripted_worker import IDENTITY, SECRET, ScriptedWorker

pytestmark = pytest.mark.integration

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with running_router() as harness:
        yield harness


async def serves_another(router: Harness, worker: ScriptedWorker) -> None:
    """Shows that a refused call left nothing behind."""
    status = await router.cluster.Status(cluster_pb2.StatusRequest())
    assert (status.queued_requests, status.running_requests) == (0, 0)
    stream = router.generate(request_id="good")
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    worker.say(reserve.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}
    assert "cancel" not in worker.pending()


@pytest.mark.parametrize(
    ("fields", "code", "cause"),
    [
        ({"text": ""}, INVALID, "EMPTY_PROMPT"),
        ({"text": None, "token_ids": pb.TokenIds()}, INVALID, "EMPTY_PROMPT"),
        ({"text": None}, INVALID, "EMPTY_PROMPT"),
        ({"text": "x" * 256}, INVALID, "PROMPT_TOO_LONG"),
        ({"text": "x" * (10 << 20)}, INVALID, "PROMPT_TOO_LONG"),
        ({"text": None, "token_ids": pb.TokenIds(ids=[300])}, INVALID, "BAD_TOKEN_ID"),
        ({"text": None, "token_ids": pb.TokenIds(ids=[1] * 256)}, INVALID, "PROMPT_TOO_LONG"),
        ({"text": "a NUL \0"}, INVALID, "PROMPT_NOT_ENCODABLE"),
        ({"model": "gpt-17"}, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
        ({"request_id": "x" * 129}, INVALID, "REQUEST_ID_TOO_LONG"),
        ({"request_id": "é" * 1_000_000}, INVALID, "REQUEST_ID_TOO_LONG"),
        ({"request_id": "a\nb"}, INVALID, "BAD_REQUEST_ID"),
        ({"timeout_s": math.nan}, INVALID, "BAD_TIMEOUT"),
        ({"timeout_s": -1}, INVALID, "BAD_TIMEOUT"),
        ({"sampling": pb.SamplingParams(max_tokens=0)}, INVALID, "BAD_SAMPLING"),
        ({"sampling": pb.SamplingParams(max_tokens=-5)}, INVALID, "BAD_SAMPLING"),
        ({"sampling": pb.SamplingParams(temperature=math.nan)}, INVALID, "BAD_SAMPLING"),
        ({"sampling": pb.SamplingParams(top_p=math.inf)}, INVALID, "BAD_SAMPLING"),
        ({"sampling": pb.SamplingParams(n=17)}, INVALID, "BAD_SAMPLING"),
        ({"sampling": pb.SamplingParams(stop=["x"] * 5000)}, INVALID, "TOO_MANY_STOPS"),
        ({"sampling": pb.SamplingParams(stop=[""])}, INVALID, "BAD_STOP"),
        ({"sampling": pb.SamplingParams(min_tokens=256)}, INVALID, "BAD_MIN_TOKENS"),
        ({"sampling": pb.SamplingParams(n=9)}, INVALID, "TOO_LARGE"),
        ({"resume_handle": b"made up"}, INVALID, "BAD_RESUME_HANDLE"),
    ],
)
async def test_bad_input_is_refused_with_a_cause_and_leaves_nothing(router: Harness, fields, code, cause):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    answer = await router.generate(**fields).end()
    assert (answer.code, answer.error.cause) == (code, cause)
    assert answer.error.message and not answer.error.retryable
    assert answer.error.request_id == fields.get("request_id", answer.error.request_id)[:128]
    assert answer.accepted is None and worker.pending() == []
    await serves_another(router, worker)


async def test_a_refused_id_may_come_again_with_another_body(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    assert (await router.generate("x" * 256, request_id="good").end()).code == INVALID
    await serves_another(router, worker)


@pytest.mark.parametrize("messages", [[], [("root", "hi")], [("user", "x" * 256)], [("user", "\0")]])
async def test_bad_conversations_are_refused(router: Harness, messages):
    assert (await router.chat(*messages).end()).code == INVALID


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["not UTF-8", "damaged"])
@pytest.mark.parametrize("method", ["Generate", "Chat", "Cancel", "Tokenize"])
async def test_messages_that_cannot_be_parsed_are_refused_in_words(router: Harness, data, method):
    make = router.channel.unary_stream if method in ("Generate", "Chat") else router.channel.unary_unary
    call = make(
        f"/headrace.v1.Inference/{method}",
        request_serializer=lambda raw: raw,
        response_deserializer=lambda raw: raw,
    )(data)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if make == router.channel.unary_stream else call)
    assert caught.value.code() == INVALID
    assert error_detail(caught.value).cause == "UNPARSABLE"


async def test_a_defect_is_told_by_its_reference_and_nothing_of_the_prompt_is_logged(
    router: Harness, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    answer = await router.generate("my secret \a", request_id="one").end()
    assert (answer.code, answer.error.cause) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    reference = answer.error.message.split()[-1]
    assert "Traceback" not in answer.error.message and "secret" not in answer.error.message
    assert any(reference in record.getMessage() for record in caplog.records)
    await serves_another(router, worker)
    assert "my secret" not in caplog.text and "hello" not in caplog.text


async def test_a_defect_in_a_unary_call_is_told_the_same_way(router: Harness):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.inference.Tokenize(pb.TokenizeRequest(text="my secret \a"))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value) and error_detail(caught.value).cause == "INTERNAL"


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_get_and_cancel_want_an_id(router: Harness, request_id):
    for call in (router.get, router.cancel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request_id)
        assert caught.value.code() == INVALID


async def test_cancelling_what_is_unknown_is_no_error(router: Harness):
    assert not await router.cancel("nobody")


# --- load ------------------------------------------------------------------------------------------------


async def test_absent_workers_are_unavailable_not_exhausted(router: Harness):
    answer = await router.generate().end()
    assert (answer.code, answer.error.cause) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKERS")
    assert answer.error.retryable and answer.error.retry_after_s > 0
    await router.worker("p", worker_pb2.ROLE_PREFILL)
    assert (await router.generate().end()).code == grpc.StatusCode.UNAVAILABLE


async def test_a_full_queue_is_exhausted_and_says_when_to_come_back():
    async with running_router(queue_tokens=10) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH, max_sequences=1)
        running = router.generate("x", request_id="running")
        reserve = await worker.expect("reserve")
        waiting = router.generate("x" * 8, request_id="waiting")
        await waiting.until("accepted")
        answer = await router.generate("x" * 3, request_id="late").end()
        assert (answer.code, answer.error.cause) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (answer.error.stage, answer.error.retryable) == ("queue", True)
        assert answer.error.retry_after_s > 0
        small = router.generate("x" * 2, request_id="small")
        await small.until("accepted")
        status = await router.cluster.Status(cluster_pb2.StatusRequest())
        assert (status.queued_requests, status.queued_tokens, status.running_requests) == (2, 10, 1)
        worker.grant(reserve)
        worker.say(reserve.key, 0, "x", finish=STOP)
        assert (await running.end()).text == {0: "x"}


# --- who is calling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic key-a", "key-a"])
async def test_without_a_key_nothing_is_answered(header):
    async with running_router(api_keys={"key-a": "a"}) as router:
        metadata = (("authorization", header),) if header is not None else ()
        answer = await router.generate(metadata=metadata).end()
        assert answer.code == grpc.StatusCode.UNAUTHENTICATED
        assert answer.error.cause == "BAD_API_KEY"
        for call, request in (
            (router.inference.Get, pb.GetRequest(request_id="x")),
            (router.inference.Cancel, pb.CancelRequest(request_id="x")),
            (router.inference.Tokenize, pb.TokenizeRequest(text="x")),
            (router.inference.Models, pb.ModelsRequest()),
            (router.cluster.Status, cluster_pb2.StatusRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_the_status_is_open_to_tenants_and_to_the_cluster():
    async with running_router(api_keys={"key-a": "a"}) as router:
        for metadata in (
            (("authorization", "Bearer key-a"),),
            ((CLUSTER_TOKEN_KEY, cluster_token(SECRET)),),
        ):
            status = await router.cluster.Status(cluster_pb2.StatusRequest(), metadata=metadata)
            assert (status.router_id, status.profile, status.model) == ("r", "test", "tiny")


@pytest.mark.parametrize("secret", [b"another cluster's secret", b""])
async def test_a_worker_that_does_not_know_the_secret_is_not_registered(router: Harness, secret):
    worker = ScriptedWorker("b", worker_pb2.ROLE_BOTH)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.register(router.server.address, secret)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert error_detail(caught.value).cause == "BAD_CLUSTER_TOKEN"
    assert not (await router.cluster.Status(cluster_pb2.StatusRequest())).workers


@pytest.mark.parametrize(
    "fields",
    [{"worker_id": ""}, {"epoch": 0}, {"address": "nowhere"}, {"address": ":"}, {"worker_id": "x" * 200}],
)
async def test_an_announcement_that_makes_no_sense_is_refused(router: Harness, fields):
    request = cluster_pb2.RegisterRequest(
        **({"worker_id": "b", "epoch": 1, "address": "127.0.0.1:1"} | fields)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.cluster.Register(request, metadata=((CLUSTER_TOKEN_KEY, cluster_token(SECRET)),))
    assert caught.value.code() == INVALID


# --- workers ---------------------------------------------------------------------------------------------


async def health(router: Harness, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(router.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def until_health(router: Harness, status: int) -> None:
    async with asyncio.timeout(10):
        while await health(router) != status:
            await asyncio.sleep(0.01)


async def test_a_router_is_ready_while_a_pair_is_connected():
    async with running_router(link_grace_s=0.1) as router:
        assert await health(router) == NOT_SERVING
        assert await health(router, "headrace.v1.Cluster") == SERVING
        await router.worker("p", worker_pb2.ROLE_PREFILL)
        assert await health(router) == NOT_SERVING
        decode = await router.worker("d", worker_pb2.ROLE_DECODE)
        await until_health(router, SERVING)
        assert await health(router, "headrace.v1.Inference") == SERVING
        await decode.stop()
        await until_health(router, NOT_SERVING)


async def test_a_draining_worker_gets_nothing_new_but_finishes(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    worker.tell_load(state=worker_pb2.WORKER_STATE_NO_NEW)
    await until_health(router, NOT_SERVING)
    assert (await router.generate().end()).error.cause == "NO_WORKERS"
    worker.say(reserve.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}


async def test_unequal_workers_are_not_paired_and_the_status_says_why(router: Harness):
    other = worker_pb2.Identity()
    other.CopyFrom(IDENTITY)
    other.arithmetic = "bfloat16"
    await router.worker("p", worker_pb2.ROLE_PREFILL)
    decode = await router.worker("d", worker_pb2.ROLE_DECODE, identity=other)
    router.generate()
    assert (await decode.expect("reserve")).local_prefill
    row = await router.status("d")
    assert row.connected and "'p'" in row.last_error and "arithmetic" in row.last_error
    await router.worker("q", worker_pb2.ROLE_PREFILL, identity=other)
    assert (await router.status("d")).last_error == ""


async def test_a_worker_with_another_tokenizer_gets_nothing_and_the_status_says_why(router: Harness):
    other = worker_pb2.Identity()
    other.CopyFrom(IDENTITY)
    other.tokenizer_digest = "words"
    await router.worker("b", worker_pb2.ROLE_BOTH, identity=other)
    assert (await router.generate().end()).error.cause == "NO_WORKERS"
    row = await router.status("b")
    assert row.connected and "tokenizer 'words'" in row.last_error


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"protocol_version": 2}, "protocol version 2"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"worker_id": "someone else"}, "someone else"),
        ({"role": worker_pb2.ROLE_UNSPECIFIED}, "role"),
    ],
)
async def test_a_worker_that_is_not_what_it_should_be_is_not_taken(router: Harness, facts, named):
    worker = ScriptedWorker("b", worker_pb2.ROLE_BOTH)
    for name, value in facts.items():
        setattr(worker.hello, name, value)
    await worker.start()
    router.workers.append(worker)
    request = cluster_pb2.RegisterRequest(worker_id="b", epoch=1, address=worker.address)
    await router.cluster.Register(request, metadata=((CLUSTER_TOKEN_KEY, cluster_token(SECRET)),))
    async with asyncio.timeout(10):
        while not (row := (await router.cluster.Status(cluster_pb2.StatusRequest())).workers[0]).last_error:
            await asyncio.sleep(0.01)
    assert not row.connected and named in row.last_error


async def test_the_status_tells_of_workers_and_of_requests(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    await router.tell_load(worker, free_blocks=60)
    await serves_another(router, worker)
    assert (await router.generate("x" * 300).end()).code == INVALID
    cancelled = router.generate(request_id="cancelled")
    await cancelled.until("accepted")
    await router.cancel("cancelled")
    status = await router.cluster.Status(cluster_pb2.StatusRequest())
    assert (status.finished_requests, status.failed_requests, status.cancelled_requests) == (1, 1, 1)
    (row,) = status.workers
    assert row.connected and row.address == worker.address and row.last_error == ""
    assert row.hello == worker.hello and row.report.free_blocks == 60


async def test_registering_again_says_that_the_session_is_open(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    again = await worker.register(router.server.address)
    assert again.connected
    assert (again.router_id, again.router_epoch) == ("r", router.server.epoch)
    assert len(worker.router_hellos) == 1
    assert worker.router_hellos[0] == worker_pb2.RouterHello(router_id="r", router_epoch=again.router_epoch)


def list_services(channel: grpc.aio.Channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]))


async def test_services_can_be_listed_on_loopback(router: Harness):
    response = await list_services(router.channel).read()
    names = {service.name for service in response.list_services_response.service}
    assert {"headrace.v1.Inference", "headrace.v1.Cluster", "grpc.health.v1.Health"} <= names


async def test_elsewhere_services_are_not_listed():
    async with (
        running_router(listen="0.0.0.0:0") as router,
        grpc.aio.insecure_channel(f"127.0.0.1:{router.server.port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await list_services(channel).read()
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
