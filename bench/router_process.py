"""One process of `headrace bench router`: `python -m bench.router_process FILE`.

The file is a pickled `RouterSettings`, `WorkersSettings` or `ClientsSettings`, written by the benchmark
itself. Says where it is reached, obeys lines of JSON with a line of JSON each, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import logging.handlers
import pickle
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import router_direct, router_worker
from bench.router_load import Clients, Load
from bench.router_settings import ByteTokenizer, ClientsSettings, RouterSettings, WorkersSettings
from bench.router_steps import StepClock
from bench.router_worker import MockCache, MockWorker
from cluster import garbage
from headrace.v1 import cluster_pb2, cluster_pb2_grpc, worker_pb2
from kvtransfer.cluster_token import CLUSTER_METADATA_KEY, cluster_token
from kvtransfer.direct_ticket import TicketDesk
from router.server import RouterServer
from worker.direct import DirectServer

JOIN_S = 15.0
LOG_BYTES = 32 << 20
_SERVING = health_pb2.HealthCheckResponse.SERVING


def main() -> None:
    """Serve until the input ends."""
    settings = pickle.loads(Path(sys.argv[1]).read_bytes())
    match settings:
        case RouterSettings():
            asyncio.run(_route(settings))
        case WorkersSettings():
            asyncio.run(_work(settings))
        case ClientsSettings():
            asyncio.run(_ask(settings))
        case _:
            raise TypeError(
                f"{sys.argv[1]} holds a {type(settings).__name__}, which is no process's settings"
            )


async def _route(settings: RouterSettings) -> None:
    _log_as_a_cluster_does(settings.log_file)
    tokenizer = None if settings.has_tokenizer else ByteTokenizer()
    server = RouterServer(settings.config, tokenizer=tokenizer, model=settings.facts)
    await server.start()
    garbage.settle()
    _say(address=server.address)
    await _obey({})
    await server.stop()


async def _work(settings: WorkersSettings) -> None:
    clock = StepClock()
    workers: dict[str, MockWorker] = {}
    roles = [worker_pb2.ROLE_PREFILL] * settings.num_prefill + [worker_pb2.ROLE_DECODE] * settings.num_decode
    for number, role in enumerate(roles):
        hello = router_worker.hello_of(f"w{number}", role, settings.tokenizer_digest, settings.vocab_size)
        workers[hello.kv_address] = MockWorker(hello, MockCache(settings.cluster_secret), clock, workers)
    direct_servers = [await _serve_directly(worker, settings.cluster_secret) for worker in workers.values()]
    servers = [await router_worker.serve(worker) for worker in workers.values()]
    direct, address = await router_direct.serve(clock)
    async with grpc.aio.insecure_channel(settings.router) as channel:
        for worker, (_, worker_address) in zip(workers.values(), servers, strict=True):
            await _join(channel, worker, worker_address, settings.cluster_secret)
        await _until_ready(channel)
    _say(address=address)

    async def pace(step_s: float) -> dict[str, Any]:
        clock.set_pace(step_s)
        return {}

    async def count() -> dict[str, Any]:
        return {worker.hello.worker_id: worker.num_prefilled_here for worker in workers.values()}

    async def streamed() -> dict[str, Any]:
        return {"num_streams": sum(worker.num_streamed_directly for worker in workers.values())}

    await _obey({"pace": pace, "count": count, "streamed": streamed})
    for direct_server in direct_servers:
        await direct_server.stop(0)
    for server in (direct, *(server for server, _ in servers)):
        await server.stop(0)


async def _serve_directly(worker: MockWorker, secret: bytes) -> DirectServer:
    """A worker's port for clients, of which its hello tells."""
    epoch = worker.hello.epoch
    server = DirectServer("127.0.0.1", 0, TicketDesk(secret, time.time), lambda: epoch)
    server.on_redeemed = worker.open_direct
    worker.hello.direct_address = server.address
    await server.start()
    return server


async def _join(channel: grpc.aio.Channel, worker: MockWorker, address: str, secret: bytes) -> None:
    stub = cluster_pb2_grpc.ClusterStub(channel)
    request = cluster_pb2.RegisterRequest(
        worker_id=worker.hello.worker_id, epoch=worker.hello.epoch, address=address
    )
    async with asyncio.timeout(JOIN_S):
        token = (CLUSTER_METADATA_KEY, cluster_token(secret))
        while not (await stub.Register(request, metadata=(token,), wait_for_ready=True)).connected:
            await asyncio.sleep(0.05)


async def _until_ready(channel: grpc.aio.Channel) -> None:
    """The router may try workers out before it places anything on them."""
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(JOIN_S):
        while (await stub.Check(health_pb2.HealthCheckRequest())).status != _SERVING:
            await asyncio.sleep(0.05)


async def _ask(settings: ClientsSettings) -> None:
    clients = Clients(settings.targets)
    _say(address="")

    async def begin(**load: Any) -> dict[str, Any]:
        clients.begin(Load(**load))
        return {}

    async def look() -> dict[str, Any]:
        return clients.look()

    async def end() -> dict[str, Any]:
        await clients.end()
        return {}

    await _obey({"begin": begin, "look": look, "end": end})
    await clients.close()


async def _obey(commands: dict[str, Callable[..., Awaitable[dict[str, Any]]]]) -> None:
    """Each command's answer, until the input ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        arguments = json.loads(line)
        _say(**await commands[arguments.pop("do")](**arguments))


def _log_as_a_cluster_does(file: Path) -> None:
    """What a router writes down is part of its weight."""
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
