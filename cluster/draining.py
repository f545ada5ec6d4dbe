"""Has a worker leave, or come back, through the router; says how far it is.

What to order, and when it is done, is decided without a clock or a network (`Drain`); `drain` carries it out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import grpc

from cluster.errors import ClusterError
from cluster.readiness import CALL_TIMEOUT_S, POLL_INTERVAL_S, status_of
from headrace.v1 import cluster_pb2, cluster_pb2_grpc
from headrace.v1.worker_pb2 import (
    WORKER_STATE_GONE,
    WORKER_STATE_KV_ONLY,
    WORKER_STATE_NO_NEW,
    WORKER_STATE_SERVING,
    WORKER_STATE_UNSPECIFIED,
    WorkerState,
)
from kvtransfer.cluster_token import cluster_metadata

UNDO_TIMEOUT_S = 10.0
PATIENCE_S = 30.0
"""The router may be started anew meanwhile, or lose touch with the worker; the worker goes on draining."""
_BEFORE_THE_ORDER = (WORKER_STATE_SERVING, WORKER_STATE_UNSPECIFIED)

Watch = Callable[[cluster_pb2.WorkerStatus], None]


class Drain:
    """One worker on its way to `goal`: KV_ONLY or GONE. Pure; times are monotonic seconds.

    What still runs `timeout_s` after `began` is handed back to the routers; None: it is waited for, which its
    deadlines bound.
    """

    def __init__(self, epoch: int, goal: WorkerState, began: float, timeout_s: float | None = None) -> None:
        self._epoch = epoch
        self._goal = goal
        self._hand_back_at = math.inf if timeout_s is None else began + timeout_s
        self._is_heard = False
        self._in_touch_at = began

    def first_order(self) -> WorkerState:
        """What to ask the worker for at the beginning."""
        return WORKER_STATE_GONE if self._goal == WORKER_STATE_GONE else WORKER_STATE_NO_NEW

    def orders(self, status: cluster_pb2.WorkerStatus, now: float) -> tuple[WorkerState, ...]:
        """What to ask it for next, in this order; mostly nothing."""
        if not status.connected:
            return ()
        if not self._is_heard and status.report.state in _BEFORE_THE_ORDER:
            return (self.first_order(),)
        self._is_heard = True
        if status.report.state != WORKER_STATE_NO_NEW or now < self._hand_back_at:
            return ()
        self._hand_back_at = math.inf
        return (WORKER_STATE_KV_ONLY, *((self._goal,) if self._goal == WORKER_STATE_GONE else ()))

    def is_done(self, status: cluster_pb2.WorkerStatus, now: float) -> bool:
        """Whether the goal is reached. Raises ClusterError where it cannot be any more."""
        state, worker_id = status.report.state, status.hello.worker_id
        if status.hello.epoch != self._epoch:
            raise ClusterError(f"{worker_id} ended while it drained, and another process took its place")
        if state == WORKER_STATE_GONE:
            return self._goal == WORKER_STATE_KV_ONLY or not status.connected
        if not status.connected:
            if now - self._in_touch_at > PATIENCE_S:
                raise ClusterError(f"{worker_id} was lost while it drained: {status.last_error}")
            return False
        self._in_touch_at = now
        if self._is_heard and state == WORKER_STATE_SERVING:
            raise ClusterError(f"{worker_id} serves again: somebody undid the drain")
        return self._goal == WORKER_STATE_KV_ONLY and state == WORKER_STATE_KV_ONLY


class Operator:
    """Asks a router about its workers and requests, and passes orders on to workers."""

    def __init__(self, channel: grpc.Channel, cluster_secret: bytes) -> None:
        self._channel = channel
        self._cluster_secret = cluster_secret
        self._stub = cluster_pb2_grpc.ClusterStub(channel)
        self._metadata = cluster_metadata(cluster_secret)

    def workers(self) -> dict[str, cluster_pb2.WorkerStatus]:
        """By id, as the router knows them. Raises grpc.RpcError."""
        status = status_of(self._channel, self._cluster_secret)
        return {worker.hello.worker_id: worker for worker in status.workers}

    def worker(self, worker_id: str) -> cluster_pb2.WorkerStatus:
        """One of them. Raises ClusterError where there is none of that name, and grpc.RpcError."""
        return named(self.workers(), worker_id)

    def explain(self, tenant: str, request_id: str) -> cluster_pb2.ExplainResponse:
        """Why a tenant's request was placed where it was. Raises grpc.RpcError."""
        request = cluster_pb2.ExplainRequest(request_id=request_id, tenant=tenant)
        return self._stub.Explain(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)

    def order(self, worker_id: str, state: WorkerState) -> None:
        """Ask a worker to go there. Raises grpc.RpcError."""
        request = cluster_pb2.SetWorkerStateRequest(worker_id=worker_id, state=state)
        self._stub.SetWorkerState(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)

    def wait_for(self, worker_id: str, is_done: Callable[[cluster_pb2.WorkerStatus], bool]) -> None:
        """Poll until `is_done`, which may give orders and raise. A router that does not answer, or does not know the
        worker yet, is waited for.

        Raises ClusterError.
        """
        silent_since: float | None = None
        while True:
            problem = ""
            try:
                status = self.workers().get(worker_id)
                if status is None:
                    problem = f"the router does not know {worker_id} any more"
                elif is_done(status):
                    return
            except grpc.RpcError as error:
                problem = _told(error)
            now = time.monotonic()
            silent_since = (silent_since or now) if problem else None
            if silent_since is not None and now - silent_since > PATIENCE_S:
                raise ClusterError(problem)
            time.sleep(POLL_INTERVAL_S)


def named(workers: Mapping[str, cluster_pb2.WorkerStatus], worker_id: str) -> cluster_pb2.WorkerStatus:
    """One of the workers. Raises ClusterError where there is none of that name."""
    if worker_id not in workers:
        raise ClusterError(f"there is no worker {worker_id!r}; there are {', '.join(sorted(workers))}")
    return workers[worker_id]


@contextmanager
def operator(router_address: str, cluster_secret: bytes) -> Iterator[Operator]:
    """An Operator. Calls that fail within end as ClusterError."""
    with grpc.insecure_channel(router_address) as channel:
        try:
            yield Operator(channel, cluster_secret)
        except grpc.RpcError as error:
            raise ClusterError(_told(error)) from error


def drain(
    cluster: Operator, worker_id: str, goal: WorkerState, *, timeout_s: float | None, watch: Watch
) -> None:
    """Have a worker finish what it has, and return once it is in state `goal`, KV_ONLY or GONE.

    `watch` hears how far it is, some times a second. Raises ClusterError where the worker is lost or put back.
    """
    status = _connected(cluster, worker_id)
    draining = Drain(status.hello.epoch, goal, time.monotonic(), timeout_s)
    cluster.order(worker_id, draining.first_order())

    def look(status: cluster_pb2.WorkerStatus) -> bool:
        watch(status)
        now = time.monotonic()
        for state in draining.orders(status, now):
            cluster.order(worker_id, state)
        return draining.is_done(status, now)

    cluster.wait_for(worker_id, look)


def begin_drain(cluster: Operator, worker_id: str, goal: WorkerState) -> None:
    """As `drain`, but wait for nothing."""
    status = _connected(cluster, worker_id)
    cluster.order(worker_id, Drain(status.hello.epoch, goal, 0.0).first_order())


def undo_drain(cluster: Operator, worker_id: str) -> None:
    """Have a worker serve again. Raises ClusterError where it has left, or is about to whatever it is told."""
    _connected(cluster, worker_id)
    cluster.order(worker_id, WORKER_STATE_SERVING)
    give_up_at = time.monotonic() + UNDO_TIMEOUT_S

    def look(status: cluster_pb2.WorkerStatus) -> bool:
        if status.report.state == WORKER_STATE_GONE or time.monotonic() > give_up_at:
            raise ClusterError(f"{worker_id} does not serve again: its process is to end")
        return status.report.state == WORKER_STATE_SERVING

    cluster.wait_for(worker_id, look)


def _connected(cluster: Operator, worker_id: str) -> cluster_pb2.WorkerStatus:
    status = cluster.worker(worker_id)
    if not status.connected:
        raise ClusterError(f"the router has no connection to {worker_id}: {status.last_error}")
    return status


def _told(error: grpc.RpcError) -> str:
    """What the router said of a call that failed, or that it said nothing."""
    if isinstance(error, grpc.Call) and error.code() is not grpc.StatusCode.UNAVAILABLE:
        return str(error.details())
    return "the router does not answer"
