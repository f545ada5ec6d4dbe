"""A token is a function of the tokens before it alone: batch, chunks, prefix hits, preemption and guesses change
nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch

from engine.engine import Engine, EngineOptions
from engine.events import PrefillDone
from engine.models.config import ModelConfig
from engine.models.packed import runs_packed
from engine.request import FinishReason, SamplingParams
from kvtransfer.layouts import pieces_for
from tests.contract_requests import prompts, samplings
from tests.engine_driver import ROOT_KEY, Driver, answer
from tests.tiny_model import make_tiny_model

# One group: the first test of a process compiles the kernels.
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("kernels")]

KINDS = ["float32", "int8", "float32 in kernels", "int8 in kernels", "bfloat16 in kernels"]
MAX_CONTEXT = 1024
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Model:
    """What is opened, and how exact its products are."""

    path: Path
    precision: str
    in_kernels: bool


@pytest.fixture(scope="module", params=KINDS)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Model:
    precision, _, in_kernels = request.param.partition(" ")
    widths = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64} if in_kernels else {}
    home = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_context=MAX_CONTEXT, **widths)
    kv_dtype = "float32" if precision == "float32" else "bfloat16"
    if in_kernels and not runs_packed(ModelConfig.open(home), precision, kv_dtype, torch.device("cpu")):
        pytest.skip(f"this processor has no kernels for {precision}")
    return Model(home, precision, bool(in_kernels))


@pytest.fixture(scope="module")
def roomy(model: Model) -> Engine:
    """An engine with room for everything, chunks of its own and no guesses; its prefix cache must not change anything
    either."""
    return open_engine(model, chunk_tokens=512, max_drafts=0)


def open_engine(model: Model, **options: object) -> Engine:
    """By its clock every step takes equally long, so that every guess that may be right pays."""
    defaults: dict[str, object] = {"max_context": MAX_CONTEXT, "kv_bytes": 32 << 20, "num_threads": 1}
    engine_options = EngineOptions(precision=model.precision, **{**defaults, **options})  # type: ignore[arg-type]
    return Engine.open(model.path, engine_options, clock=count().__next__)


def kv_bytes_of(model: Model, num_blocks: int) -> int:
    return open_engine(model).layout.num_bytes(BLOCK_TOKENS) * num_blocks


def test_the_probe_finds_the_contract_kept(model: Model) -> None:
    assert open_engine(model).invariant


def test_interleaved_requests_equal_each_run_alone(model: Model, roomy: Engine) -> None:
    rng, count = random.Random(7), 64 if model.in_kernels else 24  # single operations take four times as long
    requests = list(zip(prompts(count, seed=1), samplings(count), strict=True))
    tight = open_engine(model, kv_bytes=kv_bytes_of(model, 22), chunk_tokens=96)
    driver = Driver(tight)
    waiting = list(enumerate(requests))
    rng.shuffle(waiting)
    while waiting or tight.has_work():
        while waiting and rng.random() < 0.6 and driver.start(waiting[0][0], *waiting[0][1]):
            waiting.pop(0)
        driver.step()
    assert tight.scheduler.num_preemptions > 0
    assert 0 < driver.num_drafts_kept < driver.num_drafts
    assert sum(1 for cached in driver.cached_tokens.values() if cached) > 3

    for number, (prompt, sampling) in enumerate(requests):
        alone = answer(roomy, prompt, sampling)
        together = driver.outcomes[number]
        assert [o.token_ids for o in together] == [o.token_ids for o in alone], f"request {number}"
    stats = tight.pool.stats()
    assert (stats.private, stats.pins, stats.owners, tight.num_leases) == (0, 0, 0, 0)


@pytest.mark.parametrize("sampling", samplings(4), ids=["greedy", "seeded", "penalties", "choices"])
@pytest.mark.parametrize("period", [1, 5, 40])
def test_guesses_change_nothing(model: Model, roomy: Engine, sampling: SamplingParams, period: int) -> None:
    prompt = [7 + index % period for index in range(120)]
    biased = replace(sampling, logprobs=2, logit_bias=tuple((7 + i, 12.0) for i in range(period)))
    guessing = Driver(open_engine(model))
    guessing.start(0, prompt, biased)
    guessing.run()
    assert guessing.num_drafts_kept > 0 or period > 1
    assert guessing.outcomes[0] == answer(roomy, prompt, biased)


def test_a_stop_among_guesses_ends_the_answer_there(model: Model, roomy: Engine) -> None:
    """The prompt foretells the token that stops, and more after it."""
    phrase = [10, 11, 12, 13, 14, 15, 16, 17]
    bias = tuple((token, 30.0) for token in phrase)
    engine, ends = open_engine(model), []
    for stop in phrase:
        sampling = SamplingParams(
            temperature=1.0,
            seed=3,
            max_tokens=60,
            min_tokens=9,
            stop_token_ids=frozenset({stop}),
            logit_bias=bias,
        )
        guessing = answer(engine, phrase * 9, sampling)
        assert guessing == answer(roomy, phrase * 9, sampling)
        ends.append(guessing[0].finish)
    assert FinishReason.STOP in ends


@pytest.mark.parametrize("set_aside_bytes", [0, 32 << 20])
def test_a_preempted_answer_comes_back_the_same(model: Model, roomy: Engine, set_aside_bytes: int) -> None:
    """With room to set it aside no token of its prompt is computed again."""
    engine = open_engine(model, kv_bytes=kv_bytes_of(model, 17), set_aside_bytes=set_aside_bytes)
    driver = Driver(engine)
    requests = [
        (prompt, SamplingParams(temperature=0.8, seed=index, max_tokens=200))
        for index, prompt in enumerate(
            ([20] * 250, [30 + i % 9 for i in range(250)], [50 + i % 70 for i in range(250)])
        )
    ]
    for number, (prompt, sampling) in enumerate(requests):
        assert driver.start(number, prompt, sampling)
    driver.run()
    assert engine.scheduler.num_preemptions > 0
    again = driver.num_prefill_tokens - sum(len(prompt) for prompt, _ in requests)
    assert again == 0 if set_aside_bytes else again > 0
    for number, (prompt, sampling) in enumerate(requests):
        assert driver.outcomes[number] == answer(roomy, prompt, sampling)
    assert engine.pool.stats().private == 0


def test_a_choice_that_waits_gets_the_blocks_of_those_that_have_ended(model: Model, roomy: Engine) -> None:
    """Three choices of four blocks, the first of them shared, where there is room for two."""
    sampling = SamplingParams(temperature=0.9, seed=5, n=3, max_tokens=80, ignore_eos=True)
    prompt = [7 + index % 200 for index in range(120)]
    engine = open_engine(model, kv_bytes=kv_bytes_of(model, 8), max_context=256, max_drafts=0)
    driver = Driver(engine)
    assert driver.start(0, prompt, sampling)
    for _ in range(400):
        driver.step()
    assert engine.scheduler.num_preemptions > 0
    assert not engine.has_work()
    assert driver.outcomes[0] == answer(roomy, prompt, sampling)
    stats = engine.pool.stats()
    assert (stats.private, stats.pins, stats.owners, engine.num_leases) == (0, 0, 0, 0)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 100, 1024])
def test_chunk_size_changes_nothing(model: Model, roomy: Engine, chunk_tokens: int) -> None:
    prompt = prompts(2, seed=3)[1] * 3
    sampling = SamplingParams(temperature=0.8, seed=5, max_tokens=20, logprobs=3)
    cut = answer(open_engine(model, chunk_tokens=chunk_tokens), prompt[:400], sampling)
    whole = answer(roomy, prompt[:400], sampling)
    assert cut == whole


def test_threads_change_nothing(model: Model) -> None:
    prompt = prompts(5, seed=4)[4][:300]
    sampling = SamplingParams(temperature=0.8, seed=5, max_tokens=20, logprobs=3)
    one = answer(open_engine(model, num_threads=1), prompt, sampling)
    two = answer(open_engine(model, num_threads=2), prompt, sampling)
    assert one == two


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 256, 300])
def test_a_handed_over_prompt_goes_on_as_if_computed_here(
    model: Model, roomy: Engine, num_tokens: int
) -> None:
    prompt = [(index * 31 + 7) % 260 + 4 for index in range(num_tokens)]
    sampling = SamplingParams(temperature=0.9, seed=21, max_tokens=16, n=2)
    here, there = open_engine(model, chunk_tokens=50), open_engine(model, chunk_tokens=128)
    lease, local = b"d" * 16, b"p" * 16
    there.reserve(lease, prompt, 2, ROOT_KEY)
    here.reserve(local, prompt, 2, ROOT_KEY)
    here.submit(local, prompt, sampling, prefill_only=True)
    first = []
    while here.has_work():
        first += [event.first for event in here.step().events if isinstance(event, PrefillDone)]
    for piece in pieces_for(here.layout, range(num_tokens)):
        wire = here.layout.plane(piece.plane)
        there.cache.scatter(lease, piece, wire, here.cache.gather(local, piece, wire))
    there.adopt(lease, prompt, sampling, first[0])
    answers = [[drawn.token_id] for drawn in first[0]]
    while there.has_work():
        for event in there.step().events:
            answers[event.choice].append(event.drawn.token_id)  # type: ignore[union-attr, index]
    for engine, owner in ((here, local), (there, lease)):
        engine.release(owner)
        assert engine.pool.stats().private == 0
    alone = answer(roomy, prompt, sampling)
    assert answers == [outcome.token_ids for outcome in alone]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_nan_ends_its_own_request_and_leaves_no_trace(tmp_path: Path, precision: str) -> None:
    poisoned = Model(
        make_tiny_model(tmp_path / "nan", max_context=MAX_CONTEXT, nan_token_id=9), precision, False
    )
    engine = open_engine(poisoned, kv_bytes=kv_bytes_of(poisoned, 18))
    good = SamplingParams(temperature=0.0, max_tokens=8, logit_bias=((9, -100.0),))
    prompt = [20 + index % 200 for index in range(150)]
    expected = answer(engine, prompt, good)
    driver = Driver(engine)
    driver.start(1, [30 + index for index in range(70)], good)
    driver.start(2, [9] * 100, good)
    driver.run()
    assert driver.outcomes[2][0].failure == "NAN_LOGITS"
    assert driver.outcomes[1][0].finish is FinishReason.LENGTH
    for repeat in range(20):  # soon every block has been the failed request's
        assert answer(engine, [repeat + 10, *prompt[1:]], good)[0].failure is None
    assert answer(engine, prompt, good) == expected


def test_release_in_mid_step_gives_blocks_back_when_the_step_is_applied(model: Model) -> None:
    engine = open_engine(model)
    lease = b"x" * 16
    engine.reserve(lease, [5] * 200, 1, ROOT_KEY)
    engine.submit(lease, [5] * 200, SamplingParams(max_tokens=4), prefill_only=False)
    forward = engine.runner.forward

    def release_while_computing(batch, after_layer):  # type: ignore[no-untyped-def]
        engine.release(lease)
        assert engine.pool.stats().private > 0
        return forward(batch, after_layer)

    engine.runner.forward = release_while_computing  # type: ignore[method-assign]
    assert engine.step().events == ()
    assert engine.pool.stats().private == 0
    assert not engine.has_work()


OPEN = """
import sys
from pathlib import Path
from engine.engine import Engine, EngineOptions
options = EngineOptions(precision="bfloat16", max_context=1024, kv_bytes=32 << 20)
print(Engine.open(Path(sys.argv[1]), options).invariant)
"""


def test_bfloat16_keeps_the_contract_without_kernels_too(tmp_path: Path) -> None:
    """In a process of its own: what oneDNN may use is settled with the first product."""
    home = make_tiny_model(tmp_path / "tiny", max_context=MAX_CONTEXT)
    assert not runs_packed(ModelConfig.open(home), "bfloat16", "bfloat16", torch.device("cpu"))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(home)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "True", done.stderr
