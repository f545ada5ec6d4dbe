"""A step plan as arrays: which tokens, at which positions, in which slots, against which key tiles.

Attention reads keys in tiles of TILE_TOKENS at absolute positions 0, TILE_TOKENS, …, so that a position's
result never depends on how the prompt was cut (design §3.7). Answers (rows of one token) are computed
together: their tiles are laid out tile index first and longest sequence first, so that tile j of every
sequence that has one is a contiguous run. Chunks (longer rows) are computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.linear import MIN_ROWS
from engine.scheduler import StepPlan, StepRow, owner_of

TILE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class AnswerTiles:
    """Key tiles of the first S rows of a batch, one token each.

    `blocks` [NT · blocks per tile]; `sequence_of_tile` [NT] in 0 … S-1; `masked` [NT, 1, TILE_TOKENS] true
    where a position is not the sequence's; `runs[j]` = (first tile, count) of tile index j.
    """

    num_rows: int
    blocks: torch.Tensor
    sequence_of_tile: torch.Tensor
    masked: torch.Tensor
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PaddedAnswers:
    """The first `num_rows` rows of a batch, one token each, in shapes that two sizes alone decide: `blocks` int64
    [num_rows, B], of each sequence its blocks and then padding; `lengths` int64 [num_rows], of padding rows 1."""

    num_rows: int
    blocks: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class ChunkTiles:
    """Key tiles of one row of several tokens: batch rows [first_row, first_row + num_tokens), positions from `start`.

    `blocks` [number of tiles · blocks per tile].
    """

    first_row: int
    num_tokens: int
    start: int
    blocks: torch.Tensor

    @property
    def num_tiles(self) -> int:
        """Tiles up to the last position of the chunk."""
        return -(-(self.start + self.num_tokens) // TILE_TOKENS)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions of one sequence: batch rows [first_row, first_row + num_tokens), positions from `start`;
    `blocks` int64: those of its sequence, up to the last position; `slot`: its window slot; `records`: those to be
    filled, each with the boundary whose live rows it is for; `window_start`, `replayed_to`: as the sequence's."""

    first_row: int
    num_tokens: int
    start: int
    blocks: np.ndarray
    slot: int = 0
    records: tuple[tuple[int, int], ...] = ()
    window_start: int = 0
    replayed_to: int = 0


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T tokens of a step (padding rows at the end included).

    `token_ids`, `positions`, `slots`: int64 [T]. `logit_rows`: int64 [R], R ≥ MIN_ROWS where any row draws,
    its first `num_draws` entries in the order of `drawing`, of each its last known token and its guesses.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    spans: tuple[Span, ...]
    answers: AnswerTiles | None
    chunks: tuple[ChunkTiles, ...]
    logit_rows: torch.Tensor
    drawing: tuple[StepRow, ...]
    padded: PaddedAnswers | None = None

    @property
    def num_draws(self) -> int:
        """Logits that tokens are drawn from."""
        return sum(1 + len(row.drafts) for row in self.drawing)


class BatchBuilder:
    """Turns plans into batches for one cache: its block size, its padding block, its device. with_tiles: whether
    attention wants tiles, else spans are enough. slot_of: an owner's window slot. `padded_size(rows, blocks)`: what
    answers are padded to instead of being laid out in tiles."""

    def __init__(
        self,
        blocks_of: Callable[[bytes], Sequence[int]],
        block_tokens: int,
        padding_block: int,
        device: torch.device,
        with_tiles: bool = True,
        slot_of: Callable[[bytes], int] = lambda _: 0,
        padded_size: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        if TILE_TOKENS % block_tokens:
            raise ValueError(f"blocks of {block_tokens} tokens do not fill a tile of {TILE_TOKENS}")
        self._blocks_of = blocks_of
        self._block_tokens = block_tokens
        self._padding_block = padding_block
        self._tile_blocks = TILE_TOKENS // block_tokens
        self._device = device
        self._with_tiles = with_tiles
        self._slot_of = slot_of
        self._padded_size = padded_size

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan that has rows."""
        answers = [row for row in plan.rows if row.num_tokens == 1]
        answers.sort(key=lambda row: -(row.start // TILE_TOKENS))
        chunks = [row for row in plan.rows if row.num_tokens > 1]
        if self._padded_size is not None and not chunks:
            return self._padded_batch(answers, *self._padded_size(len(answers), self._most_blocks(answers)))
        rows = [*answers, *chunks]
        ends = np.cumsum([row.num_tokens for row in rows])
        drawing = tuple(row for row in rows if row.draws)
        logit_rows: list[int] = []
        for row, end in zip(rows, ends.tolist(), strict=True):
            if row.draws:
                logit_rows += range(end - 1 - len(row.drafts), end)
        if logit_rows:
            logit_rows += [logit_rows[-1]] * (MIN_ROWS - len(logit_rows))
        token_ids, positions, slots = self._token_arrays(rows)
        placed = [(row, int(end) - row.num_tokens) for row, end in zip(rows, ends, strict=True)]
        in_tiles = placed if self._with_tiles else []
        return StepBatch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            spans=tuple(self._span(row, first_row) for row, first_row in placed),
            answers=self._answer_tiles(answers) if answers and in_tiles and not self._padded_size else None,
            padded=self._padded_answers(answers, len(answers), self._most_blocks(answers))
            if answers and self._padded_size
            else None,
            chunks=tuple(self._chunk_tiles(row, first_row) for row, first_row in in_tiles[len(answers) :]),
            logit_rows=self._tensor(np.asarray(logit_rows, dtype=np.int64)),
            drawing=drawing,
        )

    def _padded_batch(self, answers: list[StepRow], num_rows: int, num_blocks: int) -> StepBatch:
        """A step of answers alone, every array in its padded size."""
        token_ids, positions, slots = self._token_arrays(answers, num_rows)
        return StepBatch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            spans=(),
            answers=None,
            chunks=(),
            logit_rows=self._tensor(np.arange(num_rows)),
            drawing=tuple(answers),
            padded=self._padded_answers(answers, num_rows, num_blocks),
        )

    def _padded_answers(self, answers: list[StepRow], num_rows: int, num_blocks: int) -> PaddedAnswers:
        blocks = np.full((num_rows, num_blocks), self._padding_block, dtype=np.int64)
        lengths = np.ones(num_rows, dtype=np.int64)
        for index, row in enumerate(answers):
            own = self._blocks_of(owner_of(row.sequence))[: row.start // self._block_tokens + 1]
            blocks[index, : len(own)] = own
            lengths[index] = row.start + 1
        return PaddedAnswers(num_rows, self._tensor(blocks), self._tensor(lengths))

    def _most_blocks(self, rows: list[StepRow]) -> int:
        return max((row.start // self._block_tokens + 1 for row in rows), default=1)

    def _span(self, row: StepRow, first_row: int) -> Span:
        count = -(-(row.start + row.num_tokens) // self._block_tokens)
        owner = owner_of(row.sequence)
        blocks = np.asarray(self._blocks_of(owner)[:count])
        records = tuple((filling.boundary, filling.record) for filling in row.records)
        sequence = row.sequence
        return Span(
            first_row,
            row.num_tokens,
            row.start,
            blocks,
            self._slot_of(owner),
            records,
            sequence.window_start,
            sequence.replayed_to,
        )

    def _token_arrays(
        self, rows: list[StepRow], least: int = MIN_ROWS
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        token_ids: list[int] = []
        positions, slots = [], []
        for row in rows:
            end = row.start + row.num_tokens
            token_ids += row.sequence.tokens[row.start : end - len(row.drafts)]
            token_ids += row.drafts
            at = np.arange(row.start, end)
            blocks = np.asarray(self._blocks_of(owner_of(row.sequence)))
            positions.append(at)
            slots.append(blocks[at // self._block_tokens] * self._block_tokens + at % self._block_tokens)
        for _ in range(least - len(token_ids)):
            token_ids.append(0)
            positions.append(np.zeros(1, dtype=np.int64))
            slots.append(np.asarray([self._padding_block * self._block_tokens]))
        return np.asarray(token_ids, dtype=np.int64), np.concatenate(positions), np.concatenate(slots)

    def _answer_tiles(self, rows: list[StepRow]) -> AnswerTiles:
        lengths = np.asarray([row.start + 1 for row in rows])
        num_tiles = -(-lengths // TILE_TOKENS)
        tables = [self._padded_blocks(row, int(count)) for row, count in zip(rows, num_tiles, strict=True)]
        runs, tiles, owners, starts = [], [], [], []
        for tile in range(int(num_tiles.max())):
            count = int((num_tiles > tile).sum())
            runs.append((len(owners), count))
            owners += range(count)
            starts += [tile * TILE_TOKENS] * count
            tiles += [t[tile * self._tile_blocks : (tile + 1) * self._tile_blocks] for t in tables[:count]]
        positions = np.asarray(starts)[:, None] + np.arange(TILE_TOKENS)
        masked = positions >= lengths[np.asarray(owners)][:, None]
        return AnswerTiles(
            num_rows=len(rows),
            blocks=self._tensor(np.concatenate(tiles)),
            sequence_of_tile=self._tensor(np.asarray(owners)),
            masked=self._tensor(masked[:, None, :]),
            runs=tuple(runs),
        )

    def _chunk_tiles(self, row: StepRow, first_row: int) -> ChunkTiles:
        num_tiles = -(-(row.start + row.num_tokens) // TILE_TOKENS)
        blocks = self._tensor(self._padded_blocks(row, num_tiles))
        return ChunkTiles(first_row, row.num_tokens, row.start, blocks)

    def _padded_blocks(self, row: StepRow, num_tiles: int) -> np.ndarray:
        """The sequence's blocks, filled up to whole tiles with the padding block."""
        table = np.full(num_tiles * self._tile_blocks, self._padding_block, dtype=np.int64)
        blocks = self._blocks_of(owner_of(row.sequence))[: len(table)]
        table[: len(blocks)] = blocks
        return table

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
