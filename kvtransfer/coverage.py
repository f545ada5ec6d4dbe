"""Whether the pieces that landed are the whole of what a sequence needs: no gap, no overlap.

A manifest says what was sent; this says whether what was sent is enough. Pure arithmetic on ranges.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from kvtransfer.layouts import Paged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvtransfer.layouts import CacheLayout, Piece, Plane


def needed_entries(plane: Plane, start_token: int, num_tokens: int) -> range:
    """The entries that must travel when positions below `start_token` are held already."""
    live = plane.live(num_tokens)
    if isinstance(plane.kind, Paged):
        return range(start_token // plane.kind.tokens_per_entry, live.stop)
    return live


def find_gap(layout: CacheLayout, pieces: Iterable[Piece], start_token: int, num_tokens: int) -> str | None:
    """What is wrong, in words, or None when the pieces tile exactly positions [start_token, num_tokens)."""
    by_plane: dict[str, list[Piece]] = {plane.name: [] for plane in layout.planes}
    for piece in pieces:
        by_plane[piece.plane].append(piece)
    for plane in layout.planes:
        problem = _plane_gap(plane, by_plane[plane.name], needed_entries(plane, start_token, num_tokens))
        if problem is not None:
            return f"plane {plane.name!r}: {problem}"
    return None


def leading_tokens(layout: CacheLayout, pieces: Iterable[Piece], start_token: int, num_tokens: int) -> int:
    """Up to which position every paged plane has landed without a gap, where positions below `start_token` are held
    already. Windows do not count: they belong to one position, not to what is before it."""
    by_plane: dict[str, list[Piece]] = {plane.name: [] for plane in layout.planes}
    for piece in pieces:
        by_plane[piece.plane].append(piece)
    reached = num_tokens
    for plane in layout.planes:
        if isinstance(plane.kind, Paged):
            needed = needed_entries(plane, start_token, num_tokens)
            entries = min(_reached(runs, needed) for _, runs in _cell_runs(plane, by_plane[plane.name]))
            reached = min(reached, max(start_token, entries * plane.kind.tokens_per_entry))
    return reached


def _reached(runs: Sequence[tuple[int, int]], needed: range) -> int:
    """The end of what covers `needed` from its beginning without a gap."""
    reached = needed.start
    for start, stop in runs:
        if start > reached:
            break
        reached = max(reached, stop)
    return reached


def _plane_gap(plane: Plane, pieces: Sequence[Piece], needed: range) -> str | None:
    for where, runs in _cell_runs(plane, pieces):
        problem = _run_gap(runs, needed)
        if problem is not None:
            return f"{where}: {problem}"
    return None


def _cell_runs(plane: Plane, pieces: Sequence[Piece]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """The runs of entries that landed, sorted, of every part of the plane that pieces do not cut further."""
    for layers in _cells([piece.layers for piece in pieces], plane.layers):
        in_layers = [piece for piece in pieces if piece.layers.start <= layers.start < piece.layers.stop]
        for heads in _cells([piece.heads for piece in in_layers], plane.heads):
            runs = sorted(
                (piece.entries.start, piece.entries.stop)
                for piece in in_layers
                if piece.heads.start <= heads.start < piece.heads.stop
            )
            where = f"layers [{layers.start}, {layers.stop}), heads [{heads.start}, {heads.stop})"
            yield where, runs


def _cells(boxes: Iterable[range], size: int) -> list[range]:
    """[0, size) cut wherever a box begins or ends."""
    edges = {0, size}
    for box in boxes:
        edges.update((box.start, box.stop))
    return [range(low, high) for low, high in pairwise(sorted(edges))]


def _run_gap(runs: Sequence[tuple[int, int]], needed: range) -> str | None:
    reached = needed.start
    for start, stop in runs:
        if start > reached:
            return f"entries [{reached}, {start}) did not land"
        if start < reached:
            return f"entries [{start}, {min(stop, reached)}) landed twice or were not asked for"
        reached = stop
    if reached < needed.stop:
        return f"entries [{reached}, {needed.stop}) did not land"
    if reached > needed.stop:
        return f"entries [{needed.stop}, {reached}) lie beyond the sequence"
    return None
