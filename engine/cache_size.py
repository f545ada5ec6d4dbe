"""How many bytes a cache takes, before there is one. Knows no torch."""

from __future__ import annotations

from kvtransfer.layouts import CacheLayout, Paged, Plane, Window

RECORDS_SHARE = 4
"""One part in so many of what is left beside window slots is for records."""


def paged_block_bytes(layout: CacheLayout) -> int:
    """Bytes of one block in all paged planes."""
    return sum(
        plane.layers * layout.entry_bytes(plane) * (layout.block_tokens // plane.kind.tokens_per_entry)
        for plane in layout.planes
        if isinstance(plane.kind, Paged)
    )


def window_planes(layout: CacheLayout) -> tuple[Plane, ...]:
    """Those planes that are windows."""
    return tuple(plane for plane in layout.planes if isinstance(plane.kind, Window))


def ring_rows(plane: Plane, spare_rows: int) -> int:
    """Rows of a window slot; `spare_rows`: most guesses of a step."""
    assert isinstance(plane.kind, Window)
    return plane.kind.rows + spare_rows


def slot_bytes(layout: CacheLayout, spare_rows: int) -> int:
    """Bytes of one slot of every window plane."""
    return sum(
        plane.layers * ring_rows(plane, spare_rows) * plane.record_bytes for plane in window_planes(layout)
    )


def record_bytes(layout: CacheLayout) -> int:
    """Bytes of one record of every window plane."""
    boundary = far_boundary(layout)
    return sum(
        plane.layers * len(plane.live(boundary)) * plane.record_bytes for plane in window_planes(layout)
    )


def far_boundary(layout: CacheLayout) -> int:
    """A boundary between blocks that is farther than any window is long."""
    longest = max((plane.kind.rows for plane in layout.planes if isinstance(plane.kind, Window)), default=0)
    return -(-longest // layout.block_tokens) * layout.block_tokens * 2


def context_blocks(layout: CacheLayout, max_context: int) -> int:
    """Blocks of one context, with the one that answers grow into."""
    return -(-max_context // layout.block_tokens) + 1


def least_bytes(layout: CacheLayout, max_context: int, max_sequences: int, spare_rows: int) -> int:
    """What a cache must have for one context of `max_context` tokens and the windows of `max_sequences`."""
    blocks_bytes = context_blocks(layout, max_context) * paged_block_bytes(layout)
    if not window_planes(layout):
        return blocks_bytes
    windows_bytes = max_sequences * slot_bytes(layout, spare_rows)
    return windows_bytes + -(-blocks_bytes * RECORDS_SHARE // (RECORDS_SHARE - 1)) + record_bytes(layout)
