"""A worker, put together: engine thread, service loop, servers, roles, membership.

`WorkerNode(config, services).start()` returns when routers can dial it. The services of the worker's role
(`PrefillService`, `DecodeService` or both) are handed in, because this package knows neither.
A node takes its process over where cores are given: threads are moved (worker/affinity.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from engine.engine import Engine
from engine.events import StepResult
from engine.runner import EngineOptions
from headrace.v1 import cluster_pb2, worker_pb2
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.direct_ticket import TicketDesk
from kvtransfer.keys import root_key, tenant_secret
from kvtransfer.leases import LeaseTable
from text.tokenizer import Tokenizer
from worker.affinity import pin_process
from worker.block_journal import BlockJournal
from worker.config import WorkerConfig
from worker.direct import DirectServer
from worker.engine_thread import EngineThread
from worker.facts import identity_digest, worker_hello, worker_identity, worker_report
from worker.fencing import FenceWatch, running_s
from worker.idle_check import IdleCheck
from worker.kv import KvParts, KvServer
from worker.leasing import LeaseKeeper
from worker.lifecycle import Held, Lifecycle
from worker.membership import Membership
from worker.pacing import LandingPace
from worker.prefixes import PrefixFetcher
from worker.servers import ControlServer, join_address
from worker.service import RoleService, ServiceFactory, WorkerContext
from worker.service_loop import ServiceLoop
from worker.session import SessionServicer
from worker.write_back import WriteBack

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
STOP_GRACE_S = 0.5
SWEEP_INTERVAL_S = 0.1
REPORT_DELAY_S = 0.01
FENCED = "FENCED"
DRAINED = "DRAINED"


class WorkerNode:
    """One worker. `start` and `stop` are called once each, from one thread.

    `clock`: what leases and transfers are timed by. `running_clock`: one that goes on while the machine is suspended,
    by which the worker fences itself.
    """

    def __init__(
        self,
        config: WorkerConfig,
        services: Sequence[ServiceFactory],
        *,
        clock: Callable[[], float] = time.monotonic,
        running_clock: Callable[[], float] = running_s,
    ) -> None:
        self.config = config
        self._clock = clock
        self._running_clock = running_clock
        self.epoch = _new_epoch()
        """This incarnation of the worker; another one after it has fenced itself."""
        self.address = ""
        """host:port of the Worker service, once started."""
        self.kv_address = ""
        """host:port of KvTransfer and the bulk service, once started."""
        self.direct_address = ""
        """host:port where clients read answers, once started; empty where they do not."""
        self.engine: Engine
        """The engine, once started; for tests and tools in the same process."""
        self.kv: KvParts
        """What its KV transfers share, once started; for the same."""
        self._factories = tuple(services)
        self._services: list[RoleService] = []
        self._keepers: list[LeaseKeeper] = []
        self._fetchers: list[PrefixFetcher] = []
        self._idle_check: IdleCheck | None = None
        self._journal = BlockJournal()
        self._lifecycle = Lifecycle(clock)
        self._told_state = self._lifecycle.state
        self._gone = threading.Event()
        self._report_due = False
        self._loop = ServiceLoop()
        self._engine_thread = EngineThread(self._open_engine, self, config.cpus)
        self._kv_server: KvServer | None = None
        self._direct: DirectServer | None = None
        self._write_back: WriteBack | None = None
        self._membership: Membership | None = None
        self._telling: asyncio.Task[None] | None = None  # health checks; the loop itself keeps no task alive
        self._leaving: asyncio.Task[None] | None = None
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
            pool = self.engine.pool
            pool.on_named, pool.on_forgotten = self._journal.named, self._journal.forgotten
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
        self._lifecycle.close()
        if self._loop.is_running:
            self._loop.run(self._started.aclose(), STOP_TIMEOUT_S)
        if self._write_back is not None:
            self._write_back.stop(STOP_GRACE_S)
        if self._kv_server is not None:
            self._kv_server.stop(STOP_GRACE_S)
            self.kv.close()
        self._engine_thread.stop()
        self._loop.stop()

    def terminate(self, hand_back_after_s: float) -> None:
        """Begin to leave: finish what is here, hand back what still runs after that many seconds, serve cached blocks
        for a moment, go. Any thread, a signal's handler too; returns at once."""
        self._loop.loop.call_soon_threadsafe(self._terminate, hand_back_after_s)

    def wait_until_gone(self, timeout_s: float | None = None) -> bool:
        """Wait until the worker has left, by `terminate` or because a router passed that on; then `stop` it.
        False where `timeout_s` passed before."""
        return self._gone.wait(timeout_s)

    @property
    def is_retired(self) -> bool:
        """Whether an operator had the worker leave for good: its process shall not be started again."""
        return self._lifecycle.is_retired

    def hello(self) -> worker_pb2.WorkerHello:
        """What routers are told of this worker."""
        return worker_hello(
            self.config,
            self.engine,
            self.epoch,
            self._identity,
            self.kv_address,
            self._lifecycle.state,
            self.direct_address,
        )

    def report(self) -> worker_pb2.WorkerReport:
        """Load and room of now."""
        counters = [keeper.counters for keeper in self._keepers]
        return worker_report(
            self.engine,
            self._engine_thread.counters,
            self._lifecycle.state,
            num_leases=sum(keeper.num_live for keeper in self._keepers),
            refused_stale=sum(counter.stale for counter in counters),
            kv=self._kv_report(),
            speeds=self.kv.speeds,
        )

    def _kv_report(self) -> worker_pb2.KvReport:
        report = self.kv.counters.report()
        if self._write_back is not None:
            report.write_backs_dropped = self._write_back.num_dropped
        return report

    @property
    def healthy(self) -> bool:
        """Whether the worker takes requests."""
        return self._lifecycle.state == worker_pb2.WORKER_STATE_SERVING

    @property
    def num_idle_violations(self) -> int:
        """Times that an idle worker held what it should not (design §3.1); 0 unless there is a bug."""
        return 0 if self._idle_check is None else self._idle_check.num_violations

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
                max_drafts=config.max_drafts,
                itl_s=config.itl_s,
                set_aside_bytes=config.set_aside_bytes,
                window_records=config.window_records,
                kv_bytes=config.kv_bytes,
                num_threads=config.num_threads,
                device=config.device,
                tenant_share=config.tenant_share,
            ),
        )

    async def _start_services(self) -> None:
        for _ in self._factories:
            table = LeaseTable(self.epoch, self._clock, secrets.token_bytes)
            self._keepers.append(LeaseKeeper(table, self.engine, self.config.lease_ttl_s))
        self._open_kv()
        await self._open_direct()
        for factory, keeper in zip(self._factories, self._keepers, strict=True):
            self._services.append(factory(self._context(keeper)))
        self._idle_check = IdleCheck(self.engine, self._keepers, self._services, self._is_moving)
        await self._open_control_server()
        for service in self._services:
            self._started.push_async_callback(service.close)
        self._lifecycle.serve()
        self._told_state = self._lifecycle.state
        await self._control.set_healthy(True)
        self._join()
        self._fence_watch = FenceWatch(
            self.config.dead_after_s, self._running_clock, has_routers=bool(self.config.routers)
        )
        self._start_timer(SWEEP_INTERVAL_S, self._sweep)
        self._start_timer(self.config.report_interval_s, self._session.broadcast_report)

    def _open_kv(self) -> None:
        """The port for KV. Pushes go to the leases of the role that takes them, where there is one."""
        pace = LandingPace(lambda: self._engine_thread.counters.decoding)
        self.kv = KvParts(self.engine, self.config, pace, self._clock)
        pairs = list(zip(self._factories, self._keepers, strict=True))
        receiving = next((keeper for factory, keeper in pairs if factory.receives_kv), self._keepers[0])
        try:
            self._kv_server = KvServer(self.kv, receiving, lambda: self.epoch)
        except BaseException:
            self.kv.close()
            raise
        self.kv_address = join_address(self.config.host, self._kv_server.port)
        self._kv_server.start()
        if self.kv.store is not None:
            self._write_back = WriteBack(self.kv, self.kv.store, self.engine.has_work, lambda: self.epoch)
            for keeper in self._keepers:
                keeper.on_cached = self._write_back.note
            self._write_back.start()

    async def _open_direct(self) -> None:
        """The port for clients, where this worker has one."""
        config = self.config
        if config.direct_port is None or not config.role.decodes:
            return
        desk = TicketDesk(config.cluster_secret, time.time)
        self._direct = DirectServer(config.host, config.direct_port, desk, lambda: self.epoch)
        self.direct_address = self._direct.address
        self._started.push_async_callback(self._direct.stop, STOP_GRACE_S)
        await self._direct.start()

    def _is_moving(self) -> bool:
        writing = self._write_back is not None and self._write_back.is_writing
        serving = self._kv_server is not None and self._kv_server.num_fetches > 0
        return writing or serving or any(fetcher.num_open for fetcher in self._fetchers)

    async def _open_control_server(self) -> None:
        config = self.config
        self._session = SessionServicer(
            self.hello, self.report, config.resume_grace_s, self._services, self._journal, self._ask
        )
        self._control = ControlServer(self._session, config.host, config.port, config.cluster_secret)
        self.address = join_address(config.host, self._control.port)
        self._started.push_async_callback(self._control.stop, STOP_GRACE_S)
        self._started.callback(self._session.close)
        await self._control.start()

    def _context(self, keeper: LeaseKeeper) -> WorkerContext:
        self._fetchers.append(PrefixFetcher(self.kv, keeper, lambda: self.epoch, self._loop.loop))
        return WorkerContext(
            config=self.config,
            current_epoch=lambda: self.epoch,
            identity=self._identity,
            kv_address=self.kv_address,
            engine=self.engine,
            tokenizer=self._tokenizer,
            leases=keeper,
            kv=self.kv,
            prefixes=self._fetchers[-1],
            loop=self._loop.loop,
            wake_engine=self._engine_thread.wake,
            accepts_new=lambda: self.healthy,
            changed=self._report_soon,
            clock=self._clock,
            root_key=self._root_key,
            direct=self._direct,
        )

    def _root_key(self, tenant: str) -> bytes:
        return root_key(self._key_identity, "", tenant_secret(self.config.cluster_secret, tenant))

    def _join(self) -> None:
        metadata = cluster_metadata(self.config.cluster_secret)
        self._membership = Membership(
            self.config.routers, self._announcement, metadata, self._session.connected
        )
        self._membership.start()
        self._started.push_async_callback(self._membership.stop)

    def _announcement(self) -> cluster_pb2.RegisterRequest:
        return cluster_pb2.RegisterRequest(
            worker_id=self.config.worker_id, epoch=self.epoch, address=self.address
        )

    # --- the engine's thread speaks (worker.engine_thread.EngineListener) ----------------------

    def on_step(self, result: StepResult) -> None:
        """Hand a step's events to the roles, on the service loop."""
        if result.prefill_s:
            self.kv.speeds.note_prefill(result.num_prefill_tokens, result.prefill_s)
        if result.events:
            self._loop.loop.call_soon_threadsafe(self._deliver, result)

    def on_engine_failed(self, lease_ids: Sequence[bytes], message: str, healthy: bool) -> None:
        """End the requests that were in the engine; without a healthy engine, stop taking new ones."""
        self._loop.loop.call_soon_threadsafe(self._engine_failed, lease_ids, message, healthy)

    def on_idle(self) -> None:
        """Check that an idle worker holds nothing."""
        if self._idle_check is not None:
            self._loop.loop.call_soon_threadsafe(self._idle_check.run)

    def _deliver(self, result: StepResult) -> None:
        for service in self._services:
            service.on_step(result)

    def _engine_failed(self, lease_ids: Sequence[bytes], message: str, healthy: bool) -> None:
        for service in self._services:
            service.on_engine_failed(lease_ids if healthy else None, message)
        if not healthy:
            logger.error("the engine failed repeatedly: no more requests are taken")
            self._lifecycle.close()
            self._move_on()

    # --- leaving (worker/lifecycle.py) ---------------------------------------------------------

    def _ask(self, wanted: worker_pb2.WorkerState) -> None:
        self._lifecycle.ask(wanted)
        self._move_on()

    def _terminate(self, hand_back_after_s: float) -> None:
        self._lifecycle.terminate(hand_back_after_s)
        self._move_on()

    def _move_on(self) -> None:
        """Look whether the next state is reached, and tell of it."""
        if self._lifecycle.look(self._held()):
            for keeper in self._keepers:
                keeper.end_all(DRAINED)
        if self._lifecycle.state != self._told_state:
            self._told_state = self._lifecycle.state
            logger.info(
                "worker %s is %s", self.config.worker_id, worker_pb2.WorkerState.Name(self._told_state)
            )
            self._report_soon()
            self._telling = asyncio.ensure_future(self._control.set_healthy(self.healthy))
        if self._lifecycle.is_over and self._leaving is None:
            self._leaving = asyncio.ensure_future(self._leave())

    def _held(self) -> Held:
        is_behind = self._write_back is not None and self._write_back.is_behind
        return Held(
            num_requests=sum(service.num_requests for service in self._services),
            is_moving=is_behind or self._is_moving(),
        )

    async def _leave(self) -> None:
        """End the sessions with the word that the worker is gone, and announce it no more."""
        if self._membership is not None:
            await self._membership.stop()
        self._session.broadcast_report()
        self._session.close()
        self._gone.set()

    # --- timers --------------------------------------------------------------------------------

    def _sweep(self) -> None:
        reason = self._fence_watch.ask(in_touch=self._session.take_contact())
        if reason is not None:
            self._fence(reason)
        for keeper in self._keepers:
            keeper.sweep()
        self._move_on()

    def _fence(self, reason: str) -> None:
        """Drop every lease and every session, and rejoin as a new incarnation (design §3.3)."""
        with self.engine.lock:
            old, self.epoch = self.epoch, _new_epoch()
            for keeper in self._keepers:
                keeper.fence(self.epoch)
        logger.warning("fenced: %s; incarnation %x is now %x", reason, old, self.epoch)
        # Behind the failures of the requests, which the ended leases have just queued on this loop.
        self._loop.loop.call_soon(self._session.drop_all, FENCED)

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


def _new_epoch() -> int:
    return secrets.randbits(64) or 1  # 0 means none on the wire
