"""headrace.json, the manifest of a prepared model: what it is, where it came from, its digests."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.model_store.errors import ModelNotFoundError, ModelStoreError

MANIFEST_NAME = "headrace.json"
FORMAT = 1
_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "source": str,
    "weights_digest": str,
    "tokenizer_digest": str,
    "eos_token_ids": list,
    "bos_token_id": (int, type(None)),
    "add_bos": bool,
    "max_context": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """One prepared model. Digests are BLAKE2b-256 in hex.

    `weights_digest` covers config.json and then model.safetensors, since the same weights under another RoPE
    are another model; `tokenizer_digest` is that of `text.tokenizer`. `max_context` is in tokens.
    """

    name: str
    source: str
    weights_digest: str
    tokenizer_digest: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos: bool
    max_context: int


def write_manifest(directory: Path, manifest: ModelManifest) -> None:
    content = {"format": FORMAT, **asdict(manifest)}
    (directory / MANIFEST_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> ModelManifest:
    """The manifest of the prepared model in `directory`.

    Raises ModelNotFoundError (no prepared model there) or ModelStoreError (not readable, another format).
    """
    path = directory / MANIFEST_NAME
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(
            f"{directory}: there is no prepared model; make one with `headrace model prepare SOURCE --name N`"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelStoreError(f"{path}: cannot be read: {error}; prepare the model again") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ModelStoreError(f"{path}: not a manifest of format {FORMAT}; prepare the model again")
    for key, kind in _TYPES.items():
        if not isinstance(content.get(key, ...), kind):
            raise ModelStoreError(f"{path}: {key} is missing or wrong; prepare the model again")
    fields = {key: content[key] for key in _TYPES}
    return ModelManifest(**(fields | {"eos_token_ids": tuple(fields["eos_token_ids"])}))
