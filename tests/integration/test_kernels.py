"""The engine's compiled kernels: what they compute is what torch does, whatever the rows beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.compiling import are_compiled, compile_kernels
from engine.engine import Engine
from engine.events import ChunkDone
from engine.kernels.functions import exp, exp_of_negative
from engine.kernels.lanes import load, store
from engine.kernels.processor import HAS_WIDE_VECTORS
from engine.models.packed import PackedDecoder
from engine.request import SamplingParams
from engine.runner import EngineOptions
from tests.engine_driver import Driver, answer
from tests.tiny_model import make_tiny_model

# One group: the first test of a process compiles the kernels.
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("kernels")]

KINDS = ["int8", "int8 in lanes", "bfloat16", "bfloat16 in lanes", "float32", "float32 over bfloat16"]
OFF = {"int8": 0.05, "bfloat16": 0.02, "float32": 1e-5}
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 64, 128


needs_wide_vectors = pytest.mark.skipif(not HAS_WIDE_VECTORS, reason="vectors of 64 bytes are needed")


@pytest.fixture(scope="module", params=["biases", "head norms"])
def model_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Wide enough for kernels, and with what SmolLM2 has not."""
    home = make_tiny_model(
        tmp_path_factory.mktemp("model") / "tiny",
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        intermediate_size=192,
        max_context=1024,
    )
    config, weights = json.loads((home / "config.json").read_text()), load_file(home / "model.safetensors")
    rng = np.random.default_rng(5)
    widths = {
        "q_proj": HEADS * HEAD_SIZE,
        "k_proj": KV_HEADS * HEAD_SIZE,
        "v_proj": KV_HEADS * HEAD_SIZE,
        "o_proj": HIDDEN,
    }
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        if request.param == "biases":
            config["attention_bias"] = True
            weights |= {f"{at}.{n}.bias": rng.normal(0, 0.1, w).astype(np.float32) for n, w in widths.items()}
        else:
            config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
            for name in ("q_norm", "k_norm"):
                weights[f"{at}.{name}.weight"] = rng.uniform(0.5, 1.5, HEAD_SIZE).astype(np.float32)
    (home / "config.json").write_text(json.dumps(config))
    save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
    return home


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    if kind.endswith("in lanes"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    return kind


def options(kind: str, **changes: object) -> EngineOptions:
    defaults: dict[str, object] = {"max_context": 1024, "kv_bytes": 16 << 20, "num_threads": 1}
    if kind.endswith("over bfloat16"):
        defaults["kv_dtype"] = "bfloat16"
    return EngineOptions(precision=kind.split()[0], **{**defaults, **changes})  # type: ignore[arg-type]


def open_packed(model_dir: Path, kind: str, **changes: object) -> Engine:
    engine = Engine.open(model_dir, options(kind, **changes))
    if not isinstance(engine.runner._model, PackedDecoder):
        pytest.skip(f"this processor has no kernels for {kind}")
    return engine


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, 270, length).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=3)


def test_logits_are_those_of_plain_torch(model_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_packed(model_dir, kind)
    monkeypatch.setattr("engine.runner.runs_packed", lambda *_: False)
    plain = Engine.open(model_dir, options("float32"))
    for length in (1, 31, 150):
        tokens = prompt(length, seed=length)
        ours, theirs = (_logprobs(each, tokens) for each in (engine, plain))
        off = np.std([ours[token] - theirs[token] for token in theirs]) / np.std(list(theirs.values()))
        assert off < (0.02 if kind.endswith("over bfloat16") else OFF[kind.split()[0]])


def _logprobs(engine: Engine, tokens: list[int]) -> dict[int, float]:
    """Of every first token."""
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=engine.config.vocab_size
    )
    [logprobs] = answer(engine, tokens, sampling)[0].logprobs
    assert logprobs is not None
    return dict(logprobs.top)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_an_answer_is_the_same_alone_and_among_others(model_dir: Path, kind: str, num_threads: int) -> None:
    alone = open_packed(model_dir, kind)
    assert alone.invariant
    prompts = [prompt(length, seed=length) for length in (1, 2, 33, 64, 65, 200, 301)]
    expected = {number: answer(alone, tokens, greedy(12)) for number, tokens in enumerate(prompts)}
    driver = Driver(open_packed(model_dir, kind, num_threads=num_threads, chunk_tokens=200))
    for number, tokens in enumerate(prompts):
        assert driver.start(number, tokens, greedy(12))
    driver.run()
    assert driver.outcomes == expected


def test_numbers_that_are_none_stay_in_their_sequence(model_dir: Path, kind: str) -> None:
    engine, healthy = open_packed(model_dir, kind), prompt(70, seed=1)
    expected = answer(engine, healthy, greedy(4))
    model = engine.runner._model
    assert isinstance(model, PackedDecoder)
    model._embedding[3] = float("nan")
    driver = Driver(engine)
    assert driver.start(1, [3, *prompt(40, seed=2)], greedy(4))
    assert driver.start(2, healthy, greedy(4))
    driver.run()
    assert driver.outcomes[1][0].failure == "NAN_LOGITS"
    assert driver.outcomes[2] == expected


def test_a_chunk_is_told_of_as_often_as_without_kernels(tmp_path: Path) -> None:
    home = make_tiny_model(
        tmp_path / "deep", num_layers=8, hidden_size=64, num_heads=1, num_kv_heads=1, head_dim=64
    )
    engine = open_packed(home, "int8")
    told: list[ChunkDone] = []
    engine.on_progress = lambda result: told.extend(e for e in result.events if isinstance(e, ChunkDone))
    tokens, lease_id = prompt(40, seed=1), bytes(16)
    assert engine.reserve(lease_id, tokens, 1, b"tests") is not None
    engine.submit(lease_id, tokens, greedy(1), prefill_only=True)
    engine.step()
    assert [each.num_layers for each in told] == [2, 4, 6]


@needs_wide_vectors
@pytest.mark.parametrize(
    "numbers", [[0.0], [-1e-6, -0.3, -1.0, -20.0, -87.0], [-104.0, -1e30, -np.inf], [np.nan]]
)
def test_exponentials(numbers: list[float]) -> None:
    x = np.resize(np.asarray(numbers, np.float32), 16)
    for function, off in ((exp, 1e-6), (exp_of_negative, 4e-6)):
        out = np.empty(16, np.float32)
        _apply(function)(x, out)
        np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=off, atol=1e-38)
        assert bool((out[x == 0] == 1).all())
        assert bool((out[x < -103] == 0).all())


def _apply(function: Callable[..., object]) -> Callable[[np.ndarray, np.ndarray], None]:
    @numba.njit
    def loop(x: np.ndarray, out: np.ndarray) -> None:
        store(out, 0, function(load(x, 0)))

    return loop  # type: ignore[no-any-return]


@needs_wide_vectors
def test_bfloat16_is_rounded_to_even() -> None:
    @numba.njit
    def loop(x: np.ndarray, out: np.ndarray) -> None:
        store(out, 0, load(x, 0))

    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    x[:2] = 1 + 2**-8, 1 + 3 * 2**-8  # halves
    out = np.empty(16, np.uint16)
    loop(x, out)
    assert out.tolist() == torch.from_numpy(x).bfloat16().view(torch.uint16).tolist()


def test_kernels_are_compiled_once_and_only_for_models_that_run_in_them(
    model_dir: Path, tmp_path: Path
) -> None:
    open_packed(model_dir, "float32")
    assert are_compiled()
    assert not compile_kernels(model_dir)
    assert not compile_kernels(make_tiny_model(tmp_path / "narrow"))
