"""A node's store as a process serves it: one port for control, pushes and fetches, and the threads behind it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.v1 import kvstore_pb2_grpc as pb_grpc
from kvtransfer.credit import CreditBook
from kvtransfer.desk import LeaseDesk
from kvtransfer.landing import FrameLander
from kvtransfer.leases import LeaseTable
from kvtransfer.tiers.service import KvStoreService
from kvtransfer.tiers.store import NodeStore
from kvtransfer.tiers.store_types import StoreOptions
from kvtransfer.transports.auth import ClusterTokenInterceptor
from kvtransfer.transports.grpc_channel import make_bulk_server
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services
from kvtransfer.transports.grpc_serve import FetchServer, ServeOptions
from kvtransfer.transports.seam import HandoffRefused

if TYPE_CHECKING:
    import grpc

    from headrace.v1 import kvtransfer_pb2 as pb
    from kvtransfer.tiers.files import Files
    from kvtransfer.tiers.store_types import StoreStats

_log = logging.getLogger(__name__)

# Frames of any layout come here, so the longest is not known; nearly all have about 2 MiB.
FRAME_BYTES = 4 << 20
TICK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """`listen`: host:port, where port 0 takes a free one, or unix:/path. `stream_bytes`: of frames received and not yet
    acknowledged, all streams together; memory beside what `options` allows. `ttl_s`: of a lease without a sign of life.
    `serve`: bounds of the fetches that are answered."""

    cluster_secret: bytes = field(repr=False)
    options: StoreOptions
    listen: str = "127.0.0.1:0"
    stream_bytes: int = 32 << 20
    ttl_s: float = 10.0
    max_calls: int = 64
    serve: ServeOptions = field(default_factory=ServeOptions)


class StoreServer:
    """`start`, then `close`. Never fails for what its disk does: it goes on without and `stats` says so."""

    def __init__(self, config: StoreConfig, files: Files | None = None) -> None:
        """Binds the port. Raises RuntimeError where it cannot be bound, ValueError for a short secret."""
        self.epoch = secrets.randbits(64)
        self.store = NodeStore(config.options, config.cluster_secret, time.monotonic, files)
        areas = self.store.areas
        table = LeaseTable(self.epoch, time.monotonic, secrets.token_bytes)
        self._desk = LeaseDesk(table, self.store.lock, areas.close)
        self._committed: list[bytes] = []
        lander = FrameLander(self._desk, areas, areas.layout_of, time.monotonic)
        receiver = BulkReceiver(lander, CreditBook(config.stream_bytes, FRAME_BYTES))
        service = KvTransferService(self._desk, areas, areas.layout_of, self._commit, time.monotonic)
        self._fetches = FetchServer(self.store, lambda: self.epoch, config.serve)
        self._server: grpc.Server = make_bulk_server(
            config.max_calls, interceptors=(ClusterTokenInterceptor(config.cluster_secret),)
        )
        add_kv_services(self._server, receiver, service)
        self._server.add_generic_rpc_handlers((self._fetches.handler(),))
        pb_grpc.add_KvStoreServicer_to_server(
            KvStoreService(self.store, self._desk, self.epoch, config.ttl_s), self._server
        )
        port = self._server.add_insecure_port(config.listen)
        is_path = config.listen.startswith("unix:")
        self.address = config.listen if is_path else f"{config.listen.rpartition(':')[0]}:{port}"
        self._stopped = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="kv-store-tick", daemon=True)

    def start(self) -> None:
        """Begins to accept, and to open the disk tier: until that is open, nothing is found in it."""
        self.store.start()
        self._ticker.start()
        self._server.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the disk tier is open, or has said why not, within `timeout_s`."""
        return self.store.wait_ready(timeout_s)

    def stats(self) -> StoreStats:
        """All figures, as of one moment."""
        return self.store.stats()

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuses new calls, cuts those that go on, writes what waits for the disk for up to `timeout_s`."""
        self._stopped.set()
        self._fetches.close(timeout_s)
        self._server.stop(0).wait(timeout_s)
        self._ticker.join(timeout_s)
        self.store.close(timeout_s)

    def _commit(self, lease_id: bytes, handoff: pb.Handoff, fidelity: int) -> None:
        """Under the lock: what landed becomes visible. The lease is released by the next tick."""
        block_tokens = self.store.areas.block_tokens_of(lease_id)
        if handoff.num_tokens % block_tokens:
            text = f"{handoff.num_tokens} tokens are not whole blocks of {block_tokens}"
            raise HandoffRefused("PARTIAL_BLOCK", text)
        self.store.publish(self.store.areas.take(lease_id, handoff.num_tokens))
        self._committed.append(lease_id)

    def _tick(self) -> None:
        while not self._stopped.wait(TICK_S):
            try:
                self._desk.tick()
                self._release_committed()
            except Exception:  # noqa: BLE001 - the leases of a store must not outlive a fault of one of them
                _log.exception("a tick of the store failed")

    def _release_committed(self) -> None:
        with self._desk.change() as table:
            committed, self._committed = self._committed, []
            for lease_id in committed:
                table.release(lease_id, "STORED")
