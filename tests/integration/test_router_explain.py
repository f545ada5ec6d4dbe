"""Why requests went where they went, and how well the router knows its workers' caches."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from headrace.v1 import cluster_pb2, worker_pb2
from kvtransfer.cluster_token import cluster_metadata
from tests.integration.router_harness import STOP, Harness, error_detail, running_router
from tests.integration.scripted_worker import SECRET

pytestmark = pytest.mark.integration
OPERATOR = cluster_metadata(SECRET)


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with running_router(api_keys={"key-a": "a", "key-b": "b"}) as harness:
        yield harness


def caller(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def explain(router: Harness, metadata: tuple[tuple[str, str], ...], **request: str):
    return await router.cluster.Explain(cluster_pb2.ExplainRequest(**request), metadata=metadata)


async def test_every_attempt_is_explained_with_what_was_weighed(router: Harness) -> None:
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one", metadata=caller("key-a"))
    first = await decode.expect("reserve")
    decode.fail(first.key, "reserve", "NO_CAPACITY", retryable=True)
    again = await decode.expect("reserve")
    decode.grant(again)
    prefill.finish_prefill((await prefill.expect("start_prefill")).key)
    decode.say(again.key, 0, "x", finish=STOP)
    done = (await stream.end()).done
    answer = await explain(router, OPERATOR, request_id="one", tenant="a")
    assert (answer.request_id, answer.state) == ("one", "FINISHED")
    lost, kept = answer.decisions
    assert (lost.attempt, lost.ended) == (1, "NO_CAPACITY")
    assert (kept.attempt, kept.ended, kept.policy) == (2, "FINISHED", "cost")
    assert (kept.decode_worker, kept.prefill_worker) == ("d", "p")
    assert [(each.worker_id, each.chosen) for each in kept.decode] == [("d", True)]
    assert [each.worker_id for each in kept.prefill if each.chosen] == ["p"]
    assert kept.reason and kept.age_s >= 0
    assert done.timing.predicted_ttft_s == lost.predicted_ttft_s


async def test_a_tenant_sees_its_own_requests_only(router: Harness) -> None:
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="mine", metadata=caller("key-a"))
    reserve = await worker.expect("reserve")
    assert (await explain(router, caller("key-a"), request_id="mine", tenant="b")).decisions
    for metadata in (caller("key-b"), OPERATOR):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await explain(router, metadata, request_id="mine")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert error_detail(refused.value).cause == "REQUEST_UNKNOWN"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await explain(router, (), request_id="mine")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    worker.grant(reserve)
    worker.say(reserve.key, 0, "x", finish=STOP)
    await stream.end()


async def test_the_status_counts_recoveries_and_knows_the_index() -> None:
    async with running_router() as router:
        await check_status(router)


async def check_status(router: Harness) -> None:
    worker = await router.worker("b", worker_pb2.ROLE_BOTH, key_identity="k")
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    worker.fail(reserve.key, "reserve", "LEASE_EXPIRED", retryable=True)
    again = await worker.expect("reserve")
    worker.grant(again)
    worker.say(again.key, 0, "x", finish=STOP)
    await stream.end()
    status = await router.cluster.Status(cluster_pb2.StatusRequest(), metadata=OPERATOR)
    assert (status.recoveries, status.recoveries_refused) == (1, 0)
    index = status.prefix_index
    assert (index.exact_workers, index.other_workers, index.blocks) == (0, 1, 0)
    worker.send(blocks=worker_pb2.BlockEvents(number=1, is_snapshot=True))
    await router.tell_load(worker, free_blocks=1)
    status = await router.cluster.Status(cluster_pb2.StatusRequest(), metadata=OPERATOR)
    assert (status.prefix_index.exact_workers, status.prefix_index.other_workers) == (1, 0)
