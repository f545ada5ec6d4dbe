"""What all KV transfers of one worker share, and the port where other workers push and fetch."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

from engine.engine import Engine
from engine.record_cache import RecordCache
from kvtransfer.busy import BusyCores
from kvtransfer.cache_sink import CacheSink
from kvtransfer.cache_source import CacheBlockSource
from kvtransfer.choice import CodecChooser
from kvtransfer.choosers import CodecChoosers
from kvtransfer.codec_speed import SpeedBook
from kvtransfer.codecs import Fidelity
from kvtransfer.credit import DEFAULT_LANDING_BYTES, CreditBook
from kvtransfer.frames import max_frame_bytes
from kvtransfer.landing import FrameLander
from kvtransfer.load_speeds import LoadSpeeds
from kvtransfer.sources import FetchRequest, SourceRefused, SourcesByLayout
from kvtransfer.tiers.client import StoreClient
from kvtransfer.transports.auth import ClusterTokenInterceptor
from kvtransfer.transports.carriers import CARRIED_FRAME_BYTES
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.grpc_channel import make_bulk_server
from kvtransfer.transports.grpc_fetch import FetchTarget
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services
from kvtransfer.transports.grpc_serve import FetchServer
from worker.config import WorkerConfig
from worker.kv_counters import KvCounters
from worker.leasing import LeaseKeeper
from worker.media import Medium, blocks_of, medium_of, records_of
from worker.servers import join_address


class KvParts:
    """One per worker: speeds and links as measured, landing memory, carriers, and the node's store if there is one.

    `pace(num_bytes)`: waits before so much is written into the cache (worker/pacing.py).
    """

    def __init__(
        self,
        engine: Engine,
        config: WorkerConfig,
        pace: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Measures the codecs that the profile's fidelity allows, some milliseconds each."""
        self.engine = engine
        self.config = config
        self.clock = clock
        self.counters = KvCounters()
        self.speeds = LoadSpeeds(self.clock)
        book = SpeedBook(self.clock)
        busy = BusyCores(config.service_cpus, lambda: book.encode_s, self.clock)
        self.choosers = CodecChoosers(book, busy, self.clock)
        self.choosers.check(config.codec, (config.fidelity,))
        self.choosers.probe(engine.layout, config.fidelity)
        self.blocks = blocks_of(engine)
        self.records = records_of(engine)
        self.sink = CacheSink(engine.cache, engine.layout)
        self.credits = CreditBook(DEFAULT_LANDING_BYTES, max_frame_bytes(engine.layout, CARRIED_FRAME_BYTES))
        self.landing_carriers = CarrierHost(CarrierOptions(tcp_host=config.host))
        self.sending_carriers = SenderCarriers()
        self.store = (
            StoreClient(config.store_address, config.cluster_secret) if config.store_address else None
        )
        self._pace = pace

    def lander(self, leases: LeaseKeeper) -> FrameLander:
        """Lands frames under one role's leases."""
        return FrameLander(leases.desk, self.sink, self.engine.layout, self.clock, self._pace)

    def target(self, leases: LeaseKeeper) -> FetchTarget:
        """Where one role's fetches land."""
        return FetchTarget(leases.desk, self.lander(leases), self.sink, self.credits, self.engine.layout)

    def record_target(self, leases: LeaseKeeper, records: RecordCache) -> FetchTarget:
        """Where one role's fetches of window records land."""
        sink = CacheSink(records, records.layout)
        lander = FrameLander(leases.desk, sink, records.layout, self.clock, self._pace)
        return FetchTarget(leases.desk, lander, sink, self.credits, records.layout)

    def close(self) -> None:
        """Give back what lies outside of this process's memory."""
        self.landing_carriers.close()
        self.sending_carriers.close()
        if self.store is not None:
            self.store.close()


class KvServer:
    """KvTransfer and the bulk streams, on a port and threads of their own: pushes into the leases of `receiving`,
    fetches from the cache.

    Landing a megabyte never waits behind a token there, nor a token behind it (design §5).
    """

    def __init__(self, kv: KvParts, receiving: LeaseKeeper, current_epoch: Callable[[], int]) -> None:
        """Raises RuntimeError where the port cannot be bound."""
        config, layout = kv.config, kv.engine.layout
        self._kv = kv
        receiver = BulkReceiver(kv.lander(receiving), kv.credits, kv.landing_carriers.open_slots)
        service = KvTransferService(receiving.desk, kv.sink, layout, receiving.commit, kv.clock)
        media = [kv.blocks, *([medium_of(kv.records)] if kv.records is not None else [])]
        self._fetches = FetchServer(
            SourcesByLayout({medium.layout.identity(): self._source(medium) for medium in media}),
            current_epoch,
        )
        self._server: grpc.Server = make_bulk_server(
            interceptors=(ClusterTokenInterceptor(config.cluster_secret),)
        )
        add_kv_services(self._server, receiver, service, self._fetches)
        self.port: int = self._server.add_insecure_port(join_address(config.host, config.kv_port))

    @property
    def num_fetches(self) -> int:
        """Fetches of others that keep blocks of this worker pinned."""
        return self._fetches.num_open

    def start(self) -> None:
        """Begin to accept."""
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cut those that go on after the grace."""
        self._fetches.close(grace_s)
        self._server.stop(grace_s).wait()

    def _source(self, medium: Medium) -> CacheBlockSource:
        layout = medium.layout
        return CacheBlockSource(
            medium.cache, layout, layout.block_tokens, medium.pin, medium.release, self._chooser
        )

    def _chooser(self, request: FetchRequest) -> CodecChooser:
        """Askers are known by their epochs; they all come in by this port."""
        bound = list(Fidelity)[request.fidelity]
        try:
            return self._kv.choosers.chooser_for(
                self._kv.config.codec,
                (bound,),
                peer=("", request.lease.receiver_epoch),
                layout=self._kv.engine.layout,
                spoken=request.codecs,
            )
        except ValueError as error:
            raise SourceRefused("NO_COMMON_CODEC", str(error)) from error
