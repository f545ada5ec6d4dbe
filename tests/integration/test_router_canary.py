"""A newcomer gets no request before a block has moved between it and a partner."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from headrace.v1 import worker_pb2
from router.core.canary import CANARY_TENANT
from tests.integration.router_harness import STOP, Harness, running_router
from tests.integration.scripted_worker import ScriptedWorker

pytestmark = pytest.mark.integration


async def pass_trial(prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    reserve = await decode.expect("reserve")
    assert reserve.key.tenant == CANARY_TENANT
    decode.grant(reserve)
    start = await prefill.expect("start_prefill")
    assert start.lease.kv_address == decode.hello.kv_address
    prefill.finish_prefill(start.key)
    decode.say(start.key, 0, "ab", finish=STOP)


async def is_served_by(router: Harness, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    stream = router.generate("a prompt that is worth the way", request_id="one")
    reserve = await decode.expect("reserve")
    assert reserve.key.request_id == "one" and not reserve.local_prefill
    decode.grant(reserve)
    prefill.finish_prefill((await prefill.expect("start_prefill")).key)
    decode.say(reserve.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}


async def test_a_newcomer_serves_once_a_block_has_moved() -> None:
    async with running_router(canary_timeout_s=30.0, policy="least-loaded") as router:
        prefill, decode = await router.pair()
        refused = await router.generate(request_id="early").end()
        assert (refused.code, refused.error.cause) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKERS")
        await pass_trial(prefill, decode)
        assert (await decode.expect("acknowledge")).seen[0].key.tenant == CANARY_TENANT
        await is_served_by(router, prefill, decode)


async def test_a_newcomer_that_cannot_move_a_block_is_kept_out_and_the_status_says_why() -> None:
    async with running_router(canary_timeout_s=0.2) as router:
        decode = await router.worker("d", worker_pb2.ROLE_DECODE)
        prefill = await router.worker("p", worker_pb2.ROLE_PREFILL)
        decode.grant(await decode.expect("reserve"))
        await prefill.expect("start_prefill")
        assert (await decode.expect("cancel")).key.tenant == CANARY_TENANT
        async with asyncio.timeout(10):
            while "no block could be moved with 'd'" not in (await router.status("p")).last_error:
                await asyncio.sleep(0.01)
        stream = router.generate(request_id="one")  # the decode worker serves by itself meanwhile
        while (reserve := await decode.expect("reserve")).key.tenant == CANARY_TENANT:
            pass
        assert reserve.local_prefill
        decode.grant(reserve)
        decode.say(reserve.key, 0, "x", finish=STOP)
        assert (await stream.end()).text == {0: "x"}
