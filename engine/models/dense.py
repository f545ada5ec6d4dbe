"""Dense decoders with grouped-query attention: Llama, Qwen2, Qwen3.

They differ in biases, in a norm on queries and keys and in their head size, all of which the config says; the
flow of a layer is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.attention import PagedAttention
from engine.batch import StepBatch
from engine.cache import PagedCache
from engine.layers import GatedMLP, Rotary, rotate
from engine.models.config import ModelConfig
from engine.models.placement import Placement
from engine.rope import rope_tables
from engine.sdpa import FusedAttention
from engine.weights import Weights


class DecoderLayer:
    """Norm, attention, residual; norm, MLP, residual."""

    def __init__(self, index: int, config: ModelConfig, place: Placement, block_tokens: int) -> None:
        at, attention, mlp = (f"model.layers.{index}{part}" for part in ("", ".self_attn", ".mlp"))
        self._index = index
        self._config = config
        self._input_norm = place.norm(f"{at}.input_layernorm")
        self._mlp_norm = place.norm(f"{at}.post_attention_layernorm")
        self._qkv = place.linear(*(f"{attention}.{name}_proj" for name in "qkv"), bias=config.qkv_bias)
        self._o = place.linear(f"{attention}.o_proj", bias=config.o_bias)
        self._q_norm = place.norm(f"{attention}.q_norm") if config.qk_norm else None
        self._k_norm = place.norm(f"{attention}.k_norm") if config.qk_norm else None
        self._mlp = GatedMLP(
            place.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"), place.linear(f"{mlp}.down_proj")
        )
        attend = PagedAttention if place.device.type == "cpu" else FusedAttention
        self._attention = attend(config.num_heads, config.num_kv_heads, config.head_dim, block_tokens)

    def __call__(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch: StepBatch,
        cache: PagedCache,
    ) -> torch.Tensor:
        """x [T, hidden] float32 → the same shape; writes the step's keys and values into the cache."""
        q, k, v = self._project(self._input_norm(x), rotary)
        k_plane, v_plane = cache.planes["k"][self._index], cache.planes["v"][self._index]
        k_plane.index_copy_(1, batch.slots, k.transpose(0, 1).to(k_plane.dtype))
        v_plane.index_copy_(1, batch.slots, v.transpose(0, 1).to(v_plane.dtype))
        x = x + self._o(self._attention(q, k_plane, v_plane, batch))
        return x + self._mlp(self._mlp_norm(x))

    def _project(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self._config
        heads = self._qkv(x).unflatten(-1, (-1, config.head_dim))
        num_rotated = config.num_heads + config.num_kv_heads
        qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        if self._q_norm is not None and self._k_norm is not None:
            qk = torch.cat(
                (self._q_norm(qk[:, : config.num_heads]), self._k_norm(qk[:, config.num_heads :])), dim=1
            )
        qk = rotate(qk, *rotary)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], v


class DenseDecoder:
    """The whole model: token ids in, logits of the rows that draw out."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        precision: str,
        max_context: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        # Copied into memory of its own: a page of a mapped file would be read from disk in mid-answer.
        place = Placement(weights, precision, device, config.rms_norm_eps)
        embedding = weights.get("model.embed_tokens.weight")
        self._embedding = embedding.to(dtype=place.dtype, device=device, copy=True)
        self._layers = [
            DecoderLayer(index, config, place, block_tokens) for index in range(config.num_layers)
        ]
        self._norm = place.norm("model.norm")
        tied = config.tie_word_embeddings
        self._head = place.head(self._embedding) if tied else place.linear("lm_head")
        cos, sin = rope_tables(config, max_context)
        self._rotary = Rotary(cos.to(device), sin.to(device))

    def forward(
        self, batch: StepBatch, cache: PagedCache, after_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Logits [R, vocabulary] float32 of `batch.logit_rows`; None where no row draws.

        `after_layer(n)` is called when the cache holds the step's keys and values of the first n layers.
        """
        x = self._embedding[batch.token_ids].float()
        rotary = self._rotary.at(batch.positions)
        for num_layers, layer in enumerate(self._layers, start=1):
            x = layer(x, rotary, batch, cache)
            after_layer(num_layers)
        if not batch.drawing:
            return None
        return self._head(self._norm(x[batch.logit_rows]))
