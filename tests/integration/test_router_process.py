"""A router as a process: served until it is told to stop."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router import server
from router.config import ModelFacts, RouterConfig
from tests.integration.router_harness import ByteTokenizer, running_router
from tests.integration.scripted_worker import SECRET

pytestmark = pytest.mark.integration


async def test_it_serves_until_it_is_told_to_stop(monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int):
    model = ModelFacts(name="tiny", architecture="Tiny", digest="d", max_context=64)
    monkeypatch.setattr(server.ModelTokenizer, "open", lambda _model_dir: ByteTokenizer())
    monkeypatch.setattr(server.ModelFacts, "read", lambda _config: model)
    listen = f"127.0.0.1:{unused_tcp_port}"
    config = RouterConfig(
        router_id="r", model_name="tiny", model_dir=Path("unused"), cluster_secret=SECRET, listen=listen
    )
    serving = asyncio.create_task(server.serve(config))
    async with grpc.aio.insecure_channel(listen) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Cluster")
        response = await check(request, wait_for_ready=True, timeout=10)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(10):
            await serving


async def test_an_address_in_use_is_an_error():
    async with running_router() as router:
        with pytest.raises(RuntimeError):
            async with running_router(listen=router.server.address):
                pass


async def test_a_router_is_started_once_and_stopped_any_number_of_times():
    async with running_router() as router:
        with pytest.raises(RuntimeError, match="once"):
            await router.server.start()
        await router.server.stop()
        await router.server.stop()
