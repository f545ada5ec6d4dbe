"""A router's index is what a real worker's pool holds: at once, after evictions, and after a broken stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.v1 import worker_pb2
from router.config import RouterConfig
from router.core.fleet import WorkerRef
from router.core.index_feed import FeedState, IndexFeed, KeyScheme
from router.prompt_keys import KeyRoots, PromptKeys
from router.server import RouterServer
from tests.integration.router_harness import running_router
from tests.scripted_router import SessionClient, generate_locally, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import SECRET, random_prompt, session, start_worker, wait_until, worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

TENANT = "default"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def node(model_dir: Path) -> Iterator[WorkerNode]:
    with worker(model_dir, WorkerRole.BOTH, report_interval_s=0.05) as running:
        yield running


class Mirror:
    """A feed of one worker, of what came on one stream so far."""

    def __init__(self, client: SessionClient) -> None:
        self.client = client
        self.ref = WorkerRef("both-worker", client.hello().epoch)
        self.scheme = KeyScheme(client.hello().key_identity, client.hello().block_tokens)
        self.feed = IndexFeed()
        self.slot = self.feed.joined(self.ref, self.scheme, 0.0)
        self._num_taken = 0

    def keys(self) -> set[bytes]:
        """As the feed knows them now; it must never lose track."""
        messages = [m.blocks for m in list(self.client.messages) if m.HasField("blocks")]
        for events in messages[self._num_taken :]:
            assert not self.feed.take(self.ref, events, 0.0)
        self._num_taken = len(messages)
        return set(self.feed.index.keys_of(self.slot))

    def cached_tokens(self, tokens: list[int]) -> int:
        """Of a prompt, as the router predicts it."""
        self.keys()
        found = self.feed.cached(PromptKeys(KeyRoots(SECRET), TENANT, tokens), 0.0)
        return found[0][1] if found else 0


def exact_keys(node: WorkerNode) -> set[bytes]:
    with node.engine.lock:
        return {key for key, rank in node.engine.pool._block_of if rank == 0}


def catch_up(mirror: Mirror, node: WorkerNode) -> None:
    wait_until(lambda: mirror.keys() == exact_keys(node), "the index to be what the pool holds")
    assert mirror.feed.state_of(mirror.ref) is FeedState.EXACT


def answer(client: SessionClient, name: str, tokens: list[int], max_tokens: int = 4) -> None:
    generate_locally(client, request_key(name, tenant=TENANT), task(tokens, max_tokens=max_tokens))


def test_a_worker_says_what_its_keys_begin_with_and_what_tokens_and_steps_take(node: WorkerNode) -> None:
    with session(node, "facts") as client:
        hello = client.hello()
        layout = node.engine.layout
        assert hello.kv_bytes_per_token * 1024 == layout.num_bytes(2048) - layout.num_bytes(1024)
        assert len(hello.key_identity) == 64
        answer(client, "facts", list(random_prompt(99, 100)))
        client.wait(lambda: client.reports()[-1].prefill_s_per_token > 0, "the speed of prefill")
        client.wait(lambda: client.reports()[-1].first_row_s > 0, "the time of a decode step")
        assert 0 <= client.reports()[-1].row_s <= client.reports()[-1].first_row_s


def test_a_router_predicts_what_a_worker_then_finds_cached(node: WorkerNode) -> None:
    with session(node, "predicts") as client:
        mirror = Mirror(client)
        tokens = list(random_prompt(1, 200))
        assert mirror.cached_tokens(tokens) == 0
        answer(client, "first", tokens)
        catch_up(mirror, node)
        longer = tokens[:150] + list(random_prompt(2, 60))
        for number, prompt in enumerate((tokens, longer, tokens[:64], tokens[:65])):
            key = request_key(f"again {number}", tenant=TENANT)
            client.send(reserve=worker_pb2.Reserve(key=key, task=task(prompt), remaining_s=60.0))
            assert client.reserved(key).cached_tokens == mirror.cached_tokens(prompt)
            client.send(cancel=worker_pb2.CancelAttempt(key=key))
        assert mirror.cached_tokens(tokens) > 100


def test_the_index_follows_evictions(node: WorkerNode) -> None:
    with session(node, "evictions") as client:
        mirror = Mirror(client)
        answer(client, "evicted", list(random_prompt(100, 300)))
        catch_up(mirror, node)
        before = mirror.keys()
        prompts = 0
        while before <= exact_keys(node):
            prompts += 1
            answer(client, f"evicting {prompts}", list(random_prompt(100 + prompts, 400)))
            assert prompts < 100
        catch_up(mirror, node)
        assert before - mirror.keys()
        assert mirror.feed.counters.snapshots == 1


def test_a_new_stream_begins_with_what_is_cached_then(node: WorkerNode) -> None:
    client = SessionClient(node.address, SECRET, "reconnects")
    answer(client, "before", list(random_prompt(7, 100)))
    catch_up(Mirror(client), node)
    client.break_off()
    with session(node, "meanwhile") as other:
        answer(other, "meanwhile", list(random_prompt(8, 100)))
    with session(node, "reconnects") as again:
        mirror = Mirror(again)
        catch_up(mirror, node)
        [first, *_] = [m.blocks for m in again.messages if m.HasField("blocks")]
        assert (first.number, first.is_snapshot) == (1, True)


def test_a_snapshot_is_sent_when_it_is_asked_for(node: WorkerNode) -> None:
    with session(node, "asks") as client:
        mirror = Mirror(client)
        catch_up(mirror, node)
        client.send(snapshot=worker_pb2.BlockSnapshotRequest())
        client.wait(
            lambda: sum(m.blocks.is_snapshot for m in client.messages if m.HasField("blocks")) == 2,
            "another snapshot",
        )
        catch_up(mirror, node)
        assert mirror.feed.counters.snapshots == 2


async def _until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def test_a_running_router_knows_what_a_running_worker_holds(model_dir: Path) -> None:
    server = RouterServer(
        RouterConfig(
            router_id="r",
            model_name="tiny",
            model_dir=model_dir,
            cluster_secret=SECRET,
            listen="127.0.0.1:0",
            max_context=512,
        )
    )
    await server.start()
    routers = (server.address,)
    node = await asyncio.to_thread(
        start_worker, model_dir, WorkerRole.BOTH, routers=routers, report_interval_s=0.05
    )
    try:
        assert server._parts is not None
        feed = server._parts.membership._feed
        ref = WorkerRef(node.config.worker_id, node.epoch)
        await _until(lambda: feed.state_of(ref) is FeedState.EXACT)
        with session(node, "other router") as client:
            await asyncio.to_thread(answer, client, "a", list(random_prompt(1, 200)))
        slot = feed.slot_of(ref)
        assert slot is not None
        await _until(lambda: exact_keys(node) and feed.index.keys_of(slot) == exact_keys(node))
    finally:
        await asyncio.to_thread(node.stop)
        await server.stop()


async def test_a_router_asks_a_worker_whose_news_it_missed() -> None:
    async with running_router() as harness:
        scripted = await harness.worker("d", worker_pb2.ROLE_BOTH, key_identity="k")
        assert harness.server._parts is not None
        feed = harness.server._parts.membership._feed
        ref = WorkerRef("d", scripted.hello.epoch)
        await _until(lambda: feed.state_of(ref) is FeedState.SNAPSHOT_AWAITED)
        scripted.send(blocks=worker_pb2.BlockEvents(number=1, is_snapshot=True))
        await _until(lambda: feed.state_of(ref) is FeedState.EXACT)
        scripted.send(blocks=worker_pb2.BlockEvents(number=3))
        await scripted.expect("snapshot")
        scripted.send(blocks=worker_pb2.BlockEvents(number=4, is_snapshot=True))
        await _until(lambda: feed.state_of(ref) is FeedState.EXACT)
        scripted.break_stream()
        await _until(lambda: feed.state_of(ref) is FeedState.SNAPSHOT_AWAITED)
        await _until(lambda: len(scripted.router_hellos) == 2)
        scripted.send(blocks=worker_pb2.BlockEvents(number=1, is_snapshot=True))
        await _until(lambda: feed.state_of(ref) is FeedState.EXACT)
        await scripted.stop()
        await _until(lambda: feed.slot_of(ref) is None)
