"""The thread that copies cached blocks to the store: what it writes, what it leaves, what it never holds for long."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.runner import EngineOptions
from kvtransfer.tiers.receiving import shape_of
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import StoreOptions
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import PATIENCE_S, SECRET, wait_until
from worker.config import WorkerConfig, WorkerRole
from worker.kv import KvParts
from worker.write_back import BLOCKS_AT_A_TIME, MAX_CHAINS, WriteBack

pytestmark = pytest.mark.integration

EPOCH = 7
TENANT = "tenant"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return Engine.open(model_dir, EngineOptions(max_context=512, kv_bytes=4 << 20, max_sequences=4))


@contextmanager
def _store(**options: int) -> Iterator[StoreServer]:
    store = StoreServer(
        StoreConfig(cluster_secret=SECRET, options=StoreOptions(host_bytes=64 << 20, **options))
    )
    store.start()
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _write_back(engine: Engine, model_dir: Path, store: StoreServer) -> Iterator[WriteBack]:
    config = WorkerConfig(
        worker_id="w",
        role=WorkerRole.BOTH,
        model_dir=model_dir,
        cluster_secret=SECRET,
        store_address=store.address,
    )
    kv = KvParts(engine, config, lambda _num_bytes: None)
    assert kv.store is not None
    write_back = WriteBack(kv, kv.store, lambda: False, lambda: EPOCH)
    try:
        yield write_back
    finally:
        write_back.stop(0.0)
        kv.close()


def _cache(engine: Engine, *ranks: int) -> list[bytes]:
    """Blocks of a sequence in the cache, with these fidelity ranks; their keys."""
    keys, owner = [secrets.token_bytes(16) for _ in ranks], secrets.token_bytes(16)
    with engine.lock:
        assert engine.pool.open(owner, keys, len(keys)) == 0
        for key, rank in zip(keys, ranks, strict=True):
            engine.pool.worsen(owner, rank)
            engine.pool.seal(owner, key)
        engine.pool.close(owner)
    return keys


def _stored(engine: Engine, store: StoreServer, keys: Sequence[bytes], bound: int) -> int:
    return store.store.lookup(keys, bound, shape_of(engine.layout, engine.layout.block_tokens)).num_blocks


def _pins(engine: Engine) -> int:
    with engine.lock:
        engine.pool.check()
        return engine.pool.stats().pins


def test_exact_blocks_stay_exact_though_the_chain_goes_on_lossily(engine: Engine, model_dir: Path) -> None:
    keys = _cache(engine, 0, 0, 0, 1, 1)
    with _store() as store, _write_back(engine, model_dir, store) as write_back:
        write_back.start()
        write_back.note(TENANT, keys)
        wait_until(lambda: _stored(engine, store, keys, 1) == 5, "the whole chain")
        assert _stored(engine, store, keys, 0) == 3
        wait_until(lambda: not write_back.is_writing, "the last part")
    assert (_pins(engine), write_back.num_dropped) == (0, 0)


def test_a_store_with_little_room_gets_a_long_chain_bit_by_bit(engine: Engine, model_dir: Path) -> None:
    keys = _cache(engine, *[0] * (2 * BLOCKS_AT_A_TIME + 3))
    room_for_three = 64 * 1024 + 3 * 34 * 1024 + 64 * 1024
    with (
        _store(landing_bytes=room_for_three) as store,
        _write_back(engine, model_dir, store) as write_back,
    ):
        write_back.start()
        write_back.note(TENANT, keys)
        wait_until(lambda: _stored(engine, store, keys, 0) == len(keys), "the whole chain")
    assert (_pins(engine), write_back.num_dropped) == (0, 0)


def test_what_was_evicted_meanwhile_is_left_out(engine: Engine, model_dir: Path) -> None:
    keys, here = [secrets.token_bytes(16) for _ in range(3)], _cache(engine, 0, 0)
    with _store() as store, _write_back(engine, model_dir, store) as write_back:
        write_back.note(TENANT, [*here, *keys])
        write_back.note(TENANT, keys)
        write_back.note(TENANT, [])
        write_back.start()
        wait_until(lambda: write_back.num_dropped == 2, "both chains")
        assert _stored(engine, store, here, 0) == 2
    assert _pins(engine) == 0


def test_chains_beyond_the_queue_are_dropped_the_oldest_first(engine: Engine, model_dir: Path) -> None:
    first, last = _cache(engine, 0), _cache(engine, 0)
    with _store() as store, _write_back(engine, model_dir, store) as write_back:
        write_back.note(TENANT, first)
        for _ in range(MAX_CHAINS):
            write_back.note(TENANT, last)
        assert write_back.num_dropped == 1
        write_back.start()
        write_back.stop(PATIENCE_S)
        assert (_stored(engine, store, first, 0), _stored(engine, store, last, 0)) == (0, 1)


def test_a_stop_cuts_a_push_short_that_the_store_does_not_take(engine: Engine, model_dir: Path) -> None:
    keys = _cache(engine, 0, 0)
    reached, opened = threading.Event(), threading.Event()
    with _store() as store, _write_back(engine, model_dir, store) as write_back:
        write = store.store.areas.write

        def held_write(*arguments: Any) -> None:
            reached.set()
            assert opened.wait(PATIENCE_S)
            write(*arguments)

        store.store.areas.write = held_write  # type: ignore[method-assign]
        try:
            write_back.start()
            write_back.note(TENANT, keys)
            assert reached.wait(PATIENCE_S)
            assert _pins(engine) == 2
            write_back.stop(0.0)
            assert (_pins(engine), write_back.is_writing) == (0, False)
        finally:
            opened.set()
    assert _stored(engine, store, keys, 2) == 0
