"""Turn a model source into a prepared directory of the store, once; workers open only such directories."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.model_store.architectures import check_tensors
from cluster.model_store.errors import DamagedSourceError, ModelStoreError
from cluster.model_store.locate import open_source
from cluster.model_store.manifest import ModelManifest, write_manifest
from cluster.model_store.safetensors_file import write_safetensors
from cluster.model_store.source import ModelSource
from cluster.model_store.staging import staged
from cluster.model_store.store import model_directory, name_from
from text.errors import TextError
from text.tokenizer import Tokenizer, tokenizer_digest

Progress = Callable[[str, float], None]
_DIGEST_BYTES = 32


def prepare(
    source: str, *, name: str | None, root: Path | None = None, progress: Progress | None = None
) -> Path:
    """Write the model of `source` to the store and return its directory.

    `source` is a GGUF file, a Hugging Face style directory or the name of an installed package that carries
    a GGUF file. `name` defaults to one made from the source. A model of that name is replaced, at once and
    whole: nobody sees a half-written one. `progress` is called with a stage ("reading", "weights",
    "tokenizer") and the fraction of it that is done.

    Raises ModelSourceError (what is wrong with the source, and where), InvalidModelNameError, or
    ModelStoreError (the disk refuses).
    """
    report: Progress = progress if progress is not None else lambda stage, fraction: None
    target = model_directory(name, root) if name is not None else None
    report("reading", 0.0)
    model = open_source(source)
    target = target or model_directory(name_from(model.suggested_name), root)
    check_tensors(model.tensors, model.config, Path(source))
    report("reading", 1.0)
    with staged(target) as directory:
        _check_room(directory, model)
        weights_digest = _write_weights(directory, model, lambda done: report("weights", done))
        report("tokenizer", 0.0)
        tokenizer = _write_tokenizer(directory, model, source)
        manifest = ModelManifest(
            name=target.name,
            source=model.description,
            weights_digest=weights_digest,
            tokenizer_digest=tokenizer_digest(directory),
            eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
            bos_token_id=tokenizer.bos_token_id,
            add_bos=tokenizer.add_bos,
            max_context=model.config["max_position_embeddings"],
        )
        write_manifest(directory, manifest)
    report("tokenizer", 1.0)
    return target


def _check_room(directory: Path, model: ModelSource) -> None:
    """Say at once that the disk is too small, not after minutes of writing."""
    needed_bytes = sum(tensor.num_bytes for tensor in model.tensors)
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise ModelStoreError(
            f"{directory.parent}: {needed_bytes / 1e9:.1f} GB are needed, {free_bytes / 1e9:.1f} GB are"
            " free; make room, or set HEADRACE_HOME to a larger disk"
        )


def _write_weights(directory: Path, model: ModelSource, progress: Callable[[float], None]) -> str:
    """Write config.json and model.safetensors; the digest of both."""
    config = (json.dumps(model.config, indent=2, sort_keys=True) + "\n").encode()
    (directory / "config.json").write_bytes(config)
    digest = hashlib.blake2b(config, digest_size=_DIGEST_BYTES)
    write_safetensors(directory / "model.safetensors", model.tensors, digest, progress)
    return digest.hexdigest()


def _write_tokenizer(directory: Path, model: ModelSource, source: str) -> Tokenizer:
    """Write the tokenizer's files and open them, which checks them. Raises DamagedSourceError."""
    parts = model.tokenizer
    (directory / "tokenizer.json").write_text(parts.tokenizer_json, encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", parts.settings)
    if parts.chat_template is not None:
        (directory / "chat_template.jinja").write_text(parts.chat_template, encoding="utf-8")
    _write_json(directory / "generation_config.json", {"eos_token_id": list(parts.eos_token_ids)})
    try:
        tokenizer = Tokenizer.open(directory)
        end = None if parts.eos_is_complete else tokenizer.end_of_turn_id()
        if end is not None and end not in tokenizer.eos_token_ids:
            _write_json(directory / "generation_config.json", {"eos_token_id": [*parts.eos_token_ids, end]})
            tokenizer = Tokenizer.open(directory)
    except TextError as error:
        raise DamagedSourceError(f"{source}: its tokenizer cannot be used: {error}") from error
    if not tokenizer.eos_token_ids:
        raise DamagedSourceError(f"{source}: it names no end-of-text token, so answers would never end")
    if tokenizer.vocab_size > model.config["vocab_size"]:
        raise DamagedSourceError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only"
            f" {model.config['vocab_size']} rows"
        )
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
