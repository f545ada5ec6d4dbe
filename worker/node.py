"""A worker, put together: engine thread, service loop, servers, roles, membership.

`WorkerNode(config, services).start()` returns when routers can dial it. The services of the worker's role
(`PrefillService`, `DecodeService` or both) are handed in, because this package knows neither.
A node takes its process over where cores are given: threads are moved (worker/affinity.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from engine.engine import Engine
from engine.events import StepResult
from engine.runner import EngineOptions
from headrace.v1 import cluster_pb2, worker_pb2
from kvtransfer.keys import root_key, tenant_secret
from kvtransfer.leases import LeaseTable
from text.tokenizer import Tokenizer
from worker.affinity import pin_process
from worker.auth import cluster_metadata
from worker.config import WorkerConfig
from worker.engine_thread import EngineThread
from worker.facts import identity_digest, worker_hello, worker_identity, worker_report
from worker.idle_check import IdleCheck
from worker.kv import KvServer
from worker.leasing import LeaseKeeper
from worker.membership import Membership
from worker.pacing import LandingPace
from worker.servers import ControlServer, join_address
from worker.service import RoleService, ServiceFactory, WorkerContext
from worker.service_loop import ServiceLoop
from worker.session import SessionServicer

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
STOP_GRACE_S = 0.5
SWEEP_INTERVAL_S = 0.1
REPORT_DELAY_S = 0.01


class WorkerNode:
    """One worker. `start` and `stop` are called once each, from one thread."""

    def __init__(self, config: WorkerConfig, services: Sequence[ServiceFactory]) -> None:
        self.config = config
        self.epoch = secrets.randbits(64) or 1
        self.address = ""
        """host:port of the Worker service, once started."""
        self.kv_address = ""
        """host:port of KvTransfer and the bulk service; empty where no role receives KV."""
        self.engine: Engine
        """The engine, once started; for tests and tools in the same process."""
        self._factories = tuple(services)
        self._services: list[RoleService] = []
        self._keepers: list[LeaseKeeper] = []
        self._state: worker_pb2.WorkerState = worker_pb2.WORKER_STATE_NO_NEW
        self._report_due = False
        self._loop = ServiceLoop()
        self._engine_thread = EngineThread(self._open_engine, self, config.cpus)
        self._kv_server: KvServer | None = None
        self._started = AsyncExitStack()  # how to end what was begun on the loop, last first

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model, open the servers and register with the routers.

        Raises what opening the model raises, ModelDirectoryError, or RuntimeError for a port in use.
        """
        pin_process(self.config.service_cpus)
        self._loop.start()
        try:
            self.engine = self._engine_thread.start()
            self.engine.on_progress = self.on_step
            self._identity = worker_identity(self.engine, self.config.model_dir)
            self._key_identity = identity_digest(self._identity)
            self._tokenizer = Tokenizer.open(self.config.model_dir)
            self._loop.run(self._start_services(), START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        logger.info("worker %s serves at %s, KV at %s", self.config.worker_id, self.address, self.kv_address)

    def stop(self) -> None:
        """End every request with a cause, and every thread. Idempotent."""
        self._state = worker_pb2.WORKER_STATE_GONE
        if self._loop.is_running:
            self._loop.run(self._started.aclose(), STOP_TIMEOUT_S)
        if self._kv_server is not None:
            self._kv_server.stop(STOP_GRACE_S)
        self._engine_thread.stop()
        self._loop.stop()

    def hello(self) -> worker_pb2.WorkerHello:
        """What routers are told of this worker."""
        return worker_hello(
            self.config, self.engine, self.epoch, self._identity, self.kv_address, self._state
        )

    def report(self) -> worker_pb2.WorkerReport:
        """Load and room of now."""
        counters = [keeper.counters for keeper in self._keepers]
        return worker_report(
            self.engine,
            self._engine_thread.counters,
            self._state,
            num_leases=sum(keeper.num_live for keeper in self._keepers),
            refused_stale=sum(counter.stale for counter in counters),
        )

    @property
    def healthy(self) -> bool:
        """Whether the worker takes requests."""
        return self._state == worker_pb2.WORKER_STATE_SERVING

    @property
    def num_idle_violations(self) -> int:
        """Times that an idle worker held what it should not (design §3.1); 0 unless there is a bug."""
        return self._idle_check.num_violations

    # --- putting together ----------------------------------------------------------------------

    def _open_engine(self) -> Engine:
        config = self.config
        return Engine.open(
            config.model_dir,
            EngineOptions(
                precision=config.precision,
                kv_dtype=config.kv_dtype,
                max_context=config.max_context,
                chunk_tokens=config.chunk_tokens,
                max_sequences=config.max_sequences,
                kv_bytes=config.kv_bytes,
                num_threads=config.num_threads,
                device=config.device,
            ),
        )

    async def _start_services(self) -> None:
        for factory in self._factories:
            table = LeaseTable(self.epoch, time.monotonic, secrets.token_bytes)
            self._keepers.append(LeaseKeeper(table, self.engine, self.config.lease_ttl_s))
            if factory.receives_kv:
                self._open_kv_server(self._keepers[-1])
        for factory, keeper in zip(self._factories, self._keepers, strict=True):
            self._services.append(factory(self._context(keeper)))
        self._idle_check = IdleCheck(self.engine, self._keepers, self._services)
        await self._open_control_server()
        for service in self._services:
            self._started.push_async_callback(service.close)
        self._state = worker_pb2.WORKER_STATE_SERVING
        await self._control.set_healthy(True)
        self._join()
        self._start_timer(SWEEP_INTERVAL_S, self._sweep)
        self._start_timer(self.config.report_interval_s, self._session.broadcast_report)

    def _open_kv_server(self, keeper: LeaseKeeper) -> None:
        config = self.config
        pace = LandingPace(lambda: self._engine_thread.counters.decoding)
        server = KvServer(keeper, self.engine, config.host, config.kv_port, config.cluster_secret, pace)
        self.kv_address = join_address(config.host, server.port)
        server.start()
        self._kv_server = server

    async def _open_control_server(self) -> None:
        config = self.config
        self._session = SessionServicer(self.hello, self.report, config.resume_grace_s, self._services)
        self._control = ControlServer(self._session, config.host, config.port, config.cluster_secret)
        self.address = join_address(config.host, self._control.port)
        self._started.push_async_callback(self._control.stop, STOP_GRACE_S)
        self._started.callback(self._session.close)
        await self._control.start()

    def _context(self, keeper: LeaseKeeper) -> WorkerContext:
        return WorkerContext(
            config=self.config,
            epoch=self.epoch,
            identity=self._identity,
            kv_address=self.kv_address,
            engine=self.engine,
            tokenizer=self._tokenizer,
            leases=keeper,
            loop=self._loop.loop,
            wake_engine=self._engine_thread.wake,
            accepts_new=lambda: self.healthy,
            changed=self._report_soon,
            clock=time.monotonic,
            root_key=self._root_key,
        )

    def _root_key(self, tenant: str) -> bytes:
        return root_key(self._key_identity, "", tenant_secret(self.config.cluster_secret, tenant))

    def _join(self) -> None:
        announcement = cluster_pb2.RegisterRequest(
            worker_id=self.config.worker_id, epoch=self.epoch, address=self.address
        )
        metadata = cluster_metadata(self.config.cluster_secret)
        membership = Membership(self.config.routers, announcement, metadata, self._session.connected)
        membership.start()
        self._started.push_async_callback(membership.stop)

    # --- the engine's thread speaks (worker.engine_thread.EngineListener) ----------------------

    def on_step(self, result: StepResult) -> None:
        """Hand a step's events to the roles, on the service loop."""
        if result.events:
            self._loop.loop.call_soon_threadsafe(self._deliver, result)

    def on_engine_failed(self, lease_ids: Sequence[bytes], message: str, healthy: bool) -> None:
        """End the requests that were in the engine; without a healthy engine, stop taking new ones."""
        self._loop.loop.call_soon_threadsafe(self._engine_failed, lease_ids, message, healthy)

    def on_idle(self) -> None:
        """Check that an idle worker holds nothing."""
        if self._services:
            self._loop.loop.call_soon_threadsafe(self._idle_check.run)

    def _deliver(self, result: StepResult) -> None:
        for service in self._services:
            service.on_step(result)

    def _engine_failed(self, lease_ids: Sequence[bytes], message: str, healthy: bool) -> None:
        for service in self._services:
            service.on_engine_failed(lease_ids if healthy else None, message)
        if not healthy:
            logger.error("the engine failed repeatedly: no more requests are taken")
            self._state = worker_pb2.WORKER_STATE_GONE
            unhealthy = asyncio.ensure_future(self._control.set_healthy(False))
            self._started.callback(unhealthy.cancel)

    # --- timers --------------------------------------------------------------------------------

    def _sweep(self) -> None:
        for keeper in self._keepers:
            keeper.sweep()

    def _report_soon(self) -> None:
        if not self._report_due:
            self._report_due = True
            self._loop.loop.call_later(REPORT_DELAY_S, self._report_now)

    def _report_now(self) -> None:
        self._report_due = False
        self._session.broadcast_report()

    def _start_timer(self, interval_s: float, action: Callable[[], None]) -> None:
        async def run() -> None:
            while True:
                await asyncio.sleep(interval_s)
                try:
                    action()
                except Exception:
                    # Leases must go on expiring, and reports going out, whatever one round met.
                    logger.exception("a periodic action failed")

        self._started.callback(asyncio.ensure_future(run()).cancel)
