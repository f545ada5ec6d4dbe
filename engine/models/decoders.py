"""A model's weights as something that computes: one place that knows every family's code."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import StepBatch
from engine.cache import PagedCache
from engine.models.config import ModelConfig
from engine.models.deepseek.config import MlaConfig
from engine.models.deepseek.mla import MlaDecoder
from engine.models.deepseek.v4 import V4Decoder
from engine.models.dense import DenseDecoder
from engine.models.families import AnyConfig
from engine.models.layouts import BLOCK_TOKENS
from engine.models.packed import PackedDecoder, runs_packed
from engine.weights import Weights


class Decoder(Protocol):
    """A whole model: token ids in, logits of the rows that draw out."""

    def forward(
        self, batch: StepBatch, cache: PagedCache, after_layer: Callable[[int], None]
    ) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """`max_rows`: of one step; the others as in EngineOptions, with nothing left open."""

    precision: str
    kv_dtype: str
    max_context: int
    max_rows: int
    num_threads: int
    device: torch.device


def open_decoder(config: AnyConfig, weights: Weights, options: DecoderOptions) -> Decoder:
    """Load the weights into the fastest code for the model here."""
    precision, context, device = options.precision, options.max_context, options.device
    is_packed = isinstance(config, ModelConfig) and runs_packed(config, precision, options.kv_dtype, device)
    if precision == "bfloat16" and device.type == "cpu" and not is_packed:
        _leave_out_amx()
    if isinstance(config, ModelConfig):
        if not is_packed:
            return DenseDecoder(config, weights, precision, context, BLOCK_TOKENS, device)
        return PackedDecoder(
            config, weights, precision, options.kv_dtype, context, options.max_rows, options.num_threads
        )
    if isinstance(config, MlaConfig):
        return MlaDecoder(config, weights, precision, context, device)
    return V4Decoder(config, weights, precision, context, device)


def _leave_out_amx() -> None:
    """oneDNN's AMX kernels for bfloat16 change with the number of rows, which breaks the numeric contract (ADR 1). It
    reads this before its first product, and never again."""
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
