"""The receiving end of KV transfers, on the leases and the cache of one worker."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

from engine.engine import Engine
from kvtransfer.landing import FrameLander
from kvtransfer.transports.grpc_channel import make_bulk_server
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services
from worker.auth import ClusterTokenInterceptor
from worker.leasing import LeaseKeeper
from worker.servers import join_address


class KvServer:
    """KvTransfer and the bulk stream, on a port and threads of their own.

    Landing a megabyte never waits behind a token there, nor a token behind it (design §5).
    """

    def __init__(
        self,
        leases: LeaseKeeper,
        engine: Engine,
        host: str,
        port: int,
        cluster_secret: bytes,
        pace: Callable[[int], None],
    ) -> None:
        """Raises RuntimeError where the port cannot be bound."""
        lander = FrameLander(leases.desk, engine.cache, engine.layout, time.monotonic, pace)
        service = KvTransferService(leases.desk, engine.cache, engine.layout, leases.commit, time.monotonic)
        self._server: grpc.Server = make_bulk_server(interceptors=(ClusterTokenInterceptor(cluster_secret),))
        add_kv_services(self._server, BulkReceiver(lander), service)
        self.port: int = self._server.add_insecure_port(join_address(host, port))

    def start(self) -> None:
        """Begin to accept."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cut those that go on after the grace."""
        self._server.stop(grace_s).wait()
