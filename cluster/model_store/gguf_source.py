"""A GGUF file as a model source."""

from pathlib import Path

from cluster.model_store.gguf_config import gguf_config
from cluster.model_store.gguf_header import open_gguf
from cluster.model_store.gguf_tokenizer import gguf_tokenizer
from cluster.model_store.gguf_weights import gguf_tensors
from cluster.model_store.source import ModelSource


def open_gguf_source(path: Path) -> ModelSource:
    """The model in `path`. Weights are dequantized when they are written. Raises ModelSourceError."""
    file = open_gguf(path)
    config = gguf_config(file)
    return ModelSource(
        description=f"GGUF file {path.name}",
        suggested_name=path.stem,
        config=config,
        tensors=gguf_tensors(file, config),
        tokenizer=gguf_tokenizer(file),
    )
