"""Announces the worker to its routers until each has a session open.

A router forgets workers when it restarts, and a worker is a new one after each start: as long as the
router's present incarnation has no session with this one, `Cluster.Register` is called, with back-off.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import grpc

from headrace.v1 import cluster_pb2, cluster_pb2_grpc

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
CHECK_INTERVAL_S = 1.0
CALL_TIMEOUT_S = 5.0


class Membership:
    """Keeps one worker registered with every router of `routers` (host:port)."""

    def __init__(
        self,
        routers: Sequence[str],
        announcement: Callable[[], cluster_pb2.RegisterRequest],
        metadata: tuple[tuple[str, str], ...],
        connected: Callable[[str, int], bool],
    ) -> None:
        """`announcement()`: the worker as it is now, its epoch above all. `connected(router_id, router_epoch)` says
        whether that router's session is open."""
        self._routers = tuple(routers)
        self._announcement = announcement
        self._metadata = metadata
        self._connected = connected
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin; on the service loop."""
        self._tasks = [asyncio.create_task(self._keep_registered(router)) for router in self._routers]

    async def stop(self) -> None:
        """End; the routers see the sessions close."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_registered(self, router: str) -> None:
        async with grpc.aio.insecure_channel(router) as channel:
            cluster: cluster_pb2_grpc.ClusterAsyncStub = cluster_pb2_grpc.ClusterStub(channel)
            delay_s = FIRST_DELAY_S
            while True:
                answer = await self._register(cluster, router)
                if answer is None or not answer.connected:
                    await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                    delay_s = min(MAX_DELAY_S, delay_s * 2)
                    if answer is None:
                        continue
                while answer is not None and self._connected(answer.router_id, answer.router_epoch):
                    delay_s = FIRST_DELAY_S
                    await asyncio.sleep(CHECK_INTERVAL_S)

    async def _register(
        self, cluster: cluster_pb2_grpc.ClusterAsyncStub, router: str
    ) -> cluster_pb2.RegisterResponse | None:
        try:
            return await cluster.Register(
                self._announcement(), metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            logger.info("router %s cannot be reached: %s", router, error.code().name)
            return None
