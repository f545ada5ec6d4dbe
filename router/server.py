"""A router process: everything put together, started and stopped."""

import asyncio
import ipaddress
import logging
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from kvtransfer.cluster_token import cluster_token
from router.attempts import Attempts
from router.auth import ApiKeys, Authenticator, OpenDoor
from router.book import RequestBook
from router.cluster_service import ClusterServicer
from router.config import ModelFacts, RouterConfig, Tokenizer
from router.core.canary import Canaries
from router.core.failures import Code, Failure, Stage
from router.core.index_feed import IndexFeed
from router.core.placement import POLICIES, PlacementState
from router.core.queue import TokenQueue
from router.core.shedding import Shedder
from router.core.tenants import TenantLimits
from router.core.warm_up import warm_up
from router.direct import DirectSources
from router.dispatcher import Dispatcher
from router.errors import guarded
from router.front import InferenceServicer
from router.gate import Gate
from router.intake import Intake
from router.membership import Membership, Switchboard
from router.placer import Placer
from router.prompt_keys import KeyRoots
from router.requests import RequestKey
from router.resume import ResumeHandles
from router.workers import LinkSettings
from rpc.reflection import REFLECTION_SERVICE, add_reflection
from rpc.server import Server, ServerSettings
from text.tokenizer import Tokenizer as ModelTokenizer

logger = logging.getLogger(__name__)

MAX_RECEIVE_BYTES = 32 << 20  # enough to refuse a 10 MiB prompt in words
SWEEP_S = 0.25
STOP_GRACE_S = 1.0
KEEPALIVE_S = 10.0  # finds clients that vanished without a word

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name

_REFLECTED = (_INFERENCE, _CLUSTER, health.SERVICE_NAME, REFLECTION_SERVICE)
_SHUTTING_DOWN = Failure(
    code=Code.UNAVAILABLE,
    stage=Stage.ADMISSION,
    cause="SHUTTING_DOWN",
    message="the router is stopping",
    retryable=True,
)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a running router is made of."""

    book: RequestBook
    placement: PlacementState[RequestKey]
    dispatcher: Dispatcher
    membership: Membership
    intake: Intake
    health: health.aio.HealthServicer
    server: Server
    readiness_changed: asyncio.Event


class RouterServer:
    """One router. `start` and `stop` belong to one event loop, which does all of the router's work."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        tokenizer: Tokenizer | None = None,
        model: ModelFacts | None = None,
        authenticator: Authenticator | None = None,
    ) -> None:
        """What is not given is opened from `config.model_dir` and made from `config.api_keys`.

        Raises:
            ValueError: the model directory is not one that `headrace model prepare` wrote.
        """
        warm_up()
        self._config = config
        self._tokenizer = tokenizer if tokenizer is not None else ModelTokenizer.open(config.model_dir)
        self._model = model if model is not None else ModelFacts.read(config)
        self._authenticator = authenticator or _authenticator(config)
        self._parts: _Parts | None = None
        self._chores: list[asyncio.Task[None]] = []
        self.epoch = secrets.randbits(64)
        self.port = 0

    @property
    def address(self) -> str:
        """host:port as clients and workers dial it."""
        return f"{_host(self._config.listen)}:{self.port}"

    async def start(self) -> None:
        """Begins to serve.

        Raises:
            RuntimeError: the address cannot be listened on, or the router was started before.
        """
        if self._parts is not None:
            raise RuntimeError("a router is started once")
        self._parts = parts = self._assemble()
        self.port = parts.server.add_insecure_port(self._config.listen)
        await parts.health.set(_CLUSTER, health_pb2.HealthCheckResponse.SERVING)
        await _set_readiness(parts)
        await parts.server.start()
        self._chores = [
            asyncio.create_task(_sweep(parts), name="router sweep"),
            asyncio.create_task(_watch_readiness(parts), name="router readiness"),
        ]
        logger.info("router %s serves %s on %s", self._config.router_id, self._model.name, self.address)

    async def stop(self) -> None:
        """Ends every request, says so to its clients and workers, and closes. Repeats change nothing."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        await parts.health.enter_graceful_shutdown()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await parts.intake.close()
        parts.book.end_all(_SHUTTING_DOWN)
        await parts.membership.close()
        await parts.server.stop(STOP_GRACE_S)
        logger.info("router %s stopped", self._config.router_id)

    def _assemble(self) -> _Parts:
        config, loop = self._config, asyncio.get_running_loop()
        book = RequestBook(config, loop.time, loop.call_later)
        placement = _placement(config)
        queue: TokenQueue[RequestKey] = TokenQueue(config.queue_tokens)
        switchboard = Switchboard()
        feed = IndexFeed()
        placer = Placer(placement, feed, KeyRoots(config.cluster_secret), loop.time)
        gate = Gate(queue, TenantLimits(config.tenants), Shedder(config.slo_ttft_s), placer, loop.time)
        handles = ResumeHandles(config.cluster_secret)
        attempts = Attempts(book, queue, placer, switchboard, loop.time)
        direct = DirectSources(config.cluster_secret, time.time) if config.streaming == "direct" else None
        dispatcher = Dispatcher(
            book, queue, gate, placer, attempts, switchboard, handles, loop.time, loop.call_later, direct
        )
        readiness_changed = asyncio.Event()
        membership = self._membership(switchboard, placement, dispatcher, feed, readiness_changed.set, direct)
        limits = self._model.limits(self._tokenizer.vocab_size)
        intake = Intake(config, limits, self._tokenizer, book, dispatcher, handles, loop.time)
        health_servicer = health.aio.HealthServicer()
        server = _grpc_server(
            config,
            InferenceServicer(self._authenticator, intake, book, self._model, limits),
            ClusterServicer(
                config,
                self.epoch,
                self._model,
                self._authenticator,
                membership,
                book,
                queue,
                attempts.retries,
                feed,
                loop.time,
            ),
            health_servicer,
        )
        return _Parts(
            book, placement, dispatcher, membership, intake, health_servicer, server, readiness_changed
        )

    def _membership(
        self,
        switchboard: Switchboard,
        placement: PlacementState[RequestKey],
        dispatcher: Dispatcher,
        feed: IndexFeed,
        on_change: Callable[[], None],
        direct: DirectSources | None,
    ) -> Membership:
        config = self._config
        settings = LinkSettings(
            router_id=config.router_id,
            router_epoch=self.epoch,
            token=cluster_token(config.cluster_secret),
            grace_s=config.link_grace_s,
        )
        clock = asyncio.get_running_loop().time
        return Membership(
            settings,
            switchboard,
            placement,
            dispatcher,
            feed,
            Canaries(config.canary_timeout_s, Random(self.epoch), config.fidelity),
            self._tokenizer.digest,
            clock,
            on_change,
            direct,
        )


def _grpc_server(
    config: RouterConfig,
    inference: InferenceServicer,
    cluster: ClusterServicer,
    health_servicer: health.aio.HealthServicer,
) -> Server:
    settings = ServerSettings(
        max_message_bytes=MAX_RECEIVE_BYTES, max_calls=config.max_calls, keepalive_s=KEEPALIVE_S
    )
    server = Server(settings, guarded)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(cluster, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if is_loopback(_host(config.listen)):
        add_reflection(_REFLECTED, server)
    return server


async def _sweep(parts: _Parts) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        parts.book.sweep()
        parts.membership.sweep()
        parts.dispatcher.pump()


async def _watch_readiness(parts: _Parts) -> None:
    while True:
        await parts.readiness_changed.wait()
        parts.readiness_changed.clear()
        await _set_readiness(parts)


async def _set_readiness(parts: _Parts) -> None:
    statuses = health_pb2.HealthCheckResponse
    status = statuses.SERVING if parts.placement.is_complete else statuses.NOT_SERVING
    for service in ("", _INFERENCE):
        await parts.health.set(service, status)


def run(config: RouterConfig) -> None:
    """Serves until SIGTERM or SIGINT; blocks.

    Raises:
        ValueError, RuntimeError: as `RouterServer` and its `start`.
    """
    asyncio.run(serve(config))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(config: RouterConfig) -> None:
    """Serves until SIGTERM or SIGINT, on the main thread's event loop."""
    server = RouterServer(config)
    await server.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    await server.stop()


def _placement(config: RouterConfig) -> PlacementState[RequestKey]:
    objectives = {"slo_ttft_s": config.slo_ttft_s, "slo_itl_s": config.slo_itl_s}
    given = {name: value for name, value in objectives.items() if value is not None}
    return PlacementState(POLICIES[config.policy], config.prefill_window_tokens, **given)


def _authenticator(config: RouterConfig) -> Authenticator:
    return ApiKeys(config.api_keys) if config.api_keys else OpenDoor()


def _host(listen: str) -> str:
    return listen.rpartition(":")[0]
