"""The gRPC server that routers dial; it lives on the service loop. KV bytes have another (worker/kv.py)."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.cluster_token import ClusterTokenCheck
from kvtransfer.transports.auth import REFUSAL, is_open
from rpc.call import ServerCall
from rpc.reflection import REFLECTION_SERVICE, add_reflection
from rpc.server import Guard, Handler, Server, ServerSettings

MAX_CONTROL_BYTES = 64 << 20
MAX_CALLS = 1024
KEEPALIVE_S = 5.0  # a router that is gone without a word is found within twice that
REFUSAL_S = 5.0  # how long a caller who may not has to say something
_WORKER_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


class ControlServer:
    """Worker.Session, health and, on loopback, reflection; made and used on the service loop."""

    def __init__(
        self, servicer: worker_pb2_grpc.WorkerServicer, host: str, port: int, cluster_secret: bytes
    ) -> None:
        """Raises RuntimeError where the port cannot be bound."""
        self._health = health.aio.HealthServicer()
        settings = ServerSettings(
            max_message_bytes=MAX_CONTROL_BYTES, max_calls=MAX_CALLS, keepalive_s=KEEPALIVE_S
        )
        self._server = Server(settings, _guard(ClusterTokenCheck(cluster_secret)))
        worker_pb2_grpc.add_WorkerServicer_to_server(servicer, self._server)  # type: ignore[arg-type]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if is_loopback(host):
            add_reflection((_WORKER_SERVICE, health.SERVICE_NAME, REFLECTION_SERVICE), self._server)
        self.port: int = self._server.add_insecure_port(join_address(host, port))

    async def start(self) -> None:
        """Begin to accept; not yet healthy."""
        await self.set_healthy(False)
        await self._server.start()

    async def set_healthy(self, healthy: bool) -> None:
        """What health checks are told from now on."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", _WORKER_SERVICE):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cut those that go on after the grace."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _guard(check: ClusterTokenCheck) -> Guard:
    """Refuses streams without the cluster's token with UNAUTHENTICATED."""

    def guarded(path: str, handler: Handler) -> Handler:
        if is_open(path):
            return handler
        serve: Any = handler.stream_stream

        def admit(requests: AsyncIterator[Any], call: ServerCall) -> Any:
            admitted = check.admits(call.invocation_metadata())
            return serve(requests, call) if admitted else _refuse(requests, call)

        found: Handler = grpc.stream_stream_rpc_method_handler(
            admit, handler.request_deserializer, handler.response_serializer
        )
        return found

    return guarded


async def _refuse(requests: AsyncIterator[Any], call: ServerCall) -> None:
    # Some callers cannot bear to be answered while they are about to send.
    with suppress(TimeoutError):
        await asyncio.wait_for(anext(requests, None), REFUSAL_S)
    await call.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


def join_address(host: str, port: int) -> str:
    """host:port as gRPC takes it; an IPv6 address goes into brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
