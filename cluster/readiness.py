"""Whether a cluster answers: the router's health and the workers that it is connected to."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from cluster.errors import ClusterError
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, worker_pb2
from kvtransfer.cluster_token import cluster_metadata

CALL_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.2


def fetch_status(router_address: str, cluster_secret: bytes) -> cluster_pb2.StatusResponse:
    """What the cluster is and does now. Raises grpc.RpcError."""
    with grpc.insecure_channel(router_address) as channel:
        return status_of(channel, cluster_secret)


def status_of(channel: grpc.Channel, cluster_secret: bytes) -> cluster_pb2.StatusResponse:
    """The same over a channel that is open already. Raises grpc.RpcError."""
    return cluster_pb2_grpc.ClusterStub(channel).Status(
        cluster_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S, metadata=cluster_metadata(cluster_secret)
    )


def wait_until_serving(
    router_address: str,
    cluster_secret: bytes,
    workers: Collection[str],
    deadline_s: float,
) -> None:
    """Return once the router is healthy and every worker serves.

    `deadline_s` is on time.monotonic(). Raises ClusterError, naming what is missing.
    """
    missing = "the router does not answer"
    with grpc.insecure_channel(router_address) as channel:
        while time.monotonic() < deadline_s:
            try:
                missing = _missing(channel, cluster_secret, workers)
            except grpc.RpcError as error:
                with suppress(AttributeError):
                    missing = f"the router does not answer: {error.code().name} {error.details()}"
            if not missing:
                return
            time.sleep(POLL_INTERVAL_S)
    raise ClusterError(f"the cluster at {router_address} is not ready in time: {missing}")


def _missing(channel: grpc.Channel, cluster_secret: bytes, workers: Collection[str]) -> str:
    """What is not there yet; empty when all is."""
    status = status_of(channel, cluster_secret)
    seen = {worker.hello.worker_id: worker for worker in status.workers}
    for worker_id in sorted(workers):
        worker = seen.get(worker_id)
        if worker is None or not worker.connected:
            why = worker.last_error if worker is not None else ""
            return f"{worker_id} is not connected to the router{f': {why}' if why else ''}"
        if worker.report.state not in (worker_pb2.WORKER_STATE_SERVING, worker_pb2.WORKER_STATE_UNSPECIFIED):
            return f"{worker_id} does not serve"
    health = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S
    )
    if health.status != health_pb2.HealthCheckResponse.SERVING:
        return "the router says that it does not serve"
    return ""
