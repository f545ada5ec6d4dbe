"""The KV cache of a real text: what codecs and transports are measured on.

The text is the documentation of Python's own language, which every installation carries.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.prompts import documentation
from cluster.model_store import resolve
from engine.engine import Engine
from engine.events import PrefillDone
from engine.request import SamplingParams
from engine.runner import EngineOptions
from text.tokenizer import Tokenizer

MODEL = "smollm2-135m-instruct"
OWNER = b"sample"


def real_tokens(num_tokens: int) -> list[int]:
    """The text's first tokens."""
    tokens = Tokenizer.open(resolve(MODEL)).encode(documentation()[: 8 * num_tokens])
    assert len(tokens) >= num_tokens, "the text is too short"
    return tokens[:num_tokens]


def write_sample(path: Path, num_tokens: int, dtype: str = "bfloat16") -> None:
    """A safetensors file with "k" and "v", each [layers, heads, tokens, width] in `dtype`."""
    options = EngineOptions(
        kv_dtype=dtype, max_context=num_tokens + 64, chunk_tokens=512, num_threads=os.cpu_count() or 1
    )
    engine = Engine.open(resolve(MODEL), options)
    tokens = real_tokens(num_tokens)
    engine.reserve(OWNER, tokens, 1, b"sample")
    engine.submit(OWNER, tokens, SamplingParams(temperature=0.0), prefill_only=True)
    while not any(isinstance(event, PrefillDone) for event in engine.step().events):
        pass
    size = engine.layout.block_tokens
    blocks = torch.tensor(engine.pool.blocks(OWNER))
    slots = (blocks[:, None] * size + torch.arange(size)).reshape(-1)[:num_tokens]
    planes = {name: plane.index_select(2, slots).contiguous() for name, plane in engine.cache.planes.items()}
    save_file(planes, path)
