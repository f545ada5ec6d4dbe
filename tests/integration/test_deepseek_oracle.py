"""DeepSeek's logits against transformers', at prompt lengths around every boundary of the compressed cache, in chunks
of every size and token by token after.

Tolerance: a logit differs by at most TOLERANCE times the largest logit. While `index_topk` covers all entries, the
oracle agrees with itself to a tenth of that. Where it does not, scores that tie at 0 fall differently for it from shape
to shape (ours have a stated order), so there the oracle is given the entries that were selected here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from engine.models.deepseek.selection import best_entries
from engine.request import SamplingParams, Sequence
from engine.runner import EngineOptions, ModelRunner
from engine.scheduler import StepPlan, StepRow
from kvtransfer.layouts import pieces_for, window_pieces_for
from tests.deepseek_checkpoints import make_oracle, v3_config, v4_config, v32_config
from tests.oracle import compare, forced_logits, oracle_logits

pytestmark = pytest.mark.integration

TOLERANCE = 1e-5
VOCABULARY = 96
NUM_TOKENS = 900
LENGTHS = [3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600]
CHUNKS = [1, 7, 128, 512]

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"v3": v3_config, "v32": v32_config, "v4": v4_config}


class Pair:
    """The oracle and our model of the same weights, and the oracle's logits of one text."""

    def __init__(self, config: PreTrainedConfig, directory: Path) -> None:
        self.home = directory
        self.oracle: PreTrainedModel = make_oracle(config, directory)
        self.runner = open_runner(directory)
        self.tokens = np.random.default_rng(1).integers(0, VOCABULARY, NUM_TOKENS).tolist()
        self.expected = oracle_logits(self.oracle, self.tokens)


def open_runner(directory: Path, **changes: Any) -> ModelRunner:
    defaults: dict[str, Any] = {
        "max_context": 1024,
        "kv_bytes": 64 << 20,
        "max_sequences": 4,
        "num_threads": 1,
    }
    return ModelRunner(directory, EngineOptions(precision="float32", **(defaults | changes)))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


def in_chunks(num_tokens: int, chunk: int) -> Iterator[int]:
    for start in range(0, num_tokens, chunk):
        yield min(chunk, num_tokens - start)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_are_those_of_transformers(pair: Pair, chunk: int) -> None:
    """All positions of a prompt in chunks, those after it one by one."""
    num_prompt = {1: 64, 7: 300}.get(chunk, 600)
    sizes = [*in_chunks(num_prompt, chunk), *[1] * (140 if chunk == 128 else 10)]
    tokens = pair.tokens[: sum(sizes)]
    agreement = compare(forced_logits(pair.runner, tokens, sizes), pair.expected[: len(tokens)])
    print(agreement)  # noqa: T201 - shown with -s, and where the test fails
    assert agreement.max_difference <= TOLERANCE * agreement.max_logit


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_of_any_length_is_gone_on_from(pair: Pair, length: int) -> None:
    sizes = [length, 1, 1, 1, 1, 1]
    logits = forced_logits(pair.runner, pair.tokens[: sum(sizes)], sizes)
    agreement = compare(logits, pair.expected[: len(logits)])
    assert agreement.max_difference <= TOLERANCE * agreement.max_logit


def test_chunks_change_no_bit(pair: Pair) -> None:
    tokens = pair.tokens[:300]
    whole = forced_logits(pair.runner, tokens, [300])
    for sizes in ([3, 125, 1, 127, 44], [*in_chunks(300, 7)]):
        assert np.array_equal(forced_logits(pair.runner, tokens, sizes), whole)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_no_bit(pair: Pair, num_threads: int) -> None:
    tokens = pair.tokens[:400]
    expected = forced_logits(pair.runner, tokens, [300, *[1] * 4, 96])
    torch.set_num_threads(num_threads)
    try:
        assert np.array_equal(forced_logits(pair.runner, tokens, [300, *[1] * 4, 96]), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("num_steps", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_prompt", [257, 511])
def test_logits_of_an_answer_from_a_handed_over_cache(pair: Pair, num_prompt: int, num_steps: int) -> None:
    """Everything that travels, piece by piece into another runner's cache, which then goes on token by token."""
    here, there = pair.runner, open_runner(pair.home)
    sequence = text_of(pair.tokens)
    for runner in (here, there):
        runner.pool.open(OWNER, [], runner.pool.blocks_for(num_prompt + num_steps))
    step(here, sequence, 0, num_prompt)
    for piece in [*pieces_for(here.layout, range(num_prompt)), *window_pieces_for(here.layout, num_prompt)]:
        plane = here.layout.plane(piece.plane)
        there.cache.scatter(OWNER, piece, plane, here.cache.gather(OWNER, piece, plane))
    logits = [step(there, sequence, at, 1) for at in range(num_prompt, num_prompt + num_steps)]
    agreement = compare(np.concatenate(logits), pair.expected[num_prompt : num_prompt + num_steps])
    for runner in (here, there):
        runner.pool.close(OWNER)
    print(agreement)  # noqa: T201 - shown with -s, and where the test fails
    assert agreement.max_difference <= TOLERANCE * agreement.max_logit


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "v3 stretched": lambda: v3_config(rope_parameters=YARN),
    "v32 stretched": lambda: v32_config(rope_parameters=YARN),
    "v3 without low rank": lambda: v3_config(q_lora_rank=None),
    "v3 turned in halves": lambda: v3_config(rope_interleave=False),
    "v3 of experts alone": lambda: v3_config(
        first_k_dense_replace=0, norm_topk_prob=False, n_group=1, topk_group=1
    ),
    "v4 of one ratio": lambda: v4_config(num_hidden_layers=2, compress_ratios=[128, 128], num_hash_layers=0),
    "v4 of two streams": lambda: v4_config(num_hidden_layers=2, compress_ratios=[4, 4], hc_mult=2),
    "v4 of odd heads": lambda: v4_config(num_hidden_layers=2, compress_ratios=[4, 0], num_attention_heads=6),
    "v4 not stretched": lambda: v4_config(num_hidden_layers=2, compress_ratios=[4, 128], rope_scaling=None),
    "v4 with clamped experts": lambda: v4_config(
        num_hidden_layers=2, compress_ratios=[4, 128], swiglu_limit=0.2
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compute_what_transformers_do(name: str, tmp_path: Path) -> None:
    pair = Pair(VARIANTS[name](), tmp_path)
    agreement = compare(forced_logits(pair.runner, pair.tokens[:300], [290, *[1] * 10]), pair.expected[:300])
    assert agreement.max_difference <= TOLERANCE * agreement.max_logit


OWNER = b"handed over"


def text_of(tokens: list[int]) -> Sequence:
    return Sequence(
        sequence_id=0,
        lease_id=OWNER,
        choice=0,
        tokens=tokens,
        num_prompt=len(tokens),
        sampling=SamplingParams(),
    )


def step(runner: ModelRunner, sequence: Sequence, start: int, num_tokens: int) -> np.ndarray:
    """Logits of the step's last token: [1, vocabulary]."""
    return runner.forward(runner.build(StepPlan([StepRow(sequence, start, num_tokens, draws=True)])))


class Selections:
    """The entries that our model chose in one step of a whole text, layer by layer, for an oracle to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, num_layers: int) -> None:
        self._chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_layers = num_layers

        def recorded(
            scores: torch.Tensor, visible: torch.Tensor, top_k: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            entries, masked = best_entries(scores, visible, top_k)
            self._chosen.append((entries[:, :top_k], masked[:, :top_k]))
            return entries, masked

        monkeypatch.setattr(f"engine.models.deepseek.{module}.best_entries", recorded)

    def of_layers(self, num_rows: int, per_entry: int, top_k: int, nothing: int) -> list[torch.Tensor]:
        """Of each layer int64 [num_rows, top_k]. Rows before the first that had to choose take all that they see."""
        per_layer, found = len(self._chosen) // self._num_layers, []
        visible = (torch.arange(num_rows) + 1) // per_entry
        every = torch.arange(top_k).expand(num_rows, -1)
        every = every.masked_fill(every >= visible[:, None], nothing)
        for layer in range(self._num_layers):
            parts = self._chosen[layer * per_layer : (layer + 1) * per_layer]
            chosen = torch.cat([entries.masked_fill(masked, nothing) for entries, masked in parts])
            found.append(torch.cat((every[: num_rows - len(chosen)], chosen)))
        return found


SPARSE = {
    "v4": (v4_config, "v4", {"index_topk": 20}, 3, 4, -1, DeepseekV4Indexer),
    "v32": (v32_config, "mla", {"index_topk": 50}, 3, 1, 0, DeepseekV32Indexer),
}


@pytest.mark.parametrize("name", SPARSE)
def test_given_the_same_selection_the_oracle_agrees(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config, module, changes, num_layers, per_entry, nothing, indexer = SPARSE[name]
    oracle = make_oracle(make_config(**changes), tmp_path)
    runner = open_runner(tmp_path)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, 500).tolist()
    selections = Selections(monkeypatch, module, num_layers)
    ours = forced_logits(runner, tokens, [500])
    top_k = changes["index_topk"]
    given = iter(selections.of_layers(500, per_entry, top_k, nothing))
    monkeypatch.setattr(indexer, "forward", _giving(given))
    agreement = compare(ours, oracle_logits(oracle, tokens))
    print(name, agreement)  # noqa: T201 - shown with -s, and where the test fails
    assert agreement.max_difference <= TOLERANCE * agreement.max_logit
    assert np.array_equal(forced_logits(runner, tokens, [3, 125, 1, 127, *[1] * 4, 240]), ours)


def _giving(given: Iterator[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An indexer's forward. Its keys are not needed: nothing is decoded after."""
    return lambda *_args, **_kwargs: next(given).unsqueeze(0)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0]), min_size=128, max_size=128), min_size=1
    ),
    visible=st.integers(0, 128),
    top_k=st.integers(1, 40),
)
@settings(max_examples=50, deadline=None)
def test_of_equal_scores_the_first_entries_are_read(
    rows: list[list[float]], visible: int, top_k: int
) -> None:
    scores = torch.tensor(rows)
    entries, masked = best_entries(scores, torch.full((len(rows),), visible), top_k)
    for row, found, hidden in zip(rows, entries.tolist(), masked.tolist(), strict=True):
        in_order = sorted(range(visible), key=lambda entry: (-row[entry], entry))[:top_k]
        assert [entry for entry, gone in zip(found, hidden, strict=True) if not gone] == sorted(in_order)
