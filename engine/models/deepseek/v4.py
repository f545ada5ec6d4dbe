"""DeepSeek-V4 (arXiv:2606.19348): compressed sparse and heavily compressed attention beside a sliding window,
hyper-connections, hashed and scored experts.

Tensors by their published names. The kv of a token is one vector, key and value for all heads; its rotation is undone
on what attention gives, so that it counts relative to the query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.batch import StepBatch
from engine.cache import PagedCache
from engine.layers import RMSNorm
from engine.linear import Linear, Product
from engine.models.deepseek.attention import attend, row_groups
from engine.models.deepseek.compressor import Compressor, TailMemory
from engine.models.deepseek.config import CSA_RATIO, HCA_RATIO, NO_RATIO, V4Config
from engine.models.deepseek.experts import ClampedMLP, MixtureOfExperts, Router
from engine.models.deepseek.hyper import HyperConnection, HyperHead
from engine.models.deepseek.layouts import CSA, CSA_TAIL, HCA, HCA_TAIL, INDEX, INDEX_TAIL, SWA
from engine.models.deepseek.rotation import Angles, Turning
from engine.models.deepseek.selection import best_entries, index_scores
from engine.models.deepseek.step import (
    CompletedEntries,
    EntryTable,
    WindowKeys,
    completed_entries,
    entry_table,
    in_tiles,
    window_keys,
)
from engine.models.placement import Placement
from engine.weights import Weights
from engine.window_step import WindowStep

_OVERLAPS = {CSA_RATIO: CSA_RATIO, HCA_RATIO: 0}
_TAILS = {CSA_RATIO: CSA_TAIL, HCA_RATIO: HCA_TAIL}
_ENTRIES = {CSA_RATIO: CSA, HCA_RATIO: HCA}


@dataclass(frozen=True, slots=True)
class Compression:
    """What layers of one ratio share in a step."""

    window: WindowStep
    completed: CompletedEntries | None
    angles: Angles | None  # of the completed entries
    table: EntryTable


@dataclass(frozen=True, slots=True)
class V4Step:
    """What all layers share in a step. `angles`: of the rows, for layers without and with compression."""

    token_ids: torch.Tensor
    window: WindowStep
    keys: WindowKeys
    angles: dict[bool, Angles]
    compressions: dict[int, Compression]


class Indexer:
    """Scores entries for a query (section 2.3.1): its keys are compressed as CSA's entries are."""

    def __init__(self, config: V4Config, place: Placement, name: str) -> None:
        self._heads = config.indexer.num_heads
        self._query = place.linear(f"{name}.wq_b")
        self._weigh = place.exact(f"{name}.weights_proj")
        self._scale = (config.indexer.head_dim * self._heads) ** -0.5

    def queries(
        self, x: torch.Tensor, q_low: torch.Tensor, angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row: queries [T, heads, D], and the heads' weights [T, heads]."""
        q = self._query(q_low).unflatten(1, (self._heads, -1))
        return angles.turn_pairs(q), self._weigh(x) * self._scale


class CompressedKeys:
    """A layer's compressed entries: how they are made, and which of them a query reads."""

    def __init__(self, config: V4Config, place: Placement, name: str, ratio: int, index: int) -> None:
        self._ratio, self._index, self._top_k = ratio, index, config.indexer.top_k
        self._compressor = _compressor(place, f"{name}.compressor")
        self._indexer = self._index_compressor = None
        if ratio == CSA_RATIO:
            self._indexer = Indexer(config, place, f"{name}.indexer")
            self._index_compressor = _compressor(place, f"{name}.indexer.compressor")

    def complete(self, x: torch.Tensor, step: V4Step, cache: PagedCache) -> None:
        """Write what the step's tokens complete."""
        self._compress(self._compressor, _TAILS[self._ratio], _ENTRIES[self._ratio], x, step, cache)
        if self._index_compressor is not None:
            self._compress(self._index_compressor, INDEX_TAIL, INDEX, x, step, cache)

    def _compress(
        self,
        compressor: Compressor,
        tail: str,
        entries: str,
        x: torch.Tensor,
        step: V4Step,
        cache: PagedCache,
    ) -> None:
        shared, windows = step.compressions[self._ratio], cache.windows
        memory = TailMemory(windows.slots[tail][self._index, 0], windows.records[tail][self._index, 0])
        plane = cache.planes[entries][self._index, 0]
        entry_format = cache.formats[entries]
        compressor(x, shared.window, shared.completed, shared.angles, memory, plane, entry_format)

    def reader(
        self, x: torch.Tensor, q_low: torch.Tensor, step: V4Step, cache: PagedCache
    ) -> Callable[[slice], tuple[torch.Tensor, torch.Tensor]]:
        """For some rows: entries [G, K, D] float32 in whole tiles, ascending, and where there are none [G, K]."""
        table = step.compressions[self._ratio].table
        plane = cache.planes[_ENTRIES[self._ratio]][self._index, 0]
        queries = None
        if self._indexer is not None and table.most_visible.max(initial=0) > self._top_k:
            queries = self._indexer.queries(x, q_low, step.angles[True])

        def read(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            slots = table.entries_of(rows, table.num_entries(rows))
            visible = table.visible[rows]
            masked = torch.arange(slots.shape[1], device=slots.device) >= visible.unsqueeze(1)
            if queries is not None and table.most_visible[rows].max() > self._top_k:
                keys = cache.formats[INDEX].unpack(cache.planes[INDEX][self._index, 0][slots])
                scores = index_scores(queries[0][rows], queries[1][rows], keys)
                entries, masked = best_entries(scores, visible, self._top_k)
                slots = slots.gather(1, entries)
            return cache.formats[_ENTRIES[self._ratio]].unpack(plane[slots]), masked

        return read

    def numbers_per_row(self, step: V4Step, width: int) -> int:
        """At most gathered for one row."""
        num_entries = int(step.compressions[self._ratio].table.most_visible.max(initial=0))
        if self._indexer is None:
            return in_tiles(num_entries) * width
        return in_tiles(num_entries) * width // 4 + in_tiles(min(num_entries, self._top_k)) * width


class V4Attention:
    """Attention over a window and compressed entries, with sinks, and the grouped output projection."""

    def __init__(self, config: V4Config, place: Placement, layer: int) -> None:
        name = f"layers.{layer}.attn"
        ratio = config.ratios[layer]
        self._config, self._layer = config, layer
        self._is_compressed = ratio != NO_RATIO
        self._down = place.linear(f"{name}.wq_a", f"{name}.wkv")
        self._q_norm, self._kv_norm = place.norm(f"{name}.q_norm"), place.norm(f"{name}.kv_norm")
        self._q = place.linear(f"{name}.wq_b")
        self._head_norm = RMSNorm(torch.ones(config.head_dim, device=place.device), config.rms_norm_eps)
        self._sinks = place.vector(f"{name}.attn_sink")
        groups = place.weights.fused([f"{name}.wo_a.weight"], place.dtype).to(place.device)
        self._o_groups = [place.product(weight.contiguous()) for weight in groups.chunk(config.o_groups)]
        self._o = place.linear(f"{name}.wo_b")
        self._compressed = None
        if self._is_compressed:
            index = config.ratios[:layer].count(ratio)
            self._compressed = CompressedKeys(config, place, name, ratio, index)

    def __call__(self, x: torch.Tensor, step: V4Step, cache: PagedCache) -> torch.Tensor:
        """x [T, hidden] float32 → the same shape; writes what the step's tokens leave in the cache."""
        config, angles = self._config, step.angles[self._is_compressed]
        q_low, kv = self._down(x).split((config.q_lora_rank, config.head_dim), dim=1)
        q_low = self._q_norm(q_low.contiguous())
        q = self._head_norm(self._q(q_low).unflatten(1, (config.num_heads, -1)))
        q = angles.turn_pairs(q) * config.head_dim**-0.5
        kv = angles.turn_pairs(self._kv_norm(kv.contiguous()).unsqueeze(1)).squeeze(1)
        slots, records = (part[SWA][self._layer, 0] for part in (cache.windows.slots, cache.windows.records))
        window = step.window.rows(slots, cache.formats[SWA].pack(kv))
        step.window.keep(window, slots, records)
        if self._compressed is not None:
            self._compressed.complete(x, step, cache)
        out = angles.inverse.turn_pairs(self._attend(x, q, q_low, window, step, cache))
        parts = out.flatten(1).chunk(config.o_groups, dim=1)
        return self._o(torch.cat([o(part) for o, part in zip(self._o_groups, parts, strict=True)], dim=1))

    def _attend(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        q_low: torch.Tensor,
        window: torch.Tensor,
        step: V4Step,
        cache: PagedCache,
    ) -> torch.Tensor:
        width, numbers = q.shape[-1], step.keys.rows.shape[1] * q.shape[-1]
        read = None
        if self._compressed is not None:
            read = self._compressed.reader(x, q_low, step, cache)
            numbers += self._compressed.numbers_per_row(step, width)
        out = torch.empty_like(q)
        for rows in row_groups(len(q), numbers):
            keys = cache.formats[SWA].unpack(window[step.keys.rows[rows]])
            masked = step.keys.masked[rows]
            if read is not None:
                entries, hidden = read(rows)
                keys, masked = torch.cat((keys, entries), dim=1), torch.cat((masked, hidden), dim=1)
            out[rows] = attend(q[rows], keys, masked, width, self._sinks)
        return out


class V4Layer:
    """Attention and experts, each read from and woven back into the streams."""

    def __init__(self, config: V4Config, place: Placement, layer: int) -> None:
        name = f"layers.{layer}"
        self._attention_streams = _hyper_connection(config, place, f"{name}.hc_attn")
        self._attention_norm = place.norm(f"{name}.attn_norm")
        self._attention = V4Attention(config, place, layer)
        self._expert_streams = _hyper_connection(config, place, f"{name}.hc_ffn")
        self._expert_norm = place.norm(f"{name}.ffn_norm")
        self._experts = _experts(config, place, f"{name}.ffn", is_hashed=layer < config.num_hash_layers)

    def __call__(self, streams: torch.Tensor, step: V4Step, cache: PagedCache) -> torch.Tensor:
        """streams [T, n, hidden] float32 → the same shape."""
        x, weave = self._attention_streams(streams)
        streams = weave(streams, self._attention(self._attention_norm(x), step, cache))
        x, weave = self._expert_streams(streams)
        return weave(streams, self._experts(self._expert_norm(x), step.token_ids))


class V4Decoder:
    """The whole model: token ids in, logits of the rows that draw out."""

    def __init__(
        self, config: V4Config, weights: Weights, precision: str, max_context: int, device: torch.device
    ) -> None:
        place = Placement(weights, precision, device, config.rms_norm_eps)
        self._config, self._device = config, device
        self._embedding = weights.get("embed.weight").to(dtype=place.dtype, device=device, copy=True)
        self._layers = [V4Layer(config, place, layer) for layer in range(config.num_layers)]
        self._streams = HyperHead(
            Linear(place.vector("hc_head_fn")),
            place.vector("hc_head_base"),
            place.vector("hc_head_scale"),
            _stream_norm(config, device),
            config.hc_eps,
        )
        self._norm = place.norm("norm")
        self._head = place.head(self._embedding) if config.tie_word_embeddings else place.linear("head")
        self._turning = {
            is_compressed: Turning(rope, config.rope_dim, max_context, device)
            for is_compressed, rope in ((False, config.rope), (True, config.compress_rope))
        }

    def forward(
        self, batch: StepBatch, cache: PagedCache, after_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Logits [R, vocabulary] float32 of `batch.logit_rows`; None where no row draws.

        `after_layer(n)` is called when the cache holds what the step's tokens leave in the first n layers.
        """
        step = self._step(batch, cache)
        x = self._embedding[batch.token_ids].float()
        streams = x.unsqueeze(1).expand(-1, self._config.hc_mult, -1).contiguous()
        for num_layers, layer in enumerate(self._layers, start=1):
            streams = layer(streams, step, cache)
            after_layer(num_layers)
        if not batch.drawing:
            return None
        return self._head(self._norm(self._streams(streams[batch.logit_rows])))

    def _step(self, batch: StepBatch, cache: PagedCache) -> V4Step:
        spans, num_rows, config = batch.spans, len(batch.token_ids), self._config
        window = cache.windows.step(SWA, spans)
        compressions = {}
        for ratio in {CSA_RATIO, HCA_RATIO} & set(config.ratios):
            tail, block_entries = (
                cache.windows.step(_TAILS[ratio], spans),
                cache.block_entries(_ENTRIES[ratio]),
            )
            completed = completed_entries(spans, tail, ratio, _OVERLAPS[ratio], block_entries, self._device)
            angles = self._turning[True].at(completed.positions) if completed is not None else None
            table = entry_table(spans, num_rows, ratio, block_entries, cache.padding_block, self._device)
            compressions[ratio] = Compression(tail, completed, angles, table)
        return V4Step(
            batch.token_ids,
            window,
            window_keys(spans, window, config.window_tokens, num_rows, self._device),
            {is_compressed: turning.at(batch.positions) for is_compressed, turning in self._turning.items()},
            compressions,
        )


def _compressor(place: Placement, name: str) -> Compressor:
    project = place.exact(f"{name}.wkv", f"{name}.wgate")
    return Compressor(project, place.vector(f"{name}.ape"), place.norm(f"{name}.norm"))


def _stream_norm(config: V4Config, device: torch.device) -> RMSNorm:
    return RMSNorm(torch.ones(config.hc_mult * config.hidden_size, device=device), config.rms_norm_eps)


def _hyper_connection(config: V4Config, place: Placement, name: str) -> HyperConnection:
    return HyperConnection(
        Linear(place.vector(f"{name}_fn")),
        place.vector(f"{name}_base"),
        place.vector(f"{name}_scale"),
        _stream_norm(config, place.device),
        config.hc_iterations,
        config.hc_eps,
    )


def _experts(config: V4Config, place: Placement, name: str, is_hashed: bool) -> MixtureOfExperts:
    moe = config.moe

    def mlp(at: str) -> ClampedMLP:
        gate_up: Product = place.linear(f"{at}.w1", f"{at}.w3")
        return ClampedMLP(gate_up, place.linear(f"{at}.w2"), moe.limit)

    bias = table = None
    if is_hashed:
        table = place.weights.get(f"{name}.gate.tid2eid").to(
            device=place.device, dtype=torch.int64, copy=True
        )
    else:
        bias = place.vector(f"{name}.gate.bias")
    router = Router(moe, place.exact(f"{name}.gate"), bias, table)
    experts = [mlp(f"{name}.experts.{expert}") for expert in range(moe.num_experts)]
    return MixtureOfExperts(router, experts, mlp(f"{name}.shared_experts"))
