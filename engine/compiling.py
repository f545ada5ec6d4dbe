"""Compiles the kernels for this machine ahead of the first worker: `python -m engine.compiling MODEL_DIR`.

What is compiled depends on the processor and on the source alone, so that any model that runs in kernels will do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from engine.engine import Engine
from engine.kernels.decoder import run_head
from engine.models.config import ModelConfig
from engine.models.families import open_config
from engine.models.packed import runs_packed
from engine.runner import EngineOptions

_CONTEXT_TOKENS, _KV_BYTES = 512, 256 << 20


def compile_kernels(model_dir: Path) -> bool:
    """Open the model once, where it runs in kernels that are not compiled yet; returns whether that was so.

    Raises what `Engine.open` raises.
    """
    config = open_config(model_dir)
    if are_compiled() or not isinstance(config, ModelConfig):
        return False
    if not runs_packed(config, "float32", "float32", torch.device("cpu")):
        return False
    context = min(_CONTEXT_TOKENS, config.max_context)
    Engine.open(model_dir, EngineOptions(precision="float32", max_context=context, kv_bytes=_KV_BYTES))
    return True


def are_compiled() -> bool:
    """Whether the kernels as they are now have been kept on this machine; the last one to be compiled tells."""
    return run_head.stats.cache_path is not None and any(  # type: ignore[attr-defined]
        Path(run_head.stats.cache_path).glob("decoder.run_head-*.nbc")  # type: ignore[attr-defined]
    )


if __name__ == "__main__":
    compile_kernels(Path(sys.argv[1]))
