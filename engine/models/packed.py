"""Dense decoders in compiled kernels, for processors with vectors of 64 bytes: the model of engine/models/dense.py, a
step in a few calls instead of a thousand tensor operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from engine.batch import StepBatch
from engine.cache import PagedCache
from engine.events import layers_per_report
from engine.kernels.attention import KEYS, AttentionScratch
from engine.kernels.decoder import (
    Memory,
    Model,
    Norms,
    Products,
    Rows,
    Shape,
    Step,
    run_head,
    run_layers,
)
from engine.kernels.processor import HAS_BYTE_PRODUCTS, HAS_WIDE_VECTORS
from engine.kernels.products import (
    ADD,
    BFLOAT16_IN_LANES,
    BFLOAT16_IN_TILES,
    BLOCK,
    BYTES_IN_LANES,
    BYTES_IN_TILES,
    FLOATS_IN_LANES,
    GATE,
    REPLACE,
    Packed,
    Sums,
    pack,
    takes_floats,
)
from engine.kernels.rows import MIXED, rotate
from engine.kernels.tiles import FULL_TILES, HAS_TILES
from engine.layers import Rotary
from engine.linear import quantize_weight
from engine.models.config import ModelConfig
from engine.rope import rope_tables
from engine.weights import Weights

_WEIGHT_BYTES = {
    BFLOAT16_IN_TILES: 2,
    BYTES_IN_TILES: 1,
    BYTES_IN_LANES: 1,
    BFLOAT16_IN_LANES: 2,
    FLOATS_IN_LANES: 4,
}
_PIECE_ROWS = 4096  # a multiple of BLOCK


def runs_packed(config: ModelConfig, precision: str, kv_dtype: str, device: torch.device) -> bool:
    """Whether this machine has kernels for the model."""
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    return (
        device.type == "cpu"
        and (HAS_BYTE_PRODUCTS if precision == "int8" else HAS_WIDE_VECTORS)
        and (kv_dtype == "bfloat16" or precision == "float32")
        and all(width % MIXED == 0 for width in widths)
    )


def kind_of(precision: str) -> int:
    """How this machine computes products (engine/kernels/products.py)."""
    if precision == "float32":
        return FLOATS_IN_LANES
    if precision == "bfloat16":
        return BFLOAT16_IN_TILES if may_use_tiles() else BFLOAT16_IN_LANES
    return BYTES_IN_TILES if may_use_tiles() else BYTES_IN_LANES


def may_use_tiles() -> bool:
    """Whether the processor has tiles and `ONEDNN_MAX_CPU_ISA`, which is heeded here too, does not exclude them."""
    return HAS_TILES and "AMX" in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX")


class PackedDecoder:
    """The whole model: token ids in, logits of the rows that draw out. Steps have at most `max_rows` rows."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        precision: str,
        kv_dtype: str,
        max_context: int,
        max_rows: int,
        num_threads: int,
    ) -> None:
        self._config = config
        self._num_threads = num_threads
        self._kind = kind_of(precision)
        self._of_bytes = precision == "int8"
        names = [f"model.layers.{index}" for index in range(config.num_layers)]
        embedding = weights.get("model.embed_tokens.weight")
        self._embedding = embedding.to(
            torch.bfloat16 if self._kind != FLOATS_IN_LANES else embedding.dtype, copy=True
        )
        in_tiles = self._kind in (BFLOAT16_IN_TILES, BYTES_IN_TILES)
        shape = Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self._kind,
            in_tiles,
            kv_dtype == "float32",
            config.qk_norm,
            config.rms_norm_eps,
        )
        qkv = [[f"{n}.self_attn.{part}_proj" for part in "qkv"] for n in names]
        gate_up = [[f"{n}.mlp.gate_proj", f"{n}.mlp.up_proj"] for n in names]
        products = Products(
            self._load(weights, qkv, REPLACE, config.qkv_bias),
            self._load(weights, [[f"{n}.self_attn.o_proj"] for n in names], ADD, config.o_bias),
            self._load(weights, gate_up, GATE),
            self._load(weights, [[f"{n}.mlp.down_proj"] for n in names], ADD),
        )
        head = self._load(
            weights, [["model.embed_tokens" if config.tie_word_embeddings else "lm_head"]], REPLACE
        )
        rotary = Rotary(*rope_tables(config, max_context))
        norms = self._load_norms(weights, names)
        self._model = Model(shape, norms, products, head, _flat(rotary.cos), _flat(rotary.signed_sin))
        self._rows = self._make_rows(-(-max_rows // BLOCK) * BLOCK)
        self._x = torch.from_numpy(self._rows.x).view(-1, config.hidden_size)
        self._memory = self._make_memory()

    @property
    def kernels(self) -> str:
        """What the bits depend on besides the processor's vectors."""
        return "tiles" if self._model.shape.in_tiles else "lanes"

    def forward(
        self, batch: StepBatch, cache: PagedCache, after_layer: Callable[[int], None]
    ) -> torch.Tensor | None:
        """Logits [R, vocabulary] float32 of `batch.logit_rows`; None where no row draws.

        `after_layer(n)` is called when the cache holds the step's keys and values of the first n layers.
        """
        num_rows = len(batch.token_ids)
        self._x[:num_rows] = self._embedding[batch.token_ids]
        step = self._step(batch, cache)
        num_layers, at_once = self._config.num_layers, layers_per_report(self._config.num_layers)
        for first in range(0, num_layers, at_once):
            end = min(first + at_once, num_layers)
            run_layers(first, end, self._model, self._rows, step, self._memory, self._num_threads)
            after_layer(end)
        if not batch.drawing:
            return None
        drawing = batch.logit_rows.numpy()[: batch.num_draws]
        logits = torch.empty(len(drawing), self._model.head.num_outputs)
        run_head(self._model, self._rows, self._memory, drawing, logits.view(-1).numpy(), self._num_threads)
        return logits[:, : self._config.vocab_size]

    def _step(self, batch: StepBatch, cache: PagedCache) -> Step:
        units, table_at = [], 0
        for span in batch.spans:
            row, end = span.first_row, span.first_row + span.num_tokens
            while row < end:
                stop = min(end, (row // BLOCK + 1) * BLOCK)
                position = span.start + row - span.first_row
                units += [
                    (row, stop - row, position, table_at, head) for head in range(self._config.num_kv_heads)
                ]
                row = stop
            table_at += len(span.blocks)
        units.sort(key=lambda unit: unit[4])  # a head's keys stay near for all that read them
        keys, values = (cache.planes[name].view(torch.uint16).numpy() for name in ("k", "v"))
        return Step(
            len(batch.token_ids),
            batch.positions.numpy(),
            batch.slots.numpy(),
            np.asarray(units, np.int32).reshape(-1),
            np.concatenate([span.blocks for span in batch.spans]).astype(np.int32),
            keys.shape[2],
            keys.reshape(-1),
            values.reshape(-1),
        )

    def _load_norms(self, weights: Weights, names: list[str]) -> Norms:
        def stacked(part: str) -> np.ndarray:
            return _flat(torch.stack([weights.get(f"{name}.{part}.weight").float() for name in names]))

        none = np.zeros(0, np.float32)
        has = self._config.qk_norm
        return Norms(
            stacked("input_layernorm"),
            stacked("post_attention_layernorm"),
            _flat(weights.get("model.norm.weight").float()),
            stacked("self_attn.q_norm") if has else none,
            stacked("self_attn.k_norm") if has else none,
        )

    def _load(self, weights: Weights, names: list[list[str]], ends: int, has_bias: bool = False) -> Packed:
        """One product per entry of `names`, of the rows of all names in it."""
        shapes = [weights.get(f"{part}.weight").shape for part in names[0]]
        outputs = -(-sum(shape[0] for shape in shapes) // BLOCK) * BLOCK
        width = shapes[0][1] * _WEIGHT_BYTES[self._kind]
        codes = _zeros((len(names) * outputs, width), np.uint8)
        scales, starts = _zeros(len(codes), np.float32), _zeros(len(codes), np.int32)
        bias = _zeros(len(codes) if has_bias else 0, np.float32)
        for layer, parts in enumerate(names):
            at = layer * outputs
            for piece in _pieces(weights, parts, ends):
                end = at + len(piece)
                packed, scales[at:end], starts[at:end] = self._encode(piece)
                codes[at:end] = packed.reshape(-1, width)
                at = end
            if has_bias:
                of_layer = weights.fused([f"{part}.bias" for part in parts], torch.float32)
                bias[layer * outputs : layer * outputs + len(of_layer)] = of_layer.numpy()
        if has_bias and not self._of_bytes:
            starts = bias.view(np.int32)
        return Packed(codes.reshape(-1), scales, starts, bias, width, outputs, ends)

    def _encode(self, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | int]:
        """weight float32, overwritten → packed, scales and starts."""
        if self._kind == FLOATS_IN_LANES:
            return pack(weight.numpy()), 0.0, 0
        if not self._of_bytes:
            return pack(weight.to(torch.bfloat16).view(torch.uint16).numpy()), 0.0, 0
        flat = weight.view(-1).numpy()
        rotate(flat, 0, len(flat), flat, 0)
        codes, scale = (numbers.numpy() for numbers in quantize_weight(weight))
        # Both sides are √MIXED times as large.
        return pack(codes), scale / MIXED, -128 * codes.sum(1, dtype=np.int32)

    def _make_rows(self, max_rows: int) -> Rows:
        config = self._config
        widest_input = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
        widest = max(self._model.products.qkv.num_outputs, widest_input)
        room = widest_input * (1 if self._of_bytes else 4 if takes_floats(self._kind) else 2)
        stride = (widest + 16) // 32 * 32 + 16  # an odd number of cache lines: columns of rows share no set
        codes = _zeros(max_rows * room, np.uint8)
        return Rows(
            stride,
            room,
            _zeros(max_rows * config.hidden_size, np.float32),
            _zeros(max_rows * stride, np.float32),
            _zeros(max_rows * config.num_heads * config.head_dim, np.uint16),
            _zeros(max_rows * config.num_heads * config.head_dim, np.float32),
            codes,
            codes.view(np.uint16),
            codes.view(np.float32),
            _zeros(max_rows, np.float32),
        )

    def _make_memory(self) -> Memory:
        config, threads = self._config, self._num_threads
        size = config.head_dim
        rows = -(-BLOCK * (config.num_heads // config.num_kv_heads) // 16) * 16
        sums = _zeros((threads, 2 * BLOCK * BLOCK), np.int32)
        widest = max(config.hidden_size, config.intermediate_size, config.num_heads * size)
        attention = AttentionScratch(
            _zeros((threads, rows * size), np.uint16),
            _zeros((threads, rows * size), np.float32),
            _zeros((threads, 2 * KEYS * size), np.uint16),
            _zeros((threads, 2 * KEYS * size), np.uint16),
            _zeros((threads, rows * KEYS), np.float32),
            _zeros((threads, rows * KEYS), np.uint16),
            _zeros((threads, rows * size), np.float32),
            _zeros((threads, rows * 16), np.float32),
            _zeros((threads, rows), np.float32),
        )
        row, other_row = (_zeros((threads, widest), np.float32) for _ in range(2))
        return Memory(row, other_row, Sums(sums, sums.view(np.float32)), attention, FULL_TILES)


def _zeros(shape: int | tuple[int, ...], dtype: type) -> np.ndarray:
    """Rows of tiles and vectors that begin where a cache line does are read in one access instead of two."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(num_bytes + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + num_bytes].view(dtype).reshape(shape)


def _pieces(weights: Weights, parts: list[str], ends: int) -> Iterator[torch.Tensor]:
    """The rows of matrices below one another in float32, a limited number at a time, the last padded to a multiple of
    BLOCK; for GATE 16 of one and 16 of the other take turns, all at once."""
    if len(parts) == 1:
        whole = weights.get(f"{parts[0]}.weight")
        pieces = [whole[first : first + _PIECE_ROWS] for first in range(0, len(whole), _PIECE_ROWS)]
    else:
        pieces = [weights.fused([f"{part}.weight" for part in parts], torch.float32)]
    for piece in pieces:
        piece = torch.nn.functional.pad(piece.to(torch.float32), (0, 0, 0, -len(piece) % BLOCK))
        if ends == GATE:
            piece = piece.view(2, -1, 16, piece.shape[1]).transpose(0, 1).reshape(piece.shape)
        yield piece


def _flat(tensor: torch.Tensor) -> np.ndarray:
    flat = _zeros(tensor.numel(), np.float32)
    flat[:] = tensor.float().reshape(-1).numpy()
    return flat
