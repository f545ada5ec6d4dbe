"""The gRPC server that routers dial; it lives on the service loop. KV bytes have another (worker/kv.py)."""

from __future__ import annotations

import ipaddress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.transports.auth import AsyncClusterTokenInterceptor

MAX_CONTROL_BYTES = 64 << 20

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A router that is gone without a word is found within 10 s; one that looks after us may ping as often.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
    ("grpc.so_reuseport", 0),
)
_WORKER_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


class ControlServer:
    """Worker.Session, health and, on loopback, reflection; made and used on the service loop."""

    def __init__(
        self, servicer: worker_pb2_grpc.WorkerServicer, host: str, port: int, cluster_secret: bytes
    ) -> None:
        """Raises RuntimeError where the port cannot be bound."""
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=(AsyncClusterTokenInterceptor(cluster_secret),), options=_OPTIONS
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if is_loopback(host):
            names = (_WORKER_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
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


def join_address(host: str, port: int) -> str:
    """host:port as gRPC takes it; an IPv6 address goes into brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
