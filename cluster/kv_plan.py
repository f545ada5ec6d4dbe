"""How many bytes a context is in a model's cache, what they take on a link, and how many fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.deepseek.layouts import TAILS
from engine.models.families import AnyConfig
from engine.models.layouts import cache_layout
from engine.models.shapes import published_bytes
from kvtransfer.layouts import CacheLayout, Paged, Plane

CODEC_RATIOS = {"raw": 1.0, "split": 1.51, "int8": 2.07, "fp8": 2.40, "ecsq": 4.70, "int4": 3.66}
"""Bytes of bfloat16 to bytes on the wire, as measured on SmolLM2 (docs/codecs.md); "raw" needs no measuring."""


@dataclass(frozen=True, slots=True)
class PlanePlan:
    """One plane at a context: `bytes_per_token` that it grows by, 0 for a window."""

    name: str
    layers: int
    entries: int
    kv_bytes: int
    bytes_per_token: float

    @property
    def is_window(self) -> bool:
        """Whether it is a part that does not grow."""
        return self.bytes_per_token == 0


@dataclass(frozen=True, slots=True)
class KvPlan:
    """A context of `context_tokens` kept as `kv_dtype`.

    `cache_bytes`: what attention reads, `bf16_bytes` the same in bfloat16; `tail_bytes`: what is not compressed yet
    beside it; `request_bytes`: both. `fixed_bytes`: of that what does not grow, and `most_fixed_bytes` at the worst
    length. `wire_bytes`: a request with a codec; `wire_s` on a link, None without one; `num_fit`: such requests in a
    GPU's memory for the cache. `is_replicated`: no GPU can keep a part of the heads.
    """

    context_tokens: int
    max_context: int
    kv_dtype: str
    planes: tuple[PlanePlan, ...]
    cache_bytes: int
    bf16_bytes: int
    tail_bytes: int
    request_bytes: int
    fixed_bytes: int
    most_fixed_bytes: int
    bytes_per_token: float
    wire_bytes: int
    wire_s: float | None
    num_fit: int
    weights_bytes: int
    is_replicated: bool


def plan_kv(
    config: AnyConfig,
    context_tokens: int,
    *,
    kv_dtype: str = "bfloat16",
    codec_ratio: float = 1.0,
    link_bits_per_s: float | None = None,
    memory_bytes: int = 0,
) -> KvPlan:
    """`codec_ratio`: bytes of the cache to bytes on the wire; `memory_bytes`: of one GPU, for the cache.

    Raises ValueError for a kv_dtype that the model's cache is not kept in.
    """
    layout = cache_layout(config, kv_dtype)
    planes = tuple(_plane(layout, plane, context_tokens) for plane in layout.planes)
    tail_bytes = sum(plane.kv_bytes for plane in planes if plane.name in TAILS)
    request_bytes = sum(plane.kv_bytes for plane in planes)
    wire_bytes = round((request_bytes - tail_bytes) / codec_ratio) + tail_bytes
    in_bf16 = cache_layout(config, "bfloat16").planes
    return KvPlan(
        context_tokens=context_tokens,
        max_context=config.max_context,
        kv_dtype=kv_dtype,
        planes=planes,
        cache_bytes=request_bytes - tail_bytes,
        bf16_bytes=sum(_plane(layout, p, context_tokens).kv_bytes for p in in_bf16 if p.name not in TAILS),
        tail_bytes=tail_bytes,
        request_bytes=request_bytes,
        fixed_bytes=sum(plane.kv_bytes for plane in planes if plane.is_window),
        most_fixed_bytes=_most_fixed_bytes(layout),
        bytes_per_token=sum(plane.bytes_per_token for plane in planes),
        wire_bytes=wire_bytes,
        wire_s=None if link_bits_per_s is None else 8 * wire_bytes / link_bits_per_s,
        num_fit=memory_bytes // request_bytes if request_bytes else 0,
        weights_bytes=published_bytes(config),
        is_replicated=all(plane.heads == 1 for plane in layout.planes),
    )


def _plane(layout: CacheLayout, plane: Plane, context_tokens: int) -> PlanePlan:
    entries = len(plane.live(context_tokens))
    entry_bytes = plane.layers * layout.entry_bytes(plane)
    growth = entry_bytes / plane.kind.tokens_per_entry if isinstance(plane.kind, Paged) else 0.0
    return PlanePlan(plane.name, plane.layers, entries, entries * entry_bytes, growth)


def _most_fixed_bytes(layout: CacheLayout) -> int:
    """Windows at the length at which they hold most; they repeat themselves after a block."""
    far = 8 * layout.block_tokens
    return max(
        sum(
            _plane(layout, plane, num_tokens).kv_bytes
            for plane in layout.planes
            if not isinstance(plane.kind, Paged)
        )
        for num_tokens in range(far, far + layout.block_tokens)
    )
