"""What lossy KV may touch and what it may not, from push to cache to store; and KV stored in two dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from headrace.v1 import worker_pb2
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.frames import AckFault, FrameHeader, LeaseRef, decode_ack, encode_frame
from kvtransfer.layouts import Piece
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import StoreOptions
from tests.integration.test_worker_tiers import _only, _records
from tests.scripted_router import SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
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

BLOCK = 64
LOSSY = {"near": "int8", "compact": "int4"}
RANKS = {"exact": 0, "near": 1, "compact": 2}
LOSSLESS = ("raw", "split")


class Pair(NamedTuple):
    prefill: WorkerNode
    decode: WorkerNode
    to_prefill: SessionClient
    to_decode: SessionClient

    def answer(
        self, name: str, work: worker_pb2.GenerationTask
    ) -> tuple[list[int], worker_pb2.Reserved, worker_pb2.PrefillFinished]:
        key = request_key(name)
        lease = hand_over(self.to_prefill, self.to_decode, key, work)
        answer = _only(self.to_decode.answer(key))
        return answer, lease, self.to_prefill.prefill_finished(key)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> Iterator[SessionClient]:
    """A worker that computes everything itself, exactly."""
    with worker(model_dir, WorkerRole.BOTH) as node, session(node) as client:
        yield client


@contextmanager
def _pair(
    model_dir: Path,
    prefill: dict[str, object] | None = None,
    decode: dict[str, object] | None = None,
    **both: object,
) -> Iterator[Pair]:
    with (
        worker(model_dir, WorkerRole.PREFILL, **{**both, **(prefill or {})}) as one,
        worker(model_dir, WorkerRole.DECODE, **{**both, **(decode or {})}) as other,
        session(one) as to_one,
        session(other) as to_other,
    ):
        yield Pair(one, other, to_one, to_other)
        assert_nothing_held(one, other)


@contextmanager
def _store() -> Iterator[StoreServer]:
    store = StoreServer(StoreConfig(cluster_secret=SECRET, options=StoreOptions(host_bytes=64 << 20)))
    store.start()
    try:
        yield store
    finally:
        store.close()


def _cached(node: WorkerNode, tokens: list[int]) -> list[int]:
    """Leading blocks of these tokens that are cached on a worker, for each bound on their fidelity."""
    keys = node.engine.prefix_keys(node._root_key("default"), tokens)
    with node.engine.lock:
        return [node.engine.pool.lookup(keys, rank) for rank in RANKS.values()]


# --- codecs that lose something ----------------------------------------------------------------


@pytest.mark.parametrize("fidelity", LOSSY)
def test_what_landed_lossily_is_hit_by_no_exact_request(
    model_dir: Path, alone: SessionClient, fidelity: str
) -> None:
    prompt = random_prompt(1, 3 * BLOCK + 20)
    with _pair(model_dir, fidelity=fidelity, codec=LOSSY[fidelity]) as pair:
        _, _, finished = pair.answer("lossy", task(prompt, fidelity=fidelity))
        assert finished.codec == LOSSY[fidelity]
        assert _cached(pair.decode, prompt) == [0 if rank < RANKS[fidelity] else 3 for rank in RANKS.values()]
        assert _cached(pair.prefill, prompt) == [3, 3, 3]  # computed there: exact

        exact, lease, finished = pair.answer("exact", task(prompt))
        assert lease.cached_tokens == 0
        assert finished.codec in LOSSLESS
        assert LOSSY[fidelity] in finished.codec_reason  # and why it was not taken
        assert exact == _only(generate_locally(alone, request_key(f"exact {fidelity}"), task(prompt)))

        _, lease, finished = pair.answer("lossy again", task(prompt, fidelity=fidelity))
        assert (lease.cached_tokens, finished.transferred_tokens) == (3 * BLOCK, 20)


def test_the_profiles_bound_holds_whatever_a_request_allows(model_dir: Path) -> None:
    with _pair(model_dir, fidelity="exact", codec="int8") as pair:
        _, _, finished = pair.answer("generous", task(random_prompt(2, 150), fidelity="compact"))
        assert finished.codec in LOSSLESS
        assert _cached(pair.decode, random_prompt(2, 150))[0] == 2


def test_an_exact_lease_refuses_lossy_frames(model_dir: Path) -> None:
    with (
        worker(model_dir, WorkerRole.DECODE, fidelity="near") as decode,
        session(decode) as client,
        grpc.insecure_channel(decode.kv_address) as channel,
    ):
        key, piece = request_key("exact"), Piece("k", range(2), range(2), range(1))
        client.send(reserve=worker_pb2.Reserve(key=key, task=task(random_prompt(3, 80)), remaining_s=60.0))
        lease = client.reserved(key)
        ref = LeaseRef(lease.lease_id, 1, 99, lease.decode_epoch)
        push = channel.stream_stream("/headrace.v1.KvBulk/Push")
        causes = []
        for number, rank in enumerate(RANKS.values()):
            raw = bytes(2 * 2 * 16 * 4)
            header = FrameHeader(ref, number, piece, "raw", 1, len(raw), ("float32",), rank)
            frame, _ = encode_frame(header, raw)
            _, said = push(iter([frame]), metadata=cluster_metadata(SECRET), timeout=PATIENCE_S)
            causes.append(decode_ack(said).cause)
        assert causes == ["", AckFault.FIDELITY_EXCEEDED, AckFault.FIDELITY_EXCEEDED]
        client.send(cancel=worker_pb2.CancelAttempt(key=key, cause="CLIENT_CANCELLED"))
        assert_nothing_held(decode)


def test_what_is_computed_on_top_of_lossy_blocks_is_lossy(model_dir: Path, alone: SessionClient) -> None:
    prompt = random_prompt(4, 150)
    with _pair(model_dir, fidelity="near", codec="int8") as pair:
        said, _, _ = pair.answer("turn 1", task(prompt, fidelity="near", max_tokens=120))
        longer = [*prompt, *said, *random_prompt(5, 2 * BLOCK + 30)]
        assert _cached(pair.decode, longer) == [0, 4, 4]

        # The answer's blocks come to the prefill worker lossy, and what it computes behind them is.
        expect_loading_to_win(pair.prefill, pair.decode.kv_address)
        _, _, finished = pair.answer("turn 2", task(longer, fidelity="near"))
        assert finished.fetched_tokens == 2 * BLOCK
        assert _cached(pair.prefill, longer) == [2, 6, 6]

        key = request_key("turn 2, exact")
        exact, _, finished = pair.answer(key.request_id, task(longer))
        assert (finished.cached_tokens, finished.fetched_tokens) == (2 * BLOCK, 0)
        assert exact == _only(generate_locally(alone, key, task(longer)))


def test_lossy_blocks_come_back_from_the_store_as_such(model_dir: Path, alone: SessionClient) -> None:
    prompt = random_prompt(7, 150)
    lossy = {"fidelity": "near", "codec": "int8"}
    with _store() as store:
        with _pair(model_dir, **lossy, decode={"store_address": store.address}) as pair:
            pair.answer("lossy", task(prompt, fidelity="near"))
            wait_until(lambda: _records(store) == 2, "the prompt in the store")
        with (
            worker(model_dir, WorkerRole.BOTH, **lossy, store_address=store.address) as node,
            session(node) as client,
        ):
            expect_loading_to_win(node, STORE)
            near, exact = request_key("near"), request_key("exact of the store")
            generate_locally(client, near, task(prompt, fidelity="near"))
            assert client.prefill_finished(near).fetched_tokens == 2 * BLOCK
            assert _cached(node, prompt) == [0, 2, 2]

            answer = _only(generate_locally(client, exact, task(prompt)))
            finished = client.prefill_finished(exact)
            assert (finished.fetched_tokens, finished.cached_tokens) == (0, 0)
            assert answer == _only(generate_locally(alone, exact, task(prompt)))
            assert_nothing_held(node)


# --- dtypes ------------------------------------------------------------------------------------

DTYPES = [("float32", "bfloat16"), ("bfloat16", "float32")]


@pytest.mark.parametrize(("here", "there"), DTYPES)
def test_caches_of_two_dtypes_do_not_exchange_exact_kv(model_dir: Path, here: str, there: str) -> None:
    with _pair(model_dir, {"kv_dtype": here}, {"kv_dtype": there}, fidelity="near") as pair:
        key = request_key("exact")
        hand_over(pair.to_prefill, pair.to_decode, key, task(random_prompt(8, 150)))
        error = pair.to_prefill.failed(key)
        assert (error.stage, error.cause, error.retryable) == ("prefill", "DTYPE_MISMATCH", False)
        assert here in error.message
        assert there in error.message
        assert "kv_dtype" in error.message
        cancel = worker_pb2.CancelAttempt(key=key, cause="CLIENT_CANCELLED")
        pair.to_decode.send(cancel=cancel)


@pytest.mark.parametrize(("here", "there"), DTYPES)
def test_caches_of_two_dtypes_exchange_kv_where_near_is_enough(
    model_dir: Path, here: str, there: str
) -> None:
    prompt = random_prompt(9, 150)
    with _pair(model_dir, {"kv_dtype": here}, {"kv_dtype": there}, fidelity="near", codec="raw") as pair:
        said, _, finished = pair.answer("turn 1", task(prompt, fidelity="near", max_tokens=120))
        assert len(said) == 120
        assert finished.kv_bytes == 150 * 2 * 2 * 2 * 16 * 2  # what travels is bfloat16
        assert _cached(pair.decode, prompt) == [0, 2, 2]

        expect_loading_to_win(pair.prefill, pair.decode.kv_address)
        longer = [*prompt, *said, *random_prompt(10, 30)]
        _, _, finished = pair.answer("turn 2", task(longer, fidelity="near"))
        assert finished.fetched_tokens == 2 * BLOCK
        assert _cached(pair.prefill, longer)[:2] == [2, 4]


def test_what_was_computed_on_converted_blocks_stays_near_though_it_travels_raw(model_dir: Path) -> None:
    prompt = random_prompt(11, 5 * BLOCK + 20)
    near = task(prompt, fidelity="near")
    with (
        _pair(model_dir, fidelity="near", codec="raw") as pair,
        worker(model_dir, WorkerRole.BOTH, fidelity="near", kv_dtype="bfloat16") as other,
        session(other) as to_other,
    ):
        generate_locally(to_other, request_key("in bfloat16"), near)
        expect_loading_to_win(pair.prefill, other.kv_address)
        key = request_key("in float32")
        source = worker_pb2.CacheSource(
            kv_address=other.kv_address, epoch=other.epoch, cached_tokens=2 * BLOCK
        )
        hand_over(pair.to_prefill, pair.to_decode, key, near, sources=[source])
        pair.to_decode.answer(key)
        assert pair.to_prefill.prefill_finished(key).fetched_tokens == 2 * BLOCK
        assert _cached(pair.prefill, prompt) == _cached(pair.decode, prompt) == [0, 5, 5]
