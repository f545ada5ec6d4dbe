"""Decode steps as CUDA graphs: recorded once for each of a few sizes, then replayed with other numbers in them.

A step of answers alone is hundreds of small kernels, which a card runs faster than they are started one by one. A
recording keeps its shapes and its memory, so that steps are padded to sizes of a short list and their arrays copied
to where the recording reads them.

The recording itself has not been run on a card by the project's tests; sizes, padding and copying have, without one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.batch import PaddedAnswers, StepBatch
from engine.linear import MIN_ROWS

Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Runs work once or more; returns what runs it again on the same memory, and gives the same tensor anew."""

_DENSE_ROWS = 8  # powers of two up to here, multiples of it after


@dataclass(frozen=True, slots=True)
class AnswerSizes:
    """What decode steps are padded to: numbers of sequences, and of blocks of the longest, each ascending."""

    rows: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def up_to(cls, max_sequences: int, max_blocks: int) -> AnswerSizes:
        """For steps of so many sequences and contexts of so many blocks."""
        few = [size for size in (2, 4, _DENSE_ROWS) if size < max_sequences]
        most = (
            -(-max_sequences // _DENSE_ROWS) * _DENSE_ROWS if max_sequences > _DENSE_ROWS else max_sequences
        )
        many = range(2 * _DENSE_ROWS, most + 1, _DENSE_ROWS)
        rows = {*few, *many, max(most, MIN_ROWS)}
        doubling = [1 << power for power in range(2, max_blocks.bit_length()) if 1 << power < max_blocks]
        return cls(tuple(sorted(rows)), (*doubling, max_blocks))

    def fit(self, num_rows: int, num_blocks: int) -> tuple[int, int]:
        """The smallest sizes that hold a step. Raises IndexError for one that is larger than all."""
        return self.rows[bisect_left(self.rows, num_rows)], self.blocks[bisect_left(self.blocks, num_blocks)]


class DecodeGraphs:
    """Recordings of `work`, a step's forward pass, one for each pair of sizes that came. Used by one thread."""

    def __init__(self, work: Callable[[StepBatch], torch.Tensor], record: Record) -> None:
        self._work = work
        self._record = record
        self._recorded: dict[torch.Size, tuple[StepBatch, Callable[[], torch.Tensor]]] = {}

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits of a step of padded answers alone; they are overwritten by the next step of its sizes."""
        assert batch.padded is not None
        size = batch.padded.blocks.shape
        if size not in self._recorded:
            kept = _copy_of(batch, batch.padded)
            self._recorded[size] = kept, self._record(lambda: self._work(kept))
        kept, replay = self._recorded[size]
        for target, source in zip(_arrays(kept), _arrays(batch), strict=True):
            target.copy_(source)
        return replay()


def record_on_card(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A `Record` on the current CUDA device. (Not run by the project's tests.)"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose kernels and take memory in their first runs
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def _copy_of(batch: StepBatch, padded: PaddedAnswers) -> StepBatch:
    return replace(
        batch,
        token_ids=batch.token_ids.clone(),
        positions=batch.positions.clone(),
        slots=batch.slots.clone(),
        logit_rows=batch.logit_rows.clone(),
        padded=replace(padded, blocks=padded.blocks.clone(), lengths=padded.lengths.clone()),
    )


def _arrays(batch: StepBatch) -> tuple[torch.Tensor, ...]:
    assert batch.padded is not None
    padded = batch.padded
    return batch.token_ids, batch.positions, batch.slots, batch.logit_rows, padded.blocks, padded.lengths
