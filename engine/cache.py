"""The KV cache in memory: one tensor per paged plane, addressed by block, read and written by entry, and the windows.

Implements kvtransfer's CacheStore. Whose block is whose is the pool's business; this only turns an owner's
positions into slots. Storage is [layers, heads, slots, width], so that the keys of a tile are one gather.
The last block belongs to nobody: padding rows write there and padded tiles read it.

A piece is copied row by row (the `width` numbers of one layer, head and slot), in canonical order: for every run
of consecutive slots one strided copy of a box, so that the bytes are touched once. On the CPU that is numpy's, on
rows as opaque values: it runs at the speed of memcpy where blocks lie side by side, takes memory of any alignment,
and lets other threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from engine.cache_size import paged_block_bytes
from engine.copy_lane import CopyLane
from engine.entry_format import format_of
from engine.storage import DTYPES, is_record, plane_dtype, plane_width
from engine.window_cache import WindowCache
from kvtransfer.layouts import CacheLayout, Paged, Piece, Plane, convertible

_T = TypeVar("_T", np.ndarray, torch.Tensor)

Run = tuple[slice, slice]
"""Some of a piece's entries, counted from its first, and the consecutive slots that they lie in."""


class PagedCache:
    """Tensors of every plane of `layout`, zeroed, for `num_blocks` blocks and the padding block.

    `planes[name]`, of a paged plane, has shape [layers, heads, (num_blocks + 1) · entries of a block, width].
    `formats[name]`: how an entry of a plane is written down. `blocks_of(owner)`: its blocks by position; KeyError for
    an unknown owner. The layout's block size may be any multiple of its planes' tokens per entry. `lane`: how pieces
    are copied where the planes are not in host memory. `windows`: of a layout that has window planes, and
    `slot_of(owner)`: an owner's slot there, as `blocks_of`.
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_blocks: int,
        device: torch.device,
        blocks_of: Callable[[bytes], Sequence[int]],
        lane: CopyLane | None = None,
        windows: WindowCache | None = None,
        slot_of: Callable[[bytes], int] | None = None,
    ) -> None:
        self.layout = layout
        self._slot_of = slot_of
        self.windows = windows or WindowCache(layout, 0, 0, 0, device)
        self.num_blocks = num_blocks
        self.padding_block = num_blocks
        self._blocks_of = blocks_of
        self._lane = lane
        self._entries = {
            plane.name: layout.block_tokens // plane.kind.tokens_per_entry
            for plane in layout.planes
            if isinstance(plane.kind, Paged)
        }
        self.planes = {
            plane.name: torch.zeros(
                (plane.layers, plane.heads, (num_blocks + 1) * self._entries[plane.name], plane_width(plane)),
                dtype=plane_dtype(plane),
                device=device,
            )
            for plane in layout.planes
            if plane.name in self._entries
        }
        self.formats = {plane.name: format_of(plane) for plane in layout.planes}
        self._stored = self.planes | self.windows.slots
        self._rows = {name: _by_row(tensor) for name, tensor in self._stored.items() if lane is None}

    @property
    def num_bytes(self) -> int:
        """Bytes of all planes, windows included."""
        paged = sum(tensor.numel() * tensor.element_size() for tensor in self.planes.values())
        return paged + self.windows.num_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all paged planes."""
        return paged_block_bytes(self.layout)

    def block_entries(self, name: str) -> int:
        """Entries of a plane in one block."""
        return self._entries[name]

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The piece's canonical bytes (see CacheStore). `out` may begin at any address."""
        dtype, num_bytes = self._wire_dtype(piece, wire), wire.num_bytes(piece)
        runs = self._runs(owner, piece)
        if out is not None and len(out) != num_bytes:
            raise ValueError(f"a piece of {num_bytes} bytes does not fit into {len(out)}")
        stored = self._stored[piece.plane]
        if self._lane is not None:
            raw = self._lane.to_host(lambda: gather_box(stored, piece, runs, dtype))
            return raw if out is None else out.copy_(raw)
        raw = torch.empty(num_bytes, dtype=torch.uint8) if out is None else out
        if dtype == stored.dtype:
            self._take(piece, runs, raw)
        else:
            same = torch.empty(raw.numel() // dtype.itemsize, dtype=stored.dtype)
            self._take(piece, runs, same.view(torch.uint8))
            _numbers(raw, dtype).copy_(same)
        return raw

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        """Write a piece that `gather` gave, here or on another worker. `data` may begin at any address."""
        dtype, num_bytes = self._wire_dtype(piece, wire), wire.num_bytes(piece)
        runs = self._runs(owner, piece)
        if len(data) != num_bytes:
            raise ValueError(f"{len(data)} bytes for a piece of {num_bytes}")
        stored = self._stored[piece.plane]
        if self._lane is not None:
            self._lane.to_card(data, lambda raw: scatter_box(stored, piece, runs, raw.view(dtype)))
            return
        raw = data.cpu()
        if dtype != stored.dtype:
            raw = _numbers(raw, dtype).to(stored.dtype).view(torch.uint8)
        box, given = _part_of(self._rows[piece.plane], piece), self._canonical(piece, raw)
        for part, slots in runs:
            box[:, :, slots] = given[:, part].transpose(0, 2, 1)

    def fence(self) -> None:
        """Wait until everything scattered can be read by the next step."""
        if self._lane is not None:
            self._lane.fence()

    def steps_wrote(self) -> None:
        """What steps were told to write so far may be gathered."""
        if self._lane is not None:
            self._lane.steps_wrote()

    def copy_blocks(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole blocks within the cache."""
        if source:
            for name, tensor in self.planes.items():
                taken = tensor.index_select(2, self._block_slots(name, source))
                tensor.index_copy_(2, self._block_slots(name, target), taken)

    def take_blocks(self, blocks: Sequence[int]) -> dict[str, torch.Tensor]:
        """A copy of whole blocks in host memory: by plane [layers, heads, slots, width]."""
        return {
            name: tensor.index_select(2, self._block_slots(name, blocks)).cpu()
            for name, tensor in self.planes.items()
        }

    def put_blocks(self, blocks: Sequence[int], taken: dict[str, torch.Tensor], first: int) -> None:
        """Write some of what `take_blocks` gave, from its block number `first` on."""
        for name, tensor in self.planes.items():
            size = self._entries[name]
            part = taken[name][:, :, first * size : (first + len(blocks)) * size]
            tensor.index_copy_(2, self._block_slots(name, blocks), part.to(tensor.device))

    def scrub(self, blocks: Sequence[int]) -> None:
        """Zero blocks whose contents may be NaN: even masked positions enter a product with 0."""
        if blocks:
            for name, tensor in self.planes.items():
                tensor.index_fill_(2, self._block_slots(name, blocks), 0)

    def _wire_dtype(self, piece: Piece, wire: Plane) -> torch.dtype:
        self.layout.check(piece)
        plane = self.layout.plane(piece.plane)
        if is_record(plane) and plane.dtypes == wire.dtypes:
            return torch.uint8
        here, there = set(plane.dtypes), set(wire.dtypes)
        if is_record(plane) or len(there) > 1 or not convertible(*here, *there):
            raise ValueError(
                f"plane {piece.plane!r} is {', '.join(plane.dtypes)} here, cannot be {', '.join(wire.dtypes)}"
            )
        return DTYPES[there.pop()]

    def _runs(self, owner: bytes, piece: Piece) -> list[Run]:
        """The piece's entries in stretches that lie in consecutive slots, or rows of a window."""
        if piece.plane in self._entries:
            return self._block_runs(owner, piece)
        if self._slot_of is None:
            raise ValueError(f"plane {piece.plane!r} is a window, and there are none here")
        return self.windows.runs(piece.plane, self._slot_of(owner), piece.entries)

    def _block_runs(self, owner: bytes, piece: Piece) -> list[Run]:
        entries, size, blocks = piece.entries, self._entries[piece.plane], self._blocks_of(owner)
        first, end = entries.start // size, -(-entries.stop // size)
        if end > len(blocks):
            raise ValueError(
                f"entries up to {entries.stop}, but owner {owner.hex()} has {len(blocks)} blocks of {size}"
            )
        runs: list[Run] = []
        start = entries.start
        for index in range(first, end):
            if index + 1 == end or blocks[index + 1] != blocks[index] + 1:
                stop = min(entries.stop, (index + 1) * size)
                last = blocks[index] * size + (stop - 1) % size
                part = slice(start - entries.start, stop - entries.start)
                runs.append((part, slice(last - (stop - 1 - start), last + 1)))
                start = stop
        return runs

    def _take(self, piece: Piece, runs: list[Run], out: torch.Tensor) -> None:
        box, taken = _part_of(self._rows[piece.plane], piece), self._canonical(piece, out)
        for part, slots in runs:
            taken[:, part] = box[:, :, slots].transpose(0, 2, 1)

    def _canonical(self, piece: Piece, raw: torch.Tensor) -> np.ndarray:
        """A piece's bytes as rows [layers, entries, heads]."""
        shape = (len(piece.layers), len(piece.entries), len(piece.heads))
        return raw.numpy().view(self._rows[piece.plane].dtype).reshape(shape)

    def _block_slots(self, name: str, blocks: Sequence[int]) -> torch.Tensor:
        size = self._entries[name]
        slots = np.asarray(blocks, dtype=np.int64)[:, None] * size + np.arange(size)
        return torch.from_numpy(slots.reshape(-1)).to(self.planes[name].device)


def gather_box(stored: torch.Tensor, piece: Piece, runs: Sequence[Run], dtype: torch.dtype) -> torch.Tensor:
    """A piece's canonical bytes in `dtype` out of a plane [layers, heads, slots, width], on the plane's device."""
    rows = _part_of(stored, piece).index_select(2, _slots(runs, stored.device))
    return rows.transpose(1, 2).to(dtype).contiguous().view(torch.uint8).reshape(-1)


def scatter_box(stored: torch.Tensor, piece: Piece, runs: Sequence[Run], numbers: torch.Tensor) -> None:
    """The opposite: `numbers` are the piece's, flat in canonical order, on the plane's device."""
    shape = (len(piece.layers), len(piece.entries), len(piece.heads), stored.shape[-1])
    rows = numbers.to(stored.dtype).view(shape).transpose(1, 2)
    _part_of(stored, piece).index_copy_(2, _slots(runs, stored.device), rows)


def _part_of(stored: _T, piece: Piece) -> _T:
    """A plane's layers and heads that a piece has, whole."""
    return stored[piece.layers.start : piece.layers.stop, piece.heads.start : piece.heads.stop]


def _slots(runs: Sequence[Run], device: torch.device) -> torch.Tensor:
    numbers = np.concatenate([np.arange(slots.start, slots.stop) for _, slots in runs])
    return torch.from_numpy(numbers).to(device)


def _by_row(tensor: torch.Tensor) -> np.ndarray:
    """A plane's memory as rows [layers, heads, slots], each one opaque value."""
    raw = tensor.view(torch.uint8)
    return raw.numpy().view(f"V{raw.shape[-1]}")[..., 0]


def _numbers(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes in host memory as numbers, in place, wherever in a buffer they begin."""
    return torch.from_numpy(raw.numpy()).view(dtype)
