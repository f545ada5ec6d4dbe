"""DeepSeek-V3 (arXiv:2412.19437) and V3.2 (arXiv:2512.02556): latent attention, with an indexer in V3.2.

What is cached of a token is one latent and one rotated key, for all heads. Queries and outputs go through the key and
value projections instead of the cache ("absorbed"), for prompts as for answers: two forms would round differently,
and a token's bits may not depend on which of them computed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention import pad_rows
from engine.batch import StepBatch
from engine.cache import PagedCache
from engine.models.deepseek.attention import attend, row_groups
from engine.models.deepseek.config import IndexerConfig, MlaConfig
from engine.models.deepseek.experts import ClampedMLP, MixtureOfExperts, Router
from engine.models.deepseek.layouts import INDEX, LATENT
from engine.models.deepseek.rotation import Angles, Turning
from engine.models.deepseek.selection import best_entries, index_scores
from engine.models.deepseek.step import EntryTable, entry_table, in_tiles
from engine.models.placement import Placement
from engine.models.rope_config import RopeType
from engine.rope import yarn_mscale
from engine.weights import Weights

_INDEX_NORM_EPS = 1e-6
_ATTENTION_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class MlaStep:
    """What all layers share in a step. `slots` int64 [T]: where each row's entry goes."""

    token_ids: torch.Tensor
    slots: torch.Tensor
    angles: Angles
    table: EntryTable


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) · weight + bias, over the last axis; sums as in engine/layers.py."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight, self._bias, self._eps = weight, bias, eps
        self._ones = torch.ones_like(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1 / x.shape[-1]
        x = x - (torch.linalg.vecdot(x, self._ones.expand_as(x)) * scale).unsqueeze(-1)
        variance = torch.linalg.vecdot(x, x).unsqueeze(-1) * scale
        return x * (variance + self._eps).rsqrt() * self._weight + self._bias


class TokenIndexer:
    """Scores all tokens for a query (V3.2, section 2.1)."""

    def __init__(self, config: IndexerConfig, place: Placement, name: str, layer: int) -> None:
        self.config, self._layer = config, layer
        self._query, self._key = place.linear(f"{name}.wq_b"), place.linear(f"{name}.wk")
        weight, bias = (place.vector(f"{name}.k_norm.{part}") for part in ("weight", "bias"))
        self._norm = LayerNorm(weight, bias, _INDEX_NORM_EPS)
        self._weigh = place.exact(f"{name}.weights_proj")
        self._scale = (config.head_dim * config.num_heads) ** -0.5

    def write(self, x: torch.Tensor, step: MlaStep, cache: PagedCache) -> None:
        """The keys of the step's tokens into the cache."""
        keys = step.angles.turn_halves(self._norm(self._key(x)).unsqueeze(1)).squeeze(1)
        plane = self._plane(cache)
        plane.index_copy_(0, step.slots, cache.formats[INDEX].pack(keys))

    def queries(
        self, x: torch.Tensor, q_low: torch.Tensor, step: MlaStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row: queries [T, heads, D], and the heads' weights [T, heads]."""
        q = self._query(q_low).unflatten(1, (self.config.num_heads, -1))
        return step.angles.turn_halves(q), self._weigh(x) * self._scale

    def select(
        self,
        queries: tuple[torch.Tensor, torch.Tensor],
        rows: slice,
        slots: torch.Tensor,
        step: MlaStep,
        cache: PagedCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `slots` [G, K] those that are read, and where there are none."""
        keys = cache.formats[INDEX].unpack(self._plane(cache)[slots])
        scores = index_scores(queries[0][rows], queries[1][rows], keys)
        entries, masked = best_entries(scores, step.table.visible[rows], self.config.top_k)
        return slots.gather(1, entries), masked

    def _plane(self, cache: PagedCache) -> torch.Tensor:
        return cache.planes[INDEX][self._layer, 0]


class MlaAttention:
    """Latent attention of one layer."""

    def __init__(self, config: MlaConfig, place: Placement, layer: int) -> None:
        name = f"model.layers.{layer}.self_attn"
        self._config, self._layer = config, layer
        self._has_q_lora = config.q_lora_rank is not None
        if self._has_q_lora:
            self._down = place.linear(f"{name}.q_a_proj", f"{name}.kv_a_proj_with_mqa")
            self._q_norm = place.norm(f"{name}.q_a_layernorm", _ATTENTION_NORM_EPS)
            self._q = place.linear(f"{name}.q_b_proj")
        else:
            self._down = place.linear(f"{name}.kv_a_proj_with_mqa")
            self._q = place.linear(f"{name}.q_proj")
        self._latent_norm = place.norm(f"{name}.kv_a_layernorm", _ATTENTION_NORM_EPS)
        both = place.vector(f"{name}.kv_b_proj.weight").unflatten(0, (config.num_heads, -1))
        self._to_latent = both[:, : config.nope_dim].contiguous()  # [heads, nope, latent]
        self._from_latent = both[:, config.nope_dim :].transpose(1, 2).contiguous()  # [heads, latent, value]
        self._o = place.linear(f"{name}.o_proj")
        self._scale = _score_scale(config)
        self._indexer = None
        if config.indexer is not None:
            self._indexer = TokenIndexer(config.indexer, place, f"{name}.indexer", layer)

    def __call__(self, x: torch.Tensor, step: MlaStep, cache: PagedCache) -> torch.Tensor:
        """x [T, hidden] float32 → the same shape; writes the latents of the step's tokens."""
        config = self._config
        q_low, latent, k = self._down(x).split(
            ((config.q_lora_rank or 0), config.kv_lora_rank, config.rope_dim), dim=1
        )
        q_low = self._q_norm(q_low.contiguous()) if self._has_q_lora else x
        q = self._q(q_low).unflatten(1, (config.num_heads, -1))
        q_nope, q_rope = q.split((config.nope_dim, config.rope_dim), dim=2)
        q = torch.cat((_by_head(q_nope, self._to_latent), self._turned(q_rope, step)), dim=2) * self._scale
        k = self._turned(k.unsqueeze(1), step).squeeze(1)
        plane = cache.planes[LATENT][self._layer, 0]
        entry = torch.cat((self._latent_norm(latent.contiguous()), k), dim=1)
        plane.index_copy_(0, step.slots, cache.formats[LATENT].pack(entry))
        out = _by_head(self._attend(x, q, q_low, plane, step, cache), self._from_latent)
        return self._o(out.flatten(1))

    def _turned(self, heads: torch.Tensor, step: MlaStep) -> torch.Tensor:
        return (
            step.angles.turn_pairs(heads) if self._config.rope_interleaved else step.angles.turn_halves(heads)
        )

    def _attend(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        q_low: torch.Tensor,
        plane: torch.Tensor,
        step: MlaStep,
        cache: PagedCache,
    ) -> torch.Tensor:
        """q [T, heads, latent and rope] → latents [T, heads, latent]."""
        table, indexer = step.table, self._indexer
        most = int(table.most_visible.max(initial=0))
        queries, numbers = None, in_tiles(most) * q.shape[2]
        if indexer is not None:
            indexer.write(x, step, cache)
            if most > indexer.config.top_k:
                queries = indexer.queries(x, q_low, step)
        out = torch.empty(*q.shape[:2], self._config.kv_lora_rank, device=q.device)
        for rows in row_groups(len(q), numbers):
            slots = table.entries_of(rows, max(table.num_entries(rows), in_tiles(1)))
            masked = torch.arange(slots.shape[1], device=q.device) >= table.visible[rows].unsqueeze(1)
            if (
                queries is not None
                and indexer is not None
                and table.most_visible[rows].max() > indexer.config.top_k
            ):
                slots, masked = indexer.select(queries, rows, slots, step, cache)
            keys = cache.formats[LATENT].unpack(plane[slots])
            out[rows] = attend(q[rows], keys, masked, self._config.kv_lora_rank)
        return out


class MlaLayer:
    """Norm, attention, residual; norm, MLP or experts, residual."""

    def __init__(self, config: MlaConfig, place: Placement, layer: int) -> None:
        name = f"model.layers.{layer}"
        self._attention_norm = place.norm(f"{name}.input_layernorm")
        self._attention = MlaAttention(config, place, layer)
        self._norm = place.norm(f"{name}.post_attention_layernorm")
        self._mlp, self._experts = None, None
        if layer < config.num_dense_layers:
            self._mlp = _mlp(place, f"{name}.mlp")
        else:
            self._experts = _experts(config, place, f"{name}.mlp")

    def __call__(self, x: torch.Tensor, step: MlaStep, cache: PagedCache) -> torch.Tensor:
        """x [T, hidden] float32 → the same shape."""
        x = x + self._attention(self._attention_norm(x), step, cache)
        normed = self._norm(x)
        return x + (self._mlp(normed) if self._mlp else self._experts(normed, step.token_ids))  # type: ignore[misc]


class MlaDecoder:
    """The whole model: token ids in, logits of the rows that draw out."""

    def __init__(
        self, config: MlaConfig, weights: Weights, precision: str, max_context: int, device: torch.device
    ) -> None:
        place = Placement(weights, precision, device, config.rms_norm_eps)
        self._device = device
        embedding = weights.get("model.embed_tokens.weight")
        self._embedding = embedding.to(dtype=place.dtype, device=device, copy=True)
        self._layers = [MlaLayer(config, place, layer) for layer in range(config.num_layers)]
        self._norm = place.norm("model.norm")
        self._head = place.head(self._embedding) if config.tie_word_embeddings else place.linear("lm_head")
        self._turning = Turning(config.rope, config.rope_dim, max_context, device)

    def forward(
        self, batch: StepBatch, cache: PagedCache, after_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Logits [R, vocabulary] float32 of `batch.logit_rows`; None where no row draws.

        `after_layer(n)` is called when the cache holds the step's entries of the first n layers.
        """
        num_rows, entries = len(batch.token_ids), cache.block_entries(LATENT)
        table = entry_table(batch.spans, num_rows, 1, entries, cache.padding_block, self._device)
        step = MlaStep(batch.token_ids, batch.slots, self._turning.at(batch.positions), table)
        x = self._embedding[batch.token_ids].float()
        for num_layers, layer in enumerate(self._layers, start=1):
            x = layer(x, step, cache)
            after_layer(num_layers)
        return self._head(self._norm(x[batch.logit_rows])) if batch.drawing else None


def _by_head(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [T, heads, a], weights [heads, a, b] → [T, heads, b]."""
    rows = pad_rows(x.transpose(0, 1))
    return torch.matmul(rows, weights)[:, : len(x)].transpose(0, 1)


def _score_scale(config: MlaConfig) -> float:
    """YaRN as DeepSeek trains it scales scores, not rotations."""
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    rope = config.rope
    if rope.type is RopeType.YARN and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def _mlp(place: Placement, name: str) -> ClampedMLP:
    return ClampedMLP(place.linear(f"{name}.gate_proj", f"{name}.up_proj"), place.linear(f"{name}.down_proj"))


def _experts(config: MlaConfig, place: Placement, name: str) -> MixtureOfExperts:
    bias = place.vector(f"{name}.gate.e_score_correction_bias")
    router = Router(config.moe, place.exact(f"{name}.gate"), bias)
    experts = [_mlp(place, f"{name}.experts.{expert}") for expert in range(config.moe.num_experts)]
    return MixtureOfExperts(router, experts, _mlp(place, f"{name}.shared_experts"))
