"""DeepSeek-V4's cached prefixes beyond a worker's memory: blocks and window records in the node's store and on other
workers, loaded by a new one, under every strategy for windows. Every answer is that of a worker that computed all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.record_policy import RecordPolicy
from headrace.v1 import worker_pb2
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import DISK, HOST, StoreOptions
from tests.deepseek_checkpoints import make_prepared, v4_config
from tests.scripted_router import generate_locally, hand_over, request_key, task
from tests.worker_nodes import (
    PATIENCE_S,
    SECRET,
    assert_nothing_held,
    expect_loading_to_win,
    random_prompt,
    session,
    wait_until,
    worker,
)
from worker.config import WorkerRole
from worker.node import WorkerNode
from worker.prefix_sources import STORE

pytestmark = pytest.mark.integration

MIB = 1 << 20
BLOCK = 128
NUM_PROMPT = 700  # 5 whole blocks before its last token, and 60 tokens
LAYERS = 3
ROOM = {"max_context": 1024, "kv_bytes": 48 << 20, "max_sequences": 4, "chunk_tokens": 256}
POLICIES = {
    "ends": (RecordPolicy(), 5 * BLOCK),
    "full": (RecordPolicy("full"), 5 * BLOCK),
    "periodic": (RecordPolicy("periodic", 2 * BLOCK), 4 * BLOCK),
    "zero": (RecordPolicy("zero"), 5 * BLOCK - LAYERS * 128),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = v4_config(num_hidden_layers=LAYERS, compress_ratios=[0, 4, 128], index_topk=48)
    return make_prepared(config, tmp_path_factory.mktemp("v4"))


@contextmanager
def open_store(directory: Path | None = None) -> Iterator[StoreServer]:
    disk = None if directory is None else DiskOptions(directory, limit_bytes=64 * MIB)
    host_bytes = 64 * MIB if directory is None else 1
    store = StoreServer(
        StoreConfig(cluster_secret=SECRET, options=StoreOptions(host_bytes=host_bytes, disk=disk))
    )
    store.start()
    try:
        assert store.wait_ready(PATIENCE_S)
        yield store
    finally:
        store.close()


def num_records(store: StoreServer, tier: str) -> int:
    return next(each.num_records for each in store.stats().tiers if each.tier == tier)


def answer(
    node: WorkerNode, prompt: list[int], name: str = "request"
) -> tuple[list[int], worker_pb2.PrefillFinished]:
    key = request_key(name)
    with session(node) as client:
        [choice] = generate_locally(client, key, task(prompt, max_tokens=8))
        return choice.token_ids, client.prefill_finished(key)


def fill(model_dir: Path, store: StoreServer, policy: RecordPolicy, tier: str) -> tuple[list[int], list[int]]:
    """A worker that answers a prompt, writes back what it cached, and is gone. Returns prompt and answer."""
    prompt = list(random_prompt(1, NUM_PROMPT))
    with worker(
        model_dir, WorkerRole.BOTH, store_address=store.address, window_records=policy, **ROOM
    ) as node:
        told, finished = answer(node, prompt)
        assert finished.computed_tokens == NUM_PROMPT
        windows = node.engine.pool.windows
        assert windows is not None
        expected = 5 + windows.num_kept
        wait_until(lambda: num_records(store, tier) == expected, f"{expected} records in the store")
        assert_nothing_held(node)
    return prompt, told


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tier", [HOST, DISK])
def test_a_new_worker_goes_on_from_what_an_earlier_one_computed(
    model_dir: Path, tmp_path: Path, name: str, tier: str
) -> None:
    policy, taken_up = POLICIES[name]
    directory = tmp_path / "kv" if tier == DISK else None
    with open_store(directory) as store:
        prompt, told = fill(model_dir, store, policy, tier)
        if tier == HOST:
            check_loaded(model_dir, store, policy, prompt, told, taken_up)
    if directory is not None:
        with open_store(directory) as reopened:
            check_loaded(model_dir, reopened, policy, prompt, told, taken_up)


def check_loaded(
    model_dir: Path,
    store: StoreServer,
    policy: RecordPolicy,
    prompt: list[int],
    told: list[int],
    taken_up: int,
) -> None:
    with worker(
        model_dir, WorkerRole.BOTH, store_address=store.address, window_records=policy, **ROOM
    ) as node:
        expect_loading_to_win(node, STORE)
        again, finished = answer(node, prompt)
        assert again == told
        assert finished.fetched_from == STORE
        assert (finished.cached_tokens, finished.computed_tokens) == (taken_up, NUM_PROMPT - taken_up)
        assert_nothing_held(node)
        with node.engine.lock:
            node.engine.pool.check()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", POLICIES)
def test_prompts_of_many_lengths_come_back_from_disk(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Told by one worker, gone on from by another after the store was opened again, compared with a third."""
    policy, _ = POLICIES[name]
    prompts = [
        list(random_prompt(length, length)) for length in (*range(1, 601, 23), 128, 129, 256, 257, 384)
    ]
    with open_store(tmp_path / "kv") as store:
        options = ROOM | {"store_address": store.address, "window_records": policy}
        with worker(model_dir, WorkerRole.BOTH, **options) as node:
            told = [answer(node, prompt, f"{number}")[0] for number, prompt in enumerate(prompts)]
            assert node.engine.pool.windows is not None
            expected = (
                sum((len(prompt) + 7) // BLOCK for prompt in prompts) + node.engine.pool.windows.num_kept
            )
            wait_until(lambda: num_records(store, DISK) == expected, f"{expected} records on disk")
    with open_store(tmp_path / "kv") as store:
        options = ROOM | {"store_address": store.address, "window_records": policy}
        with (
            worker(model_dir, WorkerRole.PREFILL, **options) as prefill,
            worker(model_dir, WorkerRole.DECODE, **ROOM) as decode,
            session(prefill) as to_prefill,
            session(decode) as to_decode,
        ):
            expect_loading_to_win(prefill, STORE)
            for number, (prompt, expected_answer) in enumerate(zip(prompts, told, strict=True)):
                key = request_key(f"again {number}")
                hand_over(to_prefill, to_decode, key, task(prompt, max_tokens=8))
                [again] = to_decode.answer(key)
                assert again.token_ids == expected_answer, f"{len(prompt)} tokens"
                if name in ("ends", "full"):
                    finished = to_prefill.prefill_finished(key)
                    assert bool(finished.fetched_tokens) == (len(prompt) > BLOCK)


@pytest.mark.parametrize("every_bytes", [37, 1 << 16])
def test_damaged_windows_and_blocks_on_disk_are_computed_again(
    model_dir: Path, tmp_path: Path, every_bytes: int
) -> None:
    with open_store(tmp_path / "kv") as store:
        prompt, told = fill(model_dir, store, RecordPolicy("full"), DISK)
    for segment in (tmp_path / "kv").rglob("*"):
        if segment.is_file() and segment.stat().st_size > every_bytes:
            data = bytearray(segment.read_bytes())
            for at in range(every_bytes, len(data), every_bytes):
                data[at] ^= 0x10
            segment.write_bytes(data)
    with (
        open_store(tmp_path / "kv") as store,
        worker(model_dir, WorkerRole.BOTH, store_address=store.address, **ROOM) as node,
    ):
        expect_loading_to_win(node, STORE)
        assert answer(node, prompt)[0] == told
        assert_nothing_held(node)


def test_the_next_turn_goes_on_from_the_answer_that_the_decode_worker_has(model_dir: Path) -> None:
    """Its blocks and the windows at its end come from there; the turn's new tokens are all that is computed."""
    with (
        worker(model_dir, WorkerRole.PREFILL, **ROOM) as prefill,
        worker(model_dir, WorkerRole.DECODE, **ROOM) as decode,
        worker(model_dir, WorkerRole.BOTH, **ROOM) as alone,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        prompt, first, second = list(random_prompt(2, 300)), request_key("turn 1"), request_key("turn 2")
        hand_over(to_prefill, to_decode, first, task(prompt, max_tokens=100))
        [told] = to_decode.answer(first)
        turn = [*prompt, *told.token_ids, *random_prompt(3, 30)]
        expect_loading_to_win(prefill, decode.kv_address)
        hand_over(to_prefill, to_decode, second, task(turn, max_tokens=8))
        [handed_over] = to_decode.answer(second)
        assert handed_over.token_ids == answer(alone, turn)[0]
        finished = to_prefill.prefill_finished(second)
        assert finished.fetched_from == decode.kv_address
        assert finished.cached_tokens == 3 * BLOCK
        assert finished.computed_tokens == len(turn) - 3 * BLOCK
        assert_nothing_held(prefill, decode, alone)
