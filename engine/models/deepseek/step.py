"""What every layer of a DeepSeek model needs to know of a step, computed once: which keys a query may read and where
they lie, and which entries are completed by the step's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Span
from engine.window_step import WindowStep

KEY_TILE = 128
"""Keys that are read together; a query's list of keys is filled up to a multiple of it."""


@dataclass(frozen=True, slots=True)
class EntryTable:
    """Where the entries of the step's sequences lie. `slots` int64 [sequences, entries], padded with the padding
    block's; `sequence_of_row`, `visible` int64 [T]: of each row its sequence, and how many leading entries it may
    read."""

    slots: torch.Tensor
    sequence_of_row: torch.Tensor
    visible: torch.Tensor
    most_visible: np.ndarray  # the same as `visible`, to be looked at without waiting for a card

    def entries_of(self, rows: slice, num_entries: int) -> torch.Tensor:
        """Slots of the first `num_entries` entries of each of some rows: [rows, num_entries]."""
        wanted = self.slots[:, :num_entries]
        return wanted.index_select(0, self.sequence_of_row[rows])

    def num_entries(self, rows: slice) -> int:
        """How many entries some rows read at most, in whole tiles."""
        return in_tiles(int(self.most_visible[rows].max(initial=0)))


@dataclass(frozen=True, slots=True)
class CompletedEntries:
    """Entries whose last token is in the step: `rows` int64 [E, tokens], of each the tokens that it is made of, in a
    WindowStep's rows, `missing` bool [E, tokens] where there is none; `slots` int64 [E], its place in the plane;
    `positions` int64 [E], that of its first own token."""

    rows: torch.Tensor
    missing: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class WindowKeys:
    """The window of every row: `rows` int64 [T, keys] in a WindowStep's rows, ascending, `masked` bool [T, keys] where
    there is none."""

    rows: torch.Tensor
    masked: torch.Tensor


def in_tiles(num_keys: int) -> int:
    """A number of keys, filled up to whole tiles."""
    return -(-num_keys // KEY_TILE) * KEY_TILE


def entry_table(
    spans: Sequence[Span],
    num_rows: int,
    tokens_per_entry: int,
    block_entries: int,
    padding_block: int,
    device: torch.device,
) -> EntryTable:
    """Of a paged plane with `block_entries` entries in a block."""
    counts = [(span.start + span.num_tokens) // tokens_per_entry for span in spans]
    slots = np.full((len(spans), in_tiles(max(counts))), padding_block * block_entries, dtype=np.int64)
    sequence_of_row, visible = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
    for index, (span, count) in enumerate(zip(spans, counts, strict=True)):
        slots[index, :count] = entry_slots(span, np.arange(count), block_entries)
        rows = slice(span.first_row, span.first_row + span.num_tokens)
        sequence_of_row[rows] = index
        visible[rows] = (np.arange(span.start, span.start + span.num_tokens) + 1) // tokens_per_entry
    to = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return EntryTable(to(slots), to(sequence_of_row), to(visible), visible)


def entry_slots(span: Span, entries: np.ndarray, block_entries: int) -> np.ndarray:
    """Where some of a sequence's entries lie in their plane."""
    slots: np.ndarray = span.blocks[entries // block_entries] * block_entries + entries % block_entries
    return slots


def completed_entries(
    spans: Sequence[Span],
    window: WindowStep,
    tokens_per_entry: int,
    overlap_tokens: int,
    block_entries: int,
    device: torch.device,
) -> CompletedEntries | None:
    """Entries of `tokens_per_entry` tokens of their own and `overlap_tokens` before them; None where a step completes
    none."""
    rows, missing, slots, positions = [], [], [], []
    for index, span in enumerate(spans):
        begin, end = max(span.start, span.replayed_to), span.start + span.num_tokens
        entries = np.arange(begin // tokens_per_entry, end // tokens_per_entry)
        first = entries * tokens_per_entry
        tokens = first[:, None] + np.arange(-overlap_tokens, tokens_per_entry)
        rows.append(window.locate(index, np.maximum(tokens, 0)))
        missing.append(tokens < 0)
        slots.append(entry_slots(span, entries, block_entries))
        positions.append(first)
    if not any(len(part) for part in slots):
        return None
    joined = [torch.from_numpy(np.concatenate(part)).to(device) for part in (rows, missing, slots, positions)]
    return CompletedEntries(*joined)


def window_keys(
    spans: Sequence[Span], window: WindowStep, window_tokens: int, num_rows: int, device: torch.device
) -> WindowKeys:
    """Each row reads itself and the `window_tokens` - 1 before it."""
    width = in_tiles(window_tokens)
    rows = np.zeros((num_rows, width), np.int64)
    masked = np.ones((num_rows, width), bool)
    for index, span in enumerate(spans):
        own = np.arange(span.start, span.start + span.num_tokens)
        positions = own[:, None] + np.arange(1 - window_tokens, 1)
        at = slice(span.first_row, span.first_row + span.num_tokens)
        is_there = positions >= span.window_start
        rows[at, :window_tokens] = window.locate(index, np.where(is_there, positions, own[:, None]))
        masked[at, :window_tokens] = ~is_there
        rows[at, window_tokens:] = window.locate(index, own)[:, None]
    return WindowKeys(torch.from_numpy(rows).to(device), torch.from_numpy(masked).to(device))
