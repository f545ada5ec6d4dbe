"""The model store: from a GGUF file, a directory or a package to a directory that workers can map."""

from cluster.model_store.errors import (
    InvalidModelNameError,
    ModelNotFoundError,
    ModelSourceError,
    ModelStoreError,
)
from cluster.model_store.manifest import ModelManifest, read_manifest
from cluster.model_store.prepare import prepare
from cluster.model_store.store import list_models, model_directory, resolve, store_root

__all__ = [
    "InvalidModelNameError",
    "ModelManifest",
    "ModelNotFoundError",
    "ModelSourceError",
    "ModelStoreError",
    "list_models",
    "model_directory",
    "prepare",
    "read_manifest",
    "resolve",
    "store_root",
]
