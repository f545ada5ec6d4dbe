"""Keys and values of preempted sequences in host memory, so that they come back without being computed again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.cache import PagedCache
from engine.request import Sequence
from engine.scheduler import BroughtBack, Preempted


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """An engine.request.SetAside. `planes` as PagedCache.take_blocks gives them, `windows` as WindowCache.take."""

    num_tokens: int
    rank: int
    num_bytes: int
    planes: dict[str, torch.Tensor]
    windows: dict[str, torch.Tensor]


def set_aside(
    preempted: Preempted, cache: PagedCache, running: Iterable[Sequence], limit_bytes: int
) -> KeptBlocks | None:
    """What a preempted sequence had, where it fits beside what the others of `running` have set aside.

    The caller holds the engine's lock since the blocks were given up, so that nobody has written to them.
    """
    used_bytes = sum(s.set_aside.num_bytes for s in running if isinstance(s.set_aside, KeptBlocks))
    num_bytes = len(preempted.blocks) * cache.block_bytes + cache.windows.slot_bytes
    if not preempted.blocks or used_bytes + num_bytes > limit_bytes:
        return None
    planes, windows = cache.take_blocks(preempted.blocks), cache.windows.take(preempted.slot)
    return KeptBlocks(preempted.num_tokens, preempted.rank, num_bytes, planes, windows)


def bring_back(brought_back: BroughtBack, cache: PagedCache) -> None:
    """Write what was set aside into the blocks that the sequence has now."""
    assert isinstance(brought_back.kept, KeptBlocks)
    cache.put_blocks(brought_back.blocks, brought_back.kept.planes, brought_back.first_block)
    cache.windows.put(brought_back.slot, brought_back.kept.windows)
