"""transformers as the oracle: the logits of every position of a text that is given, there and here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from engine.request import SamplingParams
from engine.request import Sequence as EngineSequence
from engine.runner import ModelRunner
from engine.scheduler import StepPlan, StepRow, owner_of

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How far two [N, vocabulary] arrays of logits are apart."""

    num_positions: int
    max_difference: float
    max_logit: float
    num_equal_argmax: int
    widest_margin_lost: float
    """Of positions with another argmax: the largest gap between the oracle's two best logits; 0 without
    any."""

    def __str__(self) -> str:
        return (
            f"{self.num_positions} positions: largest difference {self.max_difference:.2e} "
            f"(largest logit {self.max_logit:.1f}), argmax equal at {self.num_equal_argmax}, "
            f"widest margin lost {self.widest_margin_lost:.2e}"
        )


def compare(ours: Logits, oracle: Logits) -> Agreement:
    """Agreement of our logits with the oracle's."""
    best_two = np.partition(oracle, -2, axis=1)[:, -2:]
    margins = best_two[:, 1] - best_two[:, 0]
    differs = ours.argmax(axis=1) != oracle.argmax(axis=1)
    return Agreement(
        num_positions=len(oracle),
        max_difference=float(np.abs(ours - oracle).max()),
        max_logit=float(np.abs(oracle).max()),
        num_equal_argmax=int((~differs).sum()),
        widest_margin_lost=float(margins[differs].max(initial=0.0)),
    )


def oracle_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Logits:
    """transformers' float32 logits after each token: [N, vocabulary]."""
    with torch.inference_mode():
        logits: Logits = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return logits


def forced_logits(runner: ModelRunner, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
    """Our logits after each token, [N, vocabulary], computed in steps of `sizes` tokens that add up to N."""
    if sum(sizes) != len(tokens):
        raise ValueError(f"steps of {sum(sizes)} tokens for a text of {len(tokens)}")
    sequence = EngineSequence(
        sequence_id=0,
        lease_id=b"oracle",
        choice=0,
        tokens=list(tokens),
        num_prompt=len(tokens),
        sampling=SamplingParams(),
    )
    owner = owner_of(sequence)
    runner.pool.open(owner, [], runner.pool.blocks_for(len(tokens)))
    logits, start = [], 0
    for size in sizes:
        row = StepRow(sequence, start, size, draws=True)
        batch = runner.build(StepPlan([row]))
        # A step has logits of its rows' last tokens only; ask for those of all, at least two for the kernels.
        every = torch.arange(max(size, 2)).clamp(max=size - 1)
        logits.append(runner.forward(dataclasses.replace(batch, logit_rows=every, drawing=(row,) * size)))
        start += size
    runner.cache.scrub(runner.pool.close(owner))
    return np.concatenate(logits)
