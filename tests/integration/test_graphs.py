"""What CUDA graphs need and no card: sizes, padded steps, arrays copied to where a recording reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import BatchBuilder
from engine.cache import PagedCache
from engine.graphs import AnswerSizes, DecodeGraphs
from engine.models.config import ModelConfig
from engine.models.dense import DenseDecoder
from engine.models.layouts import gqa_layout
from engine.pool import BlockPool
from engine.request import SamplingParams, Sequence
from engine.scheduler import StepPlan, StepRow, owner_of
from engine.sdpa import FusedAttention
from engine.weights import open_weights
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.integration

BLOCK, NUM_BLOCKS, CPU = 64, 40, torch.device("cpu")
LENGTHS = (3, 64, 65, 190, 300)


@given(st.integers(1, 300), st.integers(1, 2000), st.data())
def test_every_step_has_a_size_that_is_not_much_larger(
    max_sequences: int, max_blocks: int, data: st.DataObject
) -> None:
    sizes = AnswerSizes.up_to(max_sequences, max_blocks)
    rows = data.draw(st.integers(1, max_sequences))
    blocks = data.draw(st.integers(1, max_blocks))
    padded_rows, padded_blocks = sizes.fit(rows, blocks)
    assert rows <= padded_rows <= max(2, 2 * rows, rows + 7)
    assert blocks <= padded_blocks <= max(4, 2 * blocks)
    assert len(sizes.rows) <= 4 + max_sequences // 8
    assert len(sizes.blocks) <= 12


class Rig:
    """A tiny model with answers of several lengths, in tiles or padded."""

    def __init__(self, model_dir: Path, monkeypatch: pytest.MonkeyPatch, *, padded: bool) -> None:
        config = ModelConfig.open(model_dir)
        self.pool = BlockPool(NUM_BLOCKS, BLOCK)
        layout = gqa_layout(config.num_layers, config.num_kv_heads, config.head_dim, "float32", BLOCK)
        self.cache = PagedCache(layout, NUM_BLOCKS, CPU, self.pool.blocks)
        sizes = AnswerSizes.up_to(8, 16)
        with monkeypatch.context() as patch:
            if padded:
                patch.setattr("engine.models.dense.PagedAttention", FusedAttention)
            self.model = DenseDecoder(config, open_weights(model_dir, config), "float32", 1024, BLOCK, CPU)
        self.builder = BatchBuilder(
            self.pool.blocks, BLOCK, self.cache.padding_block, CPU, padded_size=sizes.fit if padded else None
        )
        self.sequences = [_sequence(index, length) for index, length in enumerate(LENGTHS)]
        for sequence in self.sequences:
            self.pool.open(owner_of(sequence), [], self.pool.blocks_for(sequence.num_tokens + 8))
        self.graphs = DecodeGraphs(self._decode, record_nothing)

    def _decode(self, batch):  # type: ignore[no-untyped-def]
        return self.model.forward(batch, self.cache, lambda _: None)

    def prefill(self) -> list[np.ndarray]:
        """Each prompt in two chunks, one of them beside another sequence's answer."""
        found = []
        with torch.inference_mode():
            for sequence in self.sequences:
                cut = sequence.num_tokens // 2
                for start, count in ((0, cut), (cut, sequence.num_tokens - cut)):
                    plan = StepPlan([StepRow(sequence, start, count, draws=True)])
                    found.append(self._decode(self.builder.build(plan))[0].numpy().copy())
        return found

    def decode(self, which: list[int], in_graphs: bool) -> np.ndarray:
        """One more token of some sequences."""
        rows = []
        for index in which:
            sequence = self.sequences[index]
            sequence.tokens.append((7 * sequence.num_tokens) % 200 + 4)
            rows.append(StepRow(sequence, sequence.num_tokens - 1, 1, draws=True))
        batch = self.builder.build(StepPlan(rows))
        order = [row.sequence.sequence_id for row in batch.drawing]
        with torch.inference_mode():
            logits = (self.graphs if in_graphs else self._decode)(batch)[: len(rows)].numpy().copy()
        return logits[np.argsort(order)]


def record_nothing(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Runs the work again each time: what a card would replay, reading the same memory."""
    work()
    return work


def _sequence(index: int, length: int) -> Sequence:
    tokens = [(index * 31 + position * 7) % 250 + 4 for position in range(length)]
    return Sequence(index, index.to_bytes(2, "little"), 0, tokens, length, SamplingParams())


def test_padded_steps_in_graphs_give_the_logits_of_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_tiny_model(tmp_path / "tiny", max_context=1024)
    plain, graphed = Rig(home, monkeypatch, padded=False), Rig(home, monkeypatch, padded=True)
    for one, other in zip(plain.prefill(), graphed.prefill(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for which in ([0, 1, 2, 3, 4], [4], [1, 3], [0, 2, 4], [2], [0, 1, 2, 3, 4], [3, 4]):
        one, other = plain.decode(which, in_graphs=False), graphed.decode(which, in_graphs=True)
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert 1 < len(graphed.graphs._recorded) < 7


def test_answers_beside_a_chunk_are_padded_to_their_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_tiny_model(tmp_path / "tiny", max_context=1024)
    logits = []
    for padded in (False, True):
        rig = Rig(home, monkeypatch, padded=padded)
        rig.prefill()
        answer, prompt = rig.sequences[1], rig.sequences[4]
        answer.tokens.append(9)
        rows = [StepRow(answer, answer.num_tokens - 1, 1, draws=True), StepRow(prompt, 100, 50, draws=True)]
        batch = rig.builder.build(StepPlan(rows))
        assert (batch.padded is not None) == padded
        with torch.inference_mode():
            logits.append(rig._decode(batch)[:2].numpy().copy())
    np.testing.assert_allclose(*logits, atol=1e-4)
