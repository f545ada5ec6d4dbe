"""What a worker moves by key: blocks, and for a model with windows their records: blocks of another layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.record_cache import RecordCache, record_layout
from kvtransfer.cache_store import CacheStore
from kvtransfer.fetching import paged_part
from kvtransfer.layouts import CacheLayout

Pin = Callable[[bytes, Sequence[bytes], int], tuple[int, int] | None]


@dataclass(frozen=True, slots=True)
class Medium:
    """`pin(owner, keys, rank)` and `release(owner)` as kvtransfer.cache_source.CacheBlockSource has them."""

    layout: CacheLayout
    cache: CacheStore
    pin: Pin
    release: Callable[[bytes], None]


def blocks_of(engine: Engine) -> Medium:
    """Blocks of all paged planes."""
    return Medium(paged_part(engine.layout), engine.cache, engine.pin, engine.release)


def records_of(engine: Engine) -> RecordCache | None:
    """Window records; None for a model without windows, and where windows are computed again instead."""
    layout, windows = record_layout(engine.layout), engine.pool.windows
    if layout is None or windows is None or windows.replay_tokens:
        return None
    return RecordCache(engine, layout)


def medium_of(records: RecordCache) -> Medium:
    """Records as blocks."""
    return Medium(records.layout, records, records.pin, records.release)
