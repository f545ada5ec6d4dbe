"""Blocks that outlive a worker's memory in the node's store: written back, and loaded by whoever needs them next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.v1 import worker_pb2
from kvtransfer.keys import tenant_label
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import DISK, HOST, StoreOptions
from tests.scripted_router import Choice, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    PATIENCE_S,
    SECRET,
    GatherGate,
    ScatterGate,
    StepGate,
    assert_nothing_held,
    expect_loading_to_win,
    random_prompt,
    session,
    start_worker,
    wait_until,
    worker,
)
from worker.config import WorkerRole
from worker.node import WorkerNode
from worker.prefix_sources import STORE

pytestmark = pytest.mark.integration

MIB = 1 << 20
BLOCK = 64
LONG = 5 * BLOCK + 20
KEY = request_key("the request")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@contextmanager
def _store(directory: Path | None = None) -> Iterator[StoreServer]:
    disk = None if directory is None else DiskOptions(directory, limit_bytes=64 * MIB)
    store = StoreServer(
        StoreConfig(cluster_secret=SECRET, options=StoreOptions(host_bytes=64 * MIB, disk=disk))
    )
    store.start()
    try:
        assert store.wait_ready(PATIENCE_S)
        yield store
    finally:
        store.close()


@pytest.fixture
def store() -> Iterator[StoreServer]:
    with _store() as store:
        yield store


def _records(store: StoreServer, tier: str = HOST) -> int:
    return next(each.num_records for each in store.stats().tiers if each.tier == tier)


def _only(choices: list[Choice]) -> list[int]:
    [choice] = choices
    return choice.token_ids


def _answer(
    node: WorkerNode, prompt: list[int], key: worker_pb2.RequestKey = KEY
) -> tuple[list[int], worker_pb2.PrefillFinished]:
    with session(node) as client:
        answer = _only(generate_locally(client, key, task(prompt)))
        return answer, client.prefill_finished(key)


def _fill(
    model_dir: Path, store: StoreServer, prompt: list[int], num_blocks: int, tier: str = HOST
) -> list[int]:
    """A worker that answers the prompt, writes its blocks back and is gone."""
    with worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        answer, finished = _answer(node, prompt)
        assert finished.computed_tokens == len(prompt)
        wait_until(lambda: _records(store, tier) == num_blocks, f"{num_blocks} blocks in the store")
        assert_nothing_held(node)
    return answer


def test_a_new_worker_loads_what_an_earlier_one_computed(model_dir: Path, store: StoreServer) -> None:
    prompt = random_prompt(1, LONG)
    answer = _fill(model_dir, store, prompt, 5)
    with worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        expect_loading_to_win(node, STORE)
        again, finished = _answer(node, prompt)
        assert (finished.fetched_tokens, finished.fetched_from) == (5 * BLOCK, STORE)
        assert (finished.cached_tokens, finished.computed_tokens) == (5 * BLOCK, LONG - 5 * BLOCK)
        assert finished.fetch_s > 0
        assert again == answer
        assert_nothing_held(node)
    assert store.stats().host_hits == 5


def test_a_prefill_worker_loads_the_answer_that_a_decode_worker_wrote_back(
    model_dir: Path, store: StoreServer
) -> None:
    prompt = random_prompt(2, 150)
    with (
        worker(model_dir, WorkerRole.PREFILL) as prefill,
        worker(model_dir, WorkerRole.DECODE, store_address=store.address) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        hand_over(to_prefill, to_decode, KEY, task(prompt, max_tokens=120))
        said = _only(to_decode.answer(KEY))
        wait_until(lambda: _records(store) == 4, "prompt and answer in the store")
        assert_nothing_held(prefill, decode)
    longer = [*prompt, *said, *random_prompt(3, 30)]
    turn_2 = request_key("turn 2")
    with (
        worker(model_dir, WorkerRole.PREFILL, store_address=store.address) as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        expect_loading_to_win(prefill, STORE)
        lease = hand_over(to_prefill, to_decode, turn_2, task(longer))
        answer = _only(to_decode.answer(turn_2))
        finished = to_prefill.prefill_finished(turn_2)
        assert lease.cached_tokens == 0
        assert (finished.fetched_tokens, finished.fetched_from) == (4 * BLOCK, STORE)
        assert finished.transferred_tokens == len(longer)
        assert_nothing_held(prefill, decode)
    with worker(model_dir, WorkerRole.BOTH) as alone:
        assert answer == _answer(alone, longer, turn_2)[0]


def test_a_restart_of_everything_leaves_the_prompt_on_disk(model_dir: Path, tmp_path: Path) -> None:
    prompt = random_prompt(4, LONG)
    with _store(tmp_path) as store:
        answer = _fill(model_dir, store, prompt, 5, DISK)
    with _store(tmp_path) as store, worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        expect_loading_to_win(node, STORE)
        again, finished = _answer(node, prompt)
        assert (finished.fetched_tokens, finished.fetched_from) == (5 * BLOCK, STORE)
        assert again == answer
        assert store.stats().disk_hits == 5
        assert_nothing_held(node)


def test_a_worker_that_stops_writes_what_waits(model_dir: Path, store: StoreServer) -> None:
    node = start_worker(model_dir, WorkerRole.BOTH, store_address=store.address)
    _answer(node, random_prompt(5, LONG))
    node.stop()
    assert _records(store) == 5


def test_another_tenants_blocks_are_not_found(model_dir: Path, store: StoreServer) -> None:
    prompt = random_prompt(6, LONG)
    _fill(model_dir, store, prompt, 5)
    with worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        expect_loading_to_win(node, STORE)
        _, finished = _answer(node, prompt, request_key("theirs", tenant="another"))
        assert (finished.fetched_tokens, finished.computed_tokens) == (0, LONG)
        wait_until(lambda: _records(store) == 10, "their own blocks in the store")
    [host] = store.stats().tiers
    assert set(host.tenants) == {tenant_label(SECRET, "default"), tenant_label(SECRET, "another")}


# --- without a store that works ----------------------------------------------------------------


def test_a_store_that_is_not_there_stops_nothing(model_dir: Path) -> None:
    with _store() as store:
        address = store.address
    prompt = random_prompt(7, LONG)
    with worker(model_dir, WorkerRole.BOTH, store_address=address) as node:
        expect_loading_to_win(node, STORE)
        first, finished = _answer(node, prompt)
        assert finished.computed_tokens == LONG
        wait_until(lambda: node._write_back.num_dropped == 1, "the chain to be given up")
        second, _ = _answer(node, prompt, request_key("again"))
        assert first == second
        assert_nothing_held(node)


def test_a_store_that_dies_while_it_is_written_to_stops_nothing(model_dir: Path) -> None:
    prompt = random_prompt(8, LONG)
    with _store() as store, worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node:
        gate = GatherGate(node.engine)
        try:
            answer, _ = _answer(node, prompt)
            assert gate.reached.wait(PATIENCE_S)
            store.close()
        finally:
            gate.open()
        assert_nothing_held(node)
        assert node._write_back.num_dropped == 1
        assert _answer(node, prompt, request_key("again"))[0] == answer


def test_a_store_that_dies_while_it_is_read_from_stops_nothing(model_dir: Path) -> None:
    prompt = random_prompt(9, LONG)
    with _store() as store:
        answer = _fill(model_dir, store, prompt, 5)
        with worker(model_dir, WorkerRole.BOTH, store_address=store.address) as node, session(node) as client:
            expect_loading_to_win(node, STORE)
            gate = ScatterGate(node.engine)
            try:
                reserve = worker_pb2.Reserve(key=KEY, task=task(prompt), remaining_s=60.0, local_prefill=True)
                client.send(reserve=reserve)
                assert gate.reached.wait(PATIENCE_S)
                store.close()
            finally:
                gate.open()
            assert _only(client.answer(KEY)) == answer
            assert client.prefill_finished(KEY).computed_tokens == LONG
            assert_nothing_held(node)


# --- a request that waits for its prefix -------------------------------------------------------


@contextmanager
def _held_load(
    model_dir: Path, store: StoreServer, **overrides: object
) -> Iterator[tuple[WorkerNode, ScatterGate]]:
    """A colocated worker that stands still with the first block from the store until the gate opens."""
    _fill(model_dir, store, random_prompt(10, LONG), 5)
    with worker(model_dir, WorkerRole.BOTH, store_address=store.address, **overrides) as node:
        expect_loading_to_win(node, STORE)
        gate = ScatterGate(node.engine)
        try:
            yield node, gate
        finally:
            gate.open()
        assert_nothing_held(node)


def _reserve(remaining_s: float = 60.0, attempt: int = 1) -> worker_pb2.Reserve:
    return worker_pb2.Reserve(
        key=request_key("the request", attempt=attempt),
        task=task(random_prompt(10, LONG)),
        remaining_s=remaining_s,
        local_prefill=True,
    )


def _is_loading(node: WorkerNode) -> bool:
    return node.report().private_blocks > 0


def test_a_request_that_is_asked_for_again_while_it_loads_is_answered_once(
    model_dir: Path, store: StoreServer
) -> None:
    with _held_load(model_dir, store) as (node, gate), session(node) as client:
        client.send(reserve=_reserve())
        wait_until(lambda: _is_loading(node), "the load")
        client.send(reserve=_reserve())
        client.send(resume=worker_pb2.ResumeStream(key=KEY, next_index=[0]))
        client.send(
            reserve=_reserve(attempt=2, remaining_s=-1.0)
        )  # refused: what came before has been acted on
        client.failed(request_key("the request", attempt=2))
        gate.open()
        assert len(_only(client.answer(KEY))) == 16
        assert (client.num_failures(KEY), store.stats().host_hits) == (0, 5)


def test_a_newer_attempt_takes_the_place_of_one_that_loads(model_dir: Path, store: StoreServer) -> None:
    newer = request_key("the request", attempt=2)
    with _held_load(model_dir, store) as (node, gate), session(node) as client:
        client.send(reserve=_reserve())
        wait_until(lambda: _is_loading(node), "the load")
        client.send(reserve=_reserve(attempt=2))
        client.send(reserve=_reserve(attempt=1))
        assert client.failed(KEY).cause == "STALE_ATTEMPT"
        gate.open()
        assert len(_only(client.answer(newer))) == 16
        assert client.num_failures(newer) == 0


@pytest.mark.parametrize("end", ["a cancel", "the deadline", "a router that is gone"])
def test_a_request_that_ends_while_it_loads_is_not_computed(
    model_dir: Path, store: StoreServer, end: str
) -> None:
    remaining_s = 1.0 if end == "the deadline" else 60.0
    with _held_load(model_dir, store, resume_grace_s=0.1) as (node, gate), session(node) as client:
        steps = StepGate(node.engine)
        client.send(reserve=_reserve(remaining_s))
        wait_until(lambda: _is_loading(node), "the load")
        if end == "a cancel":
            client.send(cancel=worker_pb2.CancelAttempt(key=KEY, cause="CLIENT_CANCELLED"))
        elif end == "the deadline":
            error = client.failed(KEY)
            assert (error.stage, error.cause) == ("reserve", "DEADLINE_EXCEEDED")
        else:
            client.close()
        wait_until(lambda: all(service.num_requests == 0 for service in node._services), "the request's end")
        gate.open()
        wait_until(lambda: not any(fetcher.num_open for fetcher in node._fetchers), "the load's end")
        assert not node.engine.has_work()
        assert client.num_failures(KEY) == (1 if end == "the deadline" else 0)
        steps.open()
