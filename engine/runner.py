"""The model on its device: memory sized by bytes, one forward a step.

Knows torch, the model and the cache; knows no requests beyond the rows of a plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.batch import TILE_TOKENS, BatchBuilder, StepBatch
from engine.cache import PagedCache
from engine.cache_size import (
    RECORDS_SHARE,
    context_blocks,
    least_bytes,
    paged_block_bytes,
    record_bytes,
    slot_bytes,
)
from engine.copy_lane import CardStreams, CopyLane
from engine.graphs import AnswerSizes, DecodeGraphs, record_on_card
from engine.models.decoders import Decoder, DecoderOptions, open_decoder
from engine.models.dense import DenseDecoder
from engine.models.families import AnyConfig, open_config
from engine.models.layouts import cache_layout, kv_dtypes
from engine.models.packed import PackedDecoder
from engine.pool import BlockPool
from engine.record_policy import RecordPolicy
from engine.scheduler import StepPlan
from engine.weights import open_weights
from engine.window_cache import WindowCache
from engine.windows import WindowPool
from kvtransfer.layouts import Window

PROBE_TOKENS = TILE_TOKENS + 24  # of the longest step that is computed at start (engine/probe.py)
PRECISIONS = ("float32", "bfloat16", "int8", "fp8")
FP8_CAPABILITY = (8, 9)


class EngineError(Exception):
    """The engine cannot be opened as asked; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a model. `precision`: float32 | bfloat16 | int8 | fp8 | auto; `kv_dtype`: float32 | bfloat16 | auto,
    and fp8 for DeepSeek's models.

    `max_context`, `chunk_tokens` in tokens; `kv_bytes` bounds the cache; `num_threads` of one product.
    `tenant_share`: the part of the cache, at least one context of it, within which no other tenant takes a
    tenant's cached blocks (engine/shares.py).
    `max_drafts`: most guesses at an answer's next tokens in one step, 0 for none (engine/drafter.py). `itl_s`: how long
    an answer should at most wait for its next token while prompts are computed beside it (engine/scheduler.py).
    `set_aside_bytes`: host memory for the keys and values of preempted sequences (engine/set_aside.py).
    `window_records`: where a prefix can be taken up, of a model with windows (engine/record_policy.py).
    `device` is "cpu" or "cuda:N" (CUDA: written, not run by the project's tests).
    """

    precision: str = "auto"
    kv_dtype: str = "auto"
    max_context: int = 8192
    chunk_tokens: int = 512
    max_sequences: int = 64
    kv_bytes: int = 2 << 30
    tenant_share: float = 1.0
    max_drafts: int = 8
    itl_s: float | None = None
    set_aside_bytes: int = 256 << 20
    window_records: RecordPolicy = field(default_factory=RecordPolicy)
    num_threads: int = 1
    device: str = "cpu"


class ModelRunner:
    """Loads the model in `model_dir` and runs batches through it.

    Raises EngineError, engine.models.config.ModelConfigError or engine.weights.WeightsError.
    """

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        torch.set_num_threads(options.num_threads)
        self.config: AnyConfig = open_config(model_dir)
        self.device = torch.device(options.device)
        self.precision = options.precision
        if self.precision == "auto":
            self.precision = "float32" if self.device.type == "cpu" else "bfloat16"
        if self.precision not in PRECISIONS:
            raise EngineError(f"precision {self.precision!r} is not one of auto, {', '.join(PRECISIONS)}")
        self._check_device()
        kv_dtype = options.kv_dtype
        if kv_dtype == "auto":
            kv_dtype = "float32" if self.precision == "float32" else "bfloat16"
        if kv_dtype not in kv_dtypes(self.config):
            known = ", ".join(kv_dtypes(self.config))
            raise EngineError(f"kv_dtype {kv_dtype!r}: the cache of this model is kept as {known}, or auto")
        self.layout = cache_layout(self.config, kv_dtype)
        self.max_context = min(options.max_context, self.config.max_context)
        self.pool, self.cache = self._make_memory(options)
        most_rows = max(options.chunk_tokens + options.max_sequences, PROBE_TOKENS + 1)
        self._model: Decoder = open_decoder(
            self.config,
            open_weights(model_dir, self.config),
            DecoderOptions(
                self.precision, kv_dtype, self.max_context, most_rows, options.num_threads, self.device
            ),
        )
        self._graphs: DecodeGraphs | None = None
        sizes = None
        if self.device.type == "cuda" and isinstance(self._model, DenseDecoder):
            sizes = AnswerSizes.up_to(options.max_sequences, context_blocks(self.layout, self.max_context))
            self._graphs = DecodeGraphs(self._decode, record_on_card)
        self._builder = BatchBuilder(
            self.pool.blocks,
            self.layout.block_tokens,
            self.cache.padding_block,
            self.device,
            with_tiles=isinstance(self._model, DenseDecoder),
            slot_of=self.pool.slot,
            padded_size=sizes.fit if sizes else None,
        )

    def _make_memory(self, options: EngineOptions) -> tuple[BlockPool, PagedCache]:
        layout, block_tokens = self.layout, self.layout.block_tokens
        block_bytes, needed = paged_block_bytes(layout), context_blocks(layout, self.max_context)
        windows_bytes = options.max_sequences * slot_bytes(layout, options.max_drafts)
        left_bytes = options.kv_bytes - windows_bytes
        num_records = 0
        if windows_bytes:
            num_records = max(left_bytes, 0) // RECORDS_SHARE // record_bytes(layout)
        num_blocks = max(left_bytes - num_records * record_bytes(layout), 0) // block_bytes
        if num_blocks < needed:
            least = least_bytes(layout, self.max_context, options.max_sequences, options.max_drafts)
            raise EngineError(
                f"kv_memory of {options.kv_bytes} bytes holds {num_blocks * block_tokens} tokens, less than one "
                f"context of {self.max_context}: give at least {least} bytes or lower max_context"
            )
        if int(options.tenant_share * num_blocks) < needed:
            raise EngineError(
                f"a tenant's share of {options.tenant_share} of {num_blocks} blocks is less than the {needed} that "
                f"one context of {self.max_context} tokens takes: raise kv_memory or the share"
            )
        windows = None
        if windows_bytes:
            replay_tokens = 0
            if options.window_records.kind == "zero":
                replay_tokens = max(
                    p.kind.rows * p.layers for p in layout.planes if isinstance(p.kind, Window)
                )
            windows = WindowPool(options.max_sequences, num_records, replay_tokens)
        pool = BlockPool(num_blocks, block_tokens, options.tenant_share, windows)
        lane = CopyLane(CardStreams(self.device)) if self.device.type == "cuda" else None
        num_slots = options.max_sequences if windows else 0
        window_cache = WindowCache(layout, num_slots, num_records, options.max_drafts, self.device)
        cache = PagedCache(layout, num_blocks, self.device, pool.blocks, lane, window_cache, pool.slot)
        return pool, cache

    def _check_device(self) -> None:
        if self.precision == "int8" and self.device.type != "cpu":
            raise EngineError(f"precision int8 runs on the CPU, not on {self.device}: use bfloat16")
        if self.precision != "fp8":
            return
        if self.device.type != "cuda":
            raise EngineError(f"precision fp8 runs on GPUs, not on {self.device}: use int8")
        if torch.cuda.get_device_capability(self.device) < FP8_CAPABILITY:
            raise EngineError(
                f"{torch.cuda.get_device_name(self.device)} has no products of fp8 (compute capability 8.9 has): "
                "use bfloat16"
            )

    @property
    def arithmetic(self) -> str:
        """What two workers must share for equal bits: precision, kernels, instruction set."""
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
        kernels = "onednn" if torch.backends.mkldnn.is_available() else "native"
        if isinstance(self._model, PackedDecoder):
            kernels = self._model.kernels
        place = isa if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return f"{self.precision}/torch-{torch.__version__}/{kernels}/{place}"

    def _decode(self, batch: StepBatch) -> torch.Tensor:
        logits = self._model.forward(batch, self.cache, lambda _: None)
        assert logits is not None
        return logits

    def build(self, plan: StepPlan) -> StepBatch:
        """The plan's arrays; reads sequences and the pool, so the caller holds the engine's lock."""
        return self._builder.build(plan)

    def forward(self, batch: StepBatch, after_layer: Callable[[int], None] = lambda _: None) -> np.ndarray:
        """Logits [batch.num_draws, vocabulary] float32.

        `after_layer(n)`: the step's keys and values of the first n layers are in the cache.
        """
        with torch.inference_mode():
            # Also for copies into blocks whose lease has ended meanwhile: they must not land on what this step writes.
            self.cache.fence()
            if self._graphs is not None and batch.padded is not None and not batch.chunks:
                logits: torch.Tensor | None = self._graphs(batch)
            else:
                logits = self._model.forward(batch, self.cache, self._reporting(after_layer))
            self.cache.steps_wrote()
        if logits is None:
            return np.empty((0, self.config.vocab_size), dtype=np.float32)
        return logits[: batch.num_draws].cpu().numpy()

    def _reporting(self, after_layer: Callable[[int], None]) -> Callable[[int], None]:
        """`after_layer`, told of what may be copied by now."""

        def report(num_layers: int) -> None:
            self.cache.steps_wrote()
            after_layer(num_layers)

        return report
