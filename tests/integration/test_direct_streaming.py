"""Answers read straight from the worker that writes them: a real router, real tiny workers, the SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from decode.direct import DirectReader
from decode.service import DecodeService
from headrace import AsyncClient, Client, Delta
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc
from router.config import RouterConfig
from router.server import RouterServer
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import SECRET, StepGate, start_worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

PROMPT = list(range(5, 45))
NUM_TOKENS = 60
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Place:
    """A router and the workers that joined it."""

    def __init__(self, server: RouterServer, model_dir: Path) -> None:
        self.server = server
        self.nodes: list[WorkerNode] = []
        self._model_dir = model_dir

    async def worker(self, name: str) -> WorkerNode:
        """One that does both, registered."""
        node = await asyncio.to_thread(
            start_worker,
            self._model_dir,
            WorkerRole.BOTH,
            worker_id=name,
            routers=(self.server.address,),
            direct_port=0,
        )
        self.nodes.append(node)
        return node


def readers(node: WorkerNode) -> list[DirectReader]:
    """Of the worker's running requests."""
    [service] = [each for each in node._services if isinstance(each, DecodeService)]
    return [reader for request in service._requests.values() for reader in request.readers]


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(model_dir: Path, streaming: str = "direct") -> AsyncIterator[Place]:
    config = RouterConfig(
        router_id="r",
        model_name="tiny",
        model_dir=model_dir,
        listen="127.0.0.1:0",
        cluster_secret=SECRET,
        max_context=512,
        canary_timeout_s=0.0,
        streaming=streaming,
        link_grace_s=0.5,
    )
    server = RouterServer(config)
    await server.start()
    place = Place(server, model_dir)
    try:
        yield place
    finally:
        await server.stop()
        for node in place.nodes:
            await asyncio.to_thread(node.stop)


async def until_served(client: AsyncClient, num_workers: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            workers = (await client.status()).workers
            if sum(each.connected and each.report.free_blocks > 0 for each in workers) == num_workers:
                return
            await asyncio.sleep(0.02)


async def read(client: AsyncClient, seed: int = 1, n: int = 1, **options: object) -> list[Delta]:
    answer = client.generate(
        PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, seed=seed, n=n, **options
    )
    deltas = [delta async for delta in answer.deltas()]
    for choice in answer.choices:
        mine = [delta for delta in deltas if delta.choice == choice.index]
        assert [t for delta in mine for t in delta.token_ids] == list(choice.token_ids)
        assert "".join(delta.text for delta in mine) == choice.text
        assert len(choice.token_ids) == NUM_TOKENS
    return deltas


def whole(deltas: list[Delta]) -> dict[int, tuple[tuple[int, ...], str]]:
    choices = sorted({delta.choice for delta in deltas})
    return {
        index: (
            tuple(t for delta in deltas if delta.choice == index for t in delta.token_ids),
            "".join(delta.text for delta in deltas if delta.choice == index),
        )
        for index in choices
    }


async def test_direct_is_relay_token_for_token(model_dir: Path) -> None:
    async with running(model_dir) as place:
        node = await place.worker("one")
        address = place.server.address
        async with AsyncClient(address) as direct, AsyncClient(address, direct=False) as relayed:
            await until_served(direct, 1)
            gate = StepGate(node.engine)
            reading = asyncio.create_task(read(direct, n=2, stop=["never comes"]))
            gate.allow(8)
            await until(lambda: bool(readers(node)), "a direct stream")
            gate.open()
            assert whole(await reading) == whole(await read(relayed, n=2, stop=["never comes"]))


async def test_the_blocking_client_reads_directly_too(model_dir: Path) -> None:
    async with running(model_dir) as place:
        node = await place.worker("one")
        async with AsyncClient(place.server.address, direct=False) as relayed:
            await until_served(relayed, 1)
            gate = StepGate(node.engine)
            reading = asyncio.create_task(asyncio.to_thread(read_blocking, place.server.address))
            gate.allow(5)
            await until(lambda: bool(readers(node)), "a direct stream")
            gate.allow(10)
            [reader] = readers(node)
            node._loop.loop.call_soon_threadsafe(reader.give_up, "CLIENT_TOO_SLOW", "as the test says")
            gate.open()
            first, second = await reading
            assert first == second == whole(await read(relayed))[0]


def read_blocking(address: str) -> list[tuple[tuple[int, ...], str]]:
    """Two answers, one after the other."""
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0.9, "seed": 1}
    with Client(address) as client:
        answers = [client.generate(PROMPT, **options).read() for _ in range(2)]
        return [(answer.token_ids, answer.text) for answer in answers]


async def test_a_broken_direct_stream_costs_nothing(model_dir: Path) -> None:
    async with running(model_dir) as place:
        node = await place.worker("one")
        async with AsyncClient(place.server.address) as client:
            await until_served(client, 1)
            gate = StepGate(node.engine)
            reading = asyncio.create_task(read(client))
            gate.allow(5)
            await until(lambda: bool(readers(node)), "a direct stream")
            gate.allow(10)
            [reader] = readers(node)
            node._loop.loop.call_soon_threadsafe(reader.give_up, "CLIENT_TOO_SLOW", "as the test says")
            await until(lambda: not readers(node), "the end of the direct stream")
            gate.open()
            assert whole(await reading) == whole(await read(client))


async def test_an_answer_whose_worker_leaves_goes_on_at_another(model_dir: Path) -> None:
    async with running(model_dir) as place:
        nodes = [await place.worker("one"), await place.worker("two")]
        async with AsyncClient(place.server.address) as client:
            await until_served(client, 2)
            gates = [StepGate(node.engine) for node in nodes]
            reading = asyncio.create_task(read(client))
            for gate in gates:
                gate.allow(10)
            await until(lambda: any(readers(node) for node in nodes), "a direct stream")
            writing = next(number for number, node in enumerate(nodes) if readers(node))
            gates[writing].allow(10)
            leaving = asyncio.create_task(asyncio.to_thread(nodes[writing].stop))
            await until(lambda: bool(readers(nodes[1 - writing])), "a direct stream from the other worker")
            for gate in gates:
                gate.open()
            await leaving
            assert whole(await reading) == whole(await read(client))


async def test_a_ticket_is_for_one_stream_and_of_this_cluster(model_dir: Path) -> None:
    async with running(model_dir) as place:
        node = await place.worker("one")
        async with (
            AsyncClient(place.server.address) as client,
            grpc.aio.insecure_channel(place.server.address) as router,
            grpc.aio.insecure_channel(node.direct_address) as worker,
        ):
            await until_served(client, 1)
            gate = StepGate(node.engine)
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=4), direct=True
            )
            call = inference_pb2_grpc.InferenceStub(router).Generate(request)
            while not (event := await call.read()).HasField("ticket"):
                assert event.HasField("accepted")
            ticket = event.ticket
            assert ticket.address == node.direct_address
            stub = inference_pb2_grpc.DirectStub(worker)
            for token in (b"", ticket.token[:-1], bytes(40)):
                assert await refusal(stub, token) == "BAD_TICKET"
            first = stub.Stream(pb.DirectRequest(ticket=ticket.token))
            await until(lambda: bool(readers(node)), "a direct stream")
            assert await refusal(stub, ticket.token) == "TICKET_USED"
            gate.open()
            events = [event async for event in first]
            assert sum(len(event.delta.token_ids) for event in events) == 4
            assert events[-1].choice_finished.num_tokens == 4
            # The router sends no token beside the worker's.
            assert (await call.read()).HasField("done")


async def refusal(stub: inference_pb2_grpc.DirectAsyncStub, token: bytes) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Stream(pb.DirectRequest(ticket=token)).read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    [detail] = [value for name, value in refused.value.trailing_metadata() if name == "headrace-error-bin"]
    return pb.ErrorDetail.FromString(detail).cause


async def test_a_relaying_router_gives_no_tickets(model_dir: Path) -> None:
    async with running(model_dir, streaming="relay") as place:
        node = await place.worker("one")
        async with AsyncClient(place.server.address) as client:
            await until_served(client, 1)
            gate = StepGate(node.engine)
            reading = asyncio.create_task(read(client))
            gate.allow(10)
            await asyncio.to_thread(gate.wait_until_held)
            assert not readers(node)
            gate.open()
            await reading
