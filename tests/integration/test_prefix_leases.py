"""Prefixes that others read from the cache and write into it, and what fidelity and tenants make of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.events import PrefillDone
from engine.request import Drawn, SamplingParams
from engine.runner import EngineError, EngineOptions
from kvtransfer.layouts import Piece, pieces_for
from tests.engine_driver import ROOT_KEY, Driver, answer
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

BLOCK = 64
MAX_CONTEXT = 512
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPT = [random.Random(1).randrange(4, 270) for _ in range(4 * BLOCK + 20)]
READER, WRITER = b"r" * 16, b"w" * 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_context=MAX_CONTEXT)


def open_engine(model_dir: Path, num_blocks: int = 40, **options: object) -> Engine:
    kv_bytes = num_blocks * 2 * 2 * 2 * 16 * 4 * BLOCK  # keys and values, 2 layers, 2 heads of 16 floats
    defaults: dict[str, object] = {"max_context": MAX_CONTEXT, "kv_bytes": kv_bytes, "max_sequences": 4}
    return Engine.open(model_dir, EngineOptions(**{**defaults, **options}))  # type: ignore[arg-type]


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return open_engine(model_dir)


@pytest.fixture(scope="module")
def source(model_dir: Path) -> Engine:
    """Another worker, which has answered the prompt."""
    engine = open_engine(model_dir)
    answer(engine, PROMPT, GREEDY)
    return engine


def keys_of(engine: Engine, prompt: list[int] = PROMPT) -> list[bytes]:
    return engine.prefix_keys(ROOT_KEY, prompt)


def pieces(engine: Engine, first_block: int, num_blocks: int) -> list[Piece]:
    return pieces_for(engine.layout, range(first_block * BLOCK, num_blocks * BLOCK), target_bytes=4096)


def copy(source: Engine, engine: Engine, first_block: int, num_blocks: int) -> None:
    """The blocks that READER has pinned in `source` into those of WRITER in `engine`."""
    for piece in pieces(source, first_block, num_blocks):
        wire = source.layout.plane(piece.plane)
        engine.cache.scatter(WRITER, piece, wire, source.cache.gather(READER, piece, wire))


def fetch(source: Engine, engine: Engine, *, num_filled: int = 4, fidelity: int = 0, bound: int = 0) -> None:
    """Bring the leading blocks of the prompt into the engine's cache."""
    keys = keys_of(engine)
    assert source.pin(READER, keys, bound=0) == (4, 0)
    num_hit = engine.open_prefix(WRITER, keys, bound)
    assert num_hit is not None
    copy(source, engine, num_hit, num_filled)
    engine.seal_prefix(WRITER, keys, num_filled, fidelity)
    engine.release(WRITER)
    source.release(READER)


def reserved(engine: Engine, bound: int = 0, tenant: str = "") -> int | None:
    """Tokens of the prompt that a request would find cached now."""
    cached = engine.reserve(b"probe", PROMPT, 1, ROOT_KEY, bound=bound, tenant=tenant)
    engine.release(b"probe")
    return cached


def idle(engine: Engine) -> bool:
    engine.pool.check()
    stats = engine.pool.stats()
    return (engine.num_leases, stats.private, stats.pins, stats.owners) == (0, 0, 0, 0)


def test_a_fetched_prefix_is_as_good_as_a_computed_one(source: Engine, engine: Engine) -> None:
    fetch(source, engine)
    assert idle(engine)
    assert idle(source)
    driver = Driver(engine)
    driver.start(1, PROMPT, GREEDY)
    driver.run()
    assert driver.cached_tokens[1] == 4 * BLOCK
    assert driver.outcomes[1] == answer(source, PROMPT, GREEDY)


def test_only_what_is_missing_has_to_be_filled(source: Engine, engine: Engine) -> None:
    answer(engine, PROMPT[: 2 * BLOCK + 1], SamplingParams(temperature=0.0, max_tokens=1))
    assert engine.open_prefix(WRITER, keys_of(engine), 0) == 2
    source.pin(READER, keys_of(source), 0)
    copy(source, engine, 2, 4)
    engine.seal_prefix(WRITER, keys_of(engine), 4, 0)
    engine.release(WRITER)
    source.release(READER)
    assert reserved(engine) == 4 * BLOCK


def test_a_prefix_that_came_in_part_is_cached_in_part(source: Engine, engine: Engine) -> None:
    fetch(source, engine, num_filled=3)
    assert reserved(engine) == 3 * BLOCK
    assert idle(engine)


def test_an_unfinished_prefix_leaves_nothing_but_what_was_there(engine: Engine) -> None:
    answer(engine, PROMPT[: 2 * BLOCK + 1], SamplingParams(temperature=0.0, max_tokens=1))
    engine.open_prefix(WRITER, keys_of(engine), 0)
    blocks = list(engine.pool.blocks(WRITER))[2:]
    nan = torch.full((1,), float("nan"))
    for piece in pieces(engine, 2, 4):
        wire = engine.layout.plane(piece.plane)
        data = nan.repeat(wire.num_bytes(piece) // 4).view(torch.uint8)
        engine.cache.scatter(WRITER, piece, wire, data)
    engine.release(WRITER)
    engine.release(WRITER)
    assert idle(engine)
    assert reserved(engine) == 2 * BLOCK
    for tensor in engine.cache.planes.values():
        for block in blocks:
            assert not tensor[:, :, block * BLOCK : (block + 1) * BLOCK].any()


def test_a_reservation_that_is_given_back_leaves_its_prefix_cached(engine: Engine) -> None:
    answer(engine, PROMPT, GREEDY)
    assert [reserved(engine) for _ in range(2)] == [4 * BLOCK, 4 * BLOCK]


def test_pinned_blocks_stay_and_unknown_ones_are_not_pinned(model_dir: Path) -> None:
    engine = open_engine(model_dir, num_blocks=12)
    answer(engine, PROMPT, GREEDY)
    keys = keys_of(engine)
    assert engine.pin(READER, [b"unknown", *keys], 0) is None
    assert engine.pin(READER, [*keys[:3], b"unknown"], 0) == (3, 0)
    for seed in range(6):
        answer(engine, [seed + 4] * 300, GREEDY)
    piece = Piece("k", range(2), range(2), range(3 * BLOCK))
    wire = engine.layout.plane("k")
    assert len(engine.cache.gather(READER, piece, wire)) == wire.num_bytes(piece)
    with pytest.raises(ValueError, match="entries up to 193"):
        engine.cache.gather(READER, Piece("k", range(2), range(2), range(193)), wire)
    assert reserved(engine) == 3 * BLOCK
    engine.release(READER)
    assert idle(engine)


def test_prefixes_take_no_place_of_a_sequence_but_leave_running_answers_their_block(
    model_dir: Path,
) -> None:
    engine = open_engine(model_dir, num_blocks=10, max_sequences=1)
    answer(engine, PROMPT[: 2 * BLOCK + 1], SamplingParams(temperature=0.0, max_tokens=1))
    assert engine.pin(READER, keys_of(engine), 0) == (2, 0)
    assert engine.num_leases == 1
    driver = Driver(engine)
    assert driver.start(1, [9] * 300, GREEDY)
    driver.step()
    assert engine.pool.num_available == 3
    assert engine.open_prefix(WRITER, [b"%d" % index for index in range(3)], 0) is None
    assert engine.open_prefix(WRITER, [b"%d" % index for index in range(2)], 0) == 0
    assert engine.num_leases == 3
    engine.release(WRITER)
    engine.release(READER)
    driver.run()
    assert idle(engine)


def test_an_exact_request_never_takes_a_lossy_block(source: Engine, engine: Engine) -> None:
    fetch(source, engine, fidelity=1, bound=2)
    assert [reserved(engine, bound) for bound in (0, 1, 2)] == [0, 4 * BLOCK, 4 * BLOCK]
    assert engine.pin(READER, keys_of(engine), 0) is None
    assert engine.pin(READER, keys_of(engine), 2) == (4, 1)
    engine.release(READER)
    answer(engine, PROMPT, GREEDY)
    assert reserved(engine) == 4 * BLOCK
    assert engine.pin(READER, keys_of(engine), 2) == (4, 0)
    assert engine.pool.stats().cached == 8


def test_what_is_computed_on_a_lossy_prefix_is_pushed_and_cached_as_lossy(
    source: Engine, engine: Engine
) -> None:
    fetch(source, engine, fidelity=1, bound=1, num_filled=2)
    assert engine.reserve(WRITER, PROMPT, 1, ROOT_KEY, bound=1) == 2 * BLOCK
    assert engine.fidelity_of(WRITER) == 1
    engine.submit(WRITER, PROMPT, GREEDY, prefill_only=True)
    while engine.has_work():
        engine.step()
    engine.release(WRITER)
    assert [reserved(engine, bound) for bound in (0, 1)] == [0, 4 * BLOCK]


def first_token(engine: Engine) -> tuple[Drawn, ...]:
    engine.reserve(READER, PROMPT, 1, ROOT_KEY)
    engine.submit(READER, PROMPT, GREEDY, prefill_only=True)
    first = next(
        event.first for _ in range(100) for event in engine.step().events if isinstance(event, PrefillDone)
    )
    engine.release(READER)
    return first


def test_a_handed_over_prompt_is_cached_under_the_fidelity_that_landed(
    source: Engine, engine: Engine
) -> None:
    first = first_token(source)
    engine.reserve(WRITER, PROMPT, 1, ROOT_KEY, bound=1)
    with pytest.raises(ValueError, match="rank 2 landed, but the lease was reserved for 1"):
        engine.adopt(WRITER, PROMPT, GREEDY, first, fidelity=2)
    (sequence,) = engine.adopt(WRITER, PROMPT, GREEDY, first, fidelity=1)
    assert (sequence.bound, engine.fidelity_of(WRITER)) == (1, 1)
    while engine.has_work():
        engine.step()
    engine.release(WRITER)
    assert [reserved(engine, bound) for bound in (0, 1)] == [0, 4 * BLOCK]
    with pytest.raises(KeyError):
        engine.fidelity_of(WRITER)


def test_sealing_beyond_the_lease_is_refused(engine: Engine) -> None:
    keys = keys_of(engine)
    engine.open_prefix(WRITER, keys, 1)
    with pytest.raises(ValueError, match="4 blocks of rank 2 to seal"):
        engine.seal_prefix(WRITER, keys, 4, 2)
    with pytest.raises(ValueError, match="5 blocks of rank 0 to seal"):
        engine.seal_prefix(WRITER, [*keys, b"one more"], 5, 0)
    engine.release(WRITER)
    assert reserved(engine) == 0


def test_no_tenants_prompts_evict_anothers_prefix(model_dir: Path) -> None:
    engine = open_engine(model_dir, num_blocks=20, tenant_share=0.5)
    assert serve(engine, PROMPT, "quiet") == 0
    for seed in range(8):
        serve(engine, [seed + 4] * 400, "loud")
    assert serve(engine, PROMPT, "quiet") == 4 * BLOCK


def serve(engine: Engine, prompt: list[int], tenant: str) -> int | None:
    """Compute a prompt for a tenant; returns what of it was cached."""
    cached = engine.reserve(WRITER, prompt, 1, ROOT_KEY + tenant.encode(), tenant=tenant)
    engine.submit(WRITER, prompt, SamplingParams(temperature=0.0, max_tokens=1), prefill_only=False)
    while engine.has_work():
        engine.step()
    engine.release(WRITER)
    return cached


def test_a_share_that_holds_no_context_is_refused(model_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"share of 0\.25 of 20 blocks is less than the 9"):
        open_engine(model_dir, num_blocks=20, tenant_share=0.25)
