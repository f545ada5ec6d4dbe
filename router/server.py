"""A router process: everything put together, started and stopped."""

import asyncio
import ipaddress
import logging
import secrets
import signal

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headrace.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.auth import ApiKeys, Authenticator, OpenDoor, cluster_token
from router.book import RequestBook
from router.cluster_service import ClusterServicer
from router.config import ModelFacts, RouterConfig, Tokenizer
from router.core.failures import Code, Failure, Stage
from router.core.placement import POLICIES, PlacementState
from router.core.queue import TokenQueue
from router.dispatcher import Dispatcher
from router.errors import Boundary
from router.front import InferenceServicer
from router.intake import Intake
from router.membership import Membership, Switchboard
from router.requests import RequestKey
from router.workers import LinkSettings

logger = logging.getLogger(__name__)

MAX_RECEIVE_BYTES = 32 << 20  # enough to refuse a 10 MiB prompt in words
SWEEP_S = 0.25
STOP_GRACE_S = 1.0

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.so_reuseport", 0),
    # Find clients that vanished without a word, and let clients look for us as often.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


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
        self._config = config
        self._tokenizer = tokenizer if tokenizer is not None else _open_tokenizer(config)
        self._model = model if model is not None else ModelFacts.read(config)
        self._authenticator = authenticator or _authenticator(config)
        self.epoch = secrets.randbits(64)
        self.port = 0

    @property
    def address(self) -> str:
        """host:port as clients and workers dial it."""
        return f"{_host(self._config.listen)}:{self.port}"

    async def start(self) -> None:
        """Begins to serve.

        Raises:
            RuntimeError: the address cannot be listened on.
        """
        self._assemble()
        self._server = grpc.aio.server(
            interceptors=(Boundary(),), options=_OPTIONS, maximum_concurrent_rpcs=self._config.max_calls
        )
        self._add_services(self._server)
        self.port = self._server.add_insecure_port(self._config.listen)
        await self._set_health(False)
        await self._health.set(_CLUSTER, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._chores = [
            asyncio.create_task(self._sweep(), name="router sweep"),
            asyncio.create_task(self._watch_readiness(), name="router readiness"),
        ]
        logger.info("router %s serves %s on %s", self._config.router_id, self._model.name, self.address)

    async def stop(self) -> None:
        """Ends every request, says so to its clients and workers, and closes."""
        await self._health.enter_graceful_shutdown()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await self._intake.close()
        self._book.end_all(
            Failure(
                code=Code.UNAVAILABLE,
                stage=Stage.ADMISSION,
                cause="SHUTTING_DOWN",
                message="the router is stopping",
                retryable=True,
            )
        )
        await self._membership.close()
        await self._server.stop(STOP_GRACE_S)
        logger.info("router %s stopped", self._config.router_id)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()

    def _assemble(self) -> None:
        config = self._config
        loop = asyncio.get_running_loop()
        limits = self._model.limits(self._tokenizer.vocab_size)
        self._readiness_changed = asyncio.Event()
        self._placement: PlacementState[RequestKey] = PlacementState(
            POLICIES[config.policy], config.prefill_window_tokens
        )
        switchboard = Switchboard()
        self._book = RequestBook(config, loop.time, loop.call_later)
        queue: TokenQueue[RequestKey] = TokenQueue(config.queue_tokens)
        dispatcher = Dispatcher(self._book, queue, self._placement, switchboard, loop.time, loop.call_later)
        settings = LinkSettings(
            router_id=config.router_id,
            router_epoch=self.epoch,
            token=cluster_token(config.cluster_secret),
            grace_s=config.link_grace_s,
        )
        self._dispatcher = dispatcher
        self._membership = Membership(
            settings,
            switchboard,
            self._placement,
            dispatcher,
            self._tokenizer.digest,
            loop.time,
            self._readiness_changed.set,
        )
        self._intake = Intake(config, limits, self._tokenizer, self._book, dispatcher, loop.time)
        self._inference = InferenceServicer(
            self._authenticator, self._intake, self._book, self._model, limits
        )
        self._cluster = ClusterServicer(
            config,
            self.epoch,
            self._model,
            self._authenticator,
            self._membership,
            self._book,
            queue,
            loop.time,
        )
        self._health = health.aio.HealthServicer()

    def _add_services(self, server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        cluster_pb2_grpc.add_ClusterServicer_to_server(self._cluster, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if is_loopback(_host(self._config.listen)):
            names = (_INFERENCE, _CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._book.sweep()
            self._dispatcher.pump()

    async def _watch_readiness(self) -> None:
        while True:
            await self._readiness_changed.wait()
            self._readiness_changed.clear()
            await self._set_health(self._placement.is_complete)

    async def _set_health(self, is_ready: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_ready else statuses.NOT_SERVING
        for service in ("", _INFERENCE):
            await self._health.set(service, status)


def run(config: RouterConfig) -> None:
    """Serves until SIGTERM or SIGINT; blocks.

    Raises:
        ValueError, RuntimeError: as `RouterServer` and its `start`.
    """
    asyncio.run(_serve(config))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(config: RouterConfig) -> None:
    server = RouterServer(config)
    await server.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    await server.stop()


def _open_tokenizer(config: RouterConfig) -> Tokenizer:
    from text.tokenizer import Tokenizer as ModelTokenizer

    return ModelTokenizer.open(config.model_dir)


def _authenticator(config: RouterConfig) -> Authenticator:
    return ApiKeys(config.api_keys) if config.api_keys else OpenDoor()


def _host(listen: str) -> str:
    return listen.rpartition(":")[0]
