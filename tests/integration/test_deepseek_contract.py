"""The numeric contract for DeepSeek's models: batch, chunks, prefix hits, preemption, guesses and choices change no
token; nor does where a prefix is taken up."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.engine import Engine, EngineOptions
from engine.record_policy import RecordPolicy
from engine.request import SamplingParams
from engine.windows import WindowUse
from tests.contract_requests import prompts, samplings
from tests.deepseek_checkpoints import make_oracle, v3_config, v4_config, v32_config
from tests.engine_driver import ROOT_KEY, Driver, answer

pytestmark = pytest.mark.integration

VOCABULARY = {"vocab_size": 280}
CONFIGS = {
    "v3": lambda: v3_config(num_hidden_layers=2, **VOCABULARY),
    "v32": lambda: v32_config(num_hidden_layers=2, index_topk=160, **VOCABULARY),
    "v4": lambda: v4_config(
        num_hidden_layers=2, compress_ratios=[4, 128], num_hash_layers=1, index_topk=48, **VOCABULARY
    ),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp(request.param)
    make_oracle(CONFIGS[request.param](), home)
    return home


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home: Path = tmp_path_factory.mktemp("v4")
    make_oracle(CONFIGS["v4"](), home)
    return home


def open_engine(model: Path, **options: object) -> Engine:
    """By its clock every step takes equally long, so that every guess that may be right pays."""
    defaults: dict[str, object] = {
        "max_context": 1024,
        "kv_bytes": 64 << 20,
        "num_threads": 1,
        "max_sequences": 12,
    }
    return Engine.open(model, EngineOptions(**{**defaults, **options}), clock=count().__next__)  # type: ignore[arg-type]


def leave_blocks(engine: Engine, num_blocks: int) -> None:
    """Take all others away, without windows."""
    assert engine.pool.open(b"others", [], engine.pool.num_blocks - num_blocks, use=WindowUse.NONE) == 0


def forget(engine: Engine) -> None:
    """Everything that is cached."""
    assert engine.pool.open(b"all", [], engine.pool.num_blocks, use=WindowUse.NONE) == 0
    engine.pool.close(b"all")
    assert engine.pool.stats().cached == 0


def tokens(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 270) for _ in range(length)]


def test_interleaved_requests_equal_each_run_alone(model: Path) -> None:
    rng, requests = random.Random(7), list(zip(prompts(7, seed=1), samplings(7), strict=True))
    tight, roomy = open_engine(model, chunk_tokens=96), open_engine(model, max_drafts=0)
    assert tight.invariant
    leave_blocks(tight, 1024 // tight.layout.block_tokens)
    driver, waiting = Driver(tight), list(enumerate(requests))
    rng.shuffle(waiting)
    while waiting or tight.has_work():
        while waiting and rng.random() < 0.6 and driver.start(waiting[0][0], *waiting[0][1]):
            waiting.pop(0)
        driver.step()
        tight.pool.check()
    assert tight.scheduler.num_preemptions > 0
    assert sum(1 for cached in driver.cached_tokens.values() if cached) > 0
    for number, (prompt, sampling) in enumerate(requests):
        alone = answer(roomy, prompt, sampling)
        assert [o.token_ids for o in driver.outcomes[number]] == [o.token_ids for o in alone], (
            f"request {number}"
        )
    tight.pool.close(b"others")
    stats = tight.pool.stats()
    assert (stats.private, stats.pins, stats.owners, tight.num_leases) == (0, 0, 0, 0)


@pytest.mark.parametrize("period", [1, 5])
def test_guesses_change_nothing(model: Path, period: int) -> None:
    prompt = [7 + index % period for index in range(120)]
    sampling = replace(GREEDY, max_tokens=90, logit_bias=tuple((7 + i, 12.0) for i in range(period)))
    guessing = Driver(open_engine(model))
    guessing.start(0, prompt, sampling)
    guessing.run()
    assert guessing.num_drafts_kept > 0
    assert guessing.outcomes[0] == answer(open_engine(model, max_drafts=0), prompt, sampling)


@pytest.mark.parametrize("set_aside_bytes", [0, 64 << 20])
def test_an_answer_that_gave_way_comes_back_the_same(model: Path, set_aside_bytes: int) -> None:
    engine = open_engine(model, set_aside_bytes=set_aside_bytes, max_drafts=0)
    driver, asked = Driver(engine), [tokens(250, seed) for seed in range(3)]
    # One block short of what the answers need from their seventh token on.
    leave_blocks(engine, 3 * -(-250 // engine.layout.block_tokens) + 2)
    sampling = replace(GREEDY, max_tokens=40)
    assert all(driver.start(number, prompt, sampling) for number, prompt in enumerate(asked))
    driver.run()
    assert engine.scheduler.num_preemptions > 0
    roomy = open_engine(model, max_drafts=0)
    for number, prompt in enumerate(asked):
        assert driver.outcomes[number] == answer(roomy, prompt, sampling)


REPLAYED = 2 * 128  # a window for each layer
POLICIES = [RecordPolicy(), RecordPolicy("full"), RecordPolicy("periodic", 256), RecordPolicy("zero")]


@pytest.mark.parametrize("policy", POLICIES, ids=[policy.kind for policy in POLICIES])
@pytest.mark.parametrize("length", [128, 700])
def test_a_prefix_taken_up_gives_the_same_answer(v4: Path, policy: RecordPolicy, length: int) -> None:
    """The same prompt again, one that goes on after the answer, and two that part from it on the way."""
    engine = open_engine(v4, window_records=policy)
    fresh = open_engine(v4, kv_bytes=32 << 20)
    first, short = tokens(length, seed=3), replace(GREEDY, max_tokens=12)
    told = answer(engine, first, GREEDY)
    turns = first + told[0].token_ids + tokens(20, seed=4)
    parting = [first[: length // 2] + tokens(150, seed) for seed in (5, 6)]
    hits = []
    for prompt in (first, turns, *parting):
        driver = Driver(engine)
        driver.start(0, prompt, short)
        driver.run()
        hits.append(driver.cached_tokens[0])
        assert driver.outcomes[0] == answer(fresh, prompt, short)
        forget(fresh)
    repeated, continued, junction = (length - 1) // 128 * 128, (length + 29) // 128 * 128, length // 256 * 128
    expected = {
        "ends": [repeated, continued, 0, junction],
        "full": [repeated, continued, junction, junction],
        "periodic": [
            repeated // 256 * 256,
            continued // 256 * 256,
            junction // 256 * 256,
            junction // 256 * 256,
        ],
        "zero": [max(0, hit - REPLAYED) for hit in (repeated, continued, junction, junction)],
    }
    assert hits == expected[policy.kind]


def test_a_prefix_is_taken_up_at_every_boundary(v4: Path) -> None:
    """Prompts that part from a cached one after 1 to 6 blocks, each with and without what is cached."""
    engine, fresh = open_engine(v4, window_records=RecordPolicy("full")), open_engine(v4)
    first, short = tokens(6 * 128 + 5, seed=3), replace(GREEDY, max_tokens=3)
    answer(engine, first, short)
    for boundary in range(128, 6 * 128 + 1, 128):
        for num_more in (1, 131):
            prompt = first[:boundary] + tokens(num_more, seed=boundary + num_more)
            driver = Driver(engine)
            driver.start(0, prompt, short)
            driver.run()
            assert driver.cached_tokens[0] == boundary
            assert driver.outcomes[0] == answer(fresh, prompt, short)
            forget(fresh)


def test_choices_share_a_prompt_and_no_window(v4: Path) -> None:
    sampling = replace(GREEDY, temperature=1.0, seed=5, n=3, max_tokens=70)
    prompt = tokens(200, seed=8)
    together = answer(open_engine(v4), prompt, sampling)
    assert len({tuple(outcome.token_ids) for outcome in together}) == 3
    engine = open_engine(v4, max_drafts=0)
    assert [outcome.token_ids for outcome in answer(engine, prompt, sampling)] == [
        outcome.token_ids for outcome in together
    ]


def test_no_more_sequences_than_window_slots(v4: Path) -> None:
    engine = open_engine(v4, max_sequences=2)
    leases = [number.to_bytes(16, "little") for number in range(3)]
    assert [engine.reserve(lease, tokens(9, seed=1), 1, ROOT_KEY) for lease in leases] == [0, 0, None]
    engine.release(leases[0])
    assert engine.reserve(leases[2], tokens(9, seed=1), 1, ROOT_KEY) == 0


def test_numbers_that_are_none_stay_in_their_sequence(model: Path, tmp_path: Path) -> None:
    """A prompt with a token whose embedding is not a number, beside one without."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "embed" in name)
    tensors[name][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    engine = open_engine(tmp_path, max_drafts=0, chunk_tokens=300)
    good, bad = tokens(260, seed=1), [*tokens(250, seed=2), 3, *tokens(9, seed=3)]
    driver, short = Driver(engine), replace(GREEDY, max_tokens=4)
    assert all(driver.start(number, prompt, short) for number, prompt in enumerate((good, bad)))
    driver.run()
    assert driver.outcomes[1][0].failure is not None
    assert driver.outcomes[0] == answer(open_engine(model, max_drafts=0), good, short)
    engine.pool.check()
    assert answer(engine, bad[:250], short) == answer(open_engine(model, max_drafts=0), bad[:250], short)
