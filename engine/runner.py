"""The model on its device: memory sized by bytes, one forward a step.

Knows torch, the model and the cache; knows no requests beyond the rows of a plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.batch import TILE_TOKENS, BatchBuilder, StepBatch
from engine.cache import PagedCache
from engine.copy_lane import CardStreams, CopyLane
from engine.graphs import AnswerSizes, DecodeGraphs, record_on_card
from engine.models.config import ModelConfig
from engine.models.dense import DenseDecoder, cache_layout
from engine.models.packed import PackedDecoder, runs_packed
from engine.pool import BlockPool
from engine.scheduler import StepPlan
from engine.weights import Weights, open_weights

BLOCK_TOKENS = 64
"""Of a block in memory and of a key block (design §4). The engine has no other size; a cache at the other end of a
transfer may (kvtransfer/recut.py), since pieces travel by entry."""
PROBE_TOKENS = TILE_TOKENS + 24  # of the longest step that is computed at start (engine/probe.py)
PRECISIONS = ("float32", "bfloat16", "int8", "fp8")
FP8_CAPABILITY = (8, 9)


class EngineError(Exception):
    """The engine cannot be opened as asked; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a model. `precision`: float32 | bfloat16 | int8 | fp8 | auto; `kv_dtype`: float32 | bfloat16 | auto.

    `max_context`, `chunk_tokens` in tokens; `kv_bytes` bounds the cache; `num_threads` of one product.
    `tenant_share`: the part of the cache, at least one context of it, within which no other tenant takes a
    tenant's cached blocks (engine/shares.py).
    `max_drafts`: most guesses at an answer's next tokens in one step, 0 for none (engine/drafter.py). `itl_s`: how long
    an answer should at most wait for its next token while prompts are computed beside it (engine/scheduler.py).
    `set_aside_bytes`: host memory for the keys and values of preempted sequences (engine/set_aside.py).
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
    num_threads: int = 1
    device: str = "cpu"


class ModelRunner:
    """Loads the model in `model_dir` and runs batches through it.

    Raises EngineError, engine.models.config.ModelConfigError or engine.weights.WeightsError.
    """

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        torch.set_num_threads(options.num_threads)
        self.config: ModelConfig = ModelConfig.open(model_dir)
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
        self.layout = cache_layout(self.config, kv_dtype, BLOCK_TOKENS)
        self.max_context = min(options.max_context, self.config.max_context)
        block_bytes = self.layout.num_bytes(BLOCK_TOKENS)
        num_blocks = options.kv_bytes // block_bytes
        needed = -(-self.max_context // BLOCK_TOKENS) + 1
        if num_blocks < needed:
            raise EngineError(
                f"kv_memory of {options.kv_bytes} bytes holds {num_blocks * BLOCK_TOKENS} tokens, less than one "
                f"context of {self.max_context}: give at least {needed * block_bytes} bytes or lower max_context"
            )
        if int(options.tenant_share * num_blocks) < needed:
            raise EngineError(
                f"a tenant's share of {options.tenant_share} of {num_blocks} blocks is less than the {needed} that "
                f"one context of {self.max_context} tokens takes: raise kv_memory or the share"
            )
        self.pool = BlockPool(num_blocks, BLOCK_TOKENS, options.tenant_share)
        lane = CopyLane(CardStreams(self.device)) if self.device.type == "cuda" else None
        self.cache = PagedCache(self.layout, num_blocks, self.device, self.pool.blocks, lane)
        self._model = self._open_model(open_weights(model_dir, self.config), options)
        self._graphs: DecodeGraphs | None = None
        sizes = None
        if self.device.type == "cuda":
            sizes = AnswerSizes.up_to(options.max_sequences, needed)
            self._graphs = DecodeGraphs(self._decode, record_on_card)
        self._builder = BatchBuilder(
            self.pool.blocks,
            BLOCK_TOKENS,
            self.cache.padding_block,
            self.device,
            with_tiles=isinstance(self._model, DenseDecoder),
            padded_size=sizes.fit if sizes else None,
        )

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

    def _open_model(self, weights: Weights, options: EngineOptions) -> PackedDecoder | DenseDecoder:
        kv_dtype = self.layout.plane("k").fields[0].dtype
        if not runs_packed(self.config, self.precision, kv_dtype, self.device):
            if self.precision == "bfloat16" and self.device.type == "cpu":
                _leave_out_amx()
            return DenseDecoder(
                self.config, weights, self.precision, self.max_context, BLOCK_TOKENS, self.device
            )
        max_rows = max(options.chunk_tokens + options.max_sequences, PROBE_TOKENS + 1)
        return PackedDecoder(
            self.config,
            weights,
            self.precision,
            kv_dtype,
            self.max_context,
            max_rows,
            options.num_threads,
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


def _leave_out_amx() -> None:
    """oneDNN's AMX kernels for bfloat16 change with the number of rows, which breaks the numeric contract (ADR 1). It
    reads this before its first product, and never again."""
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
