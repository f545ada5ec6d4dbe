"""The model store: prepared models by name, under $HEADRACE_HOME/models or ~/.cache/headrace/models."""

import difflib
import os
import re
from pathlib import Path

from cluster.model_store.errors import InvalidModelNameError, ModelNotFoundError, ModelStoreError
from cluster.model_store.manifest import MANIFEST_NAME, ModelManifest, read_manifest

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def store_root(root: Path | None = None) -> Path:
    """`root` if given, else $HEADRACE_HOME, else ~/.cache/headrace. Models lie in its folder `models`."""
    if root is not None:
        return root
    home = os.environ.get("HEADRACE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "headrace"


def model_directory(name: str, root: Path | None = None) -> Path:
    """Where the model `name` is or would be. Raises InvalidModelNameError."""
    if not _NAME.fullmatch(name):
        raise InvalidModelNameError(
            f"{name!r} cannot be a model's name: use lower-case letters, digits, '.', '_' and '-', at most"
            " 100, starting with a letter or digit"
        )
    return store_root(root) / "models" / name


def name_from(text: str) -> str:
    """A valid model name made from any text, such as a file's stem."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:100]
    return name or "model"


def list_models(root: Path | None = None) -> list[ModelManifest]:
    """The prepared models, by name. Directories without a readable manifest are left out."""
    found: list[ModelManifest] = []
    models = store_root(root) / "models"
    for directory in sorted(models.iterdir()) if models.is_dir() else []:
        try:
            if not directory.name.startswith("."):
                found.append(read_manifest(directory))
        except ModelStoreError:
            continue
    return found


def resolve(name_or_path: str, root: Path | None = None) -> Path:
    """The directory of a prepared model, given its name in the store or a path.

    Raises ModelNotFoundError, which names the nearest model and how to prepare one, InvalidModelNameError, or
    ModelStoreError for a manifest that cannot be read.
    """
    path = Path(name_or_path).expanduser()
    is_path = name_or_path.startswith((".", "~", "/")) or os.sep in name_or_path
    if path.is_file():
        raise ModelNotFoundError(
            f"{name_or_path}: a file, not a prepared model; first run"
            f" `headrace model prepare {name_or_path} --name NAME`"
        )
    if is_path or (path / MANIFEST_NAME).is_file():
        read_manifest(path)
        return path.resolve()
    directory = model_directory(name_or_path, root)
    if not directory.is_dir():
        raise ModelNotFoundError(_unknown(name_or_path, root))
    read_manifest(directory)
    return directory


def _unknown(name: str, root: Path | None) -> str:
    names = [manifest.name for manifest in list_models(root)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}."
    return (
        f"no model {name!r} in {store_root(root) / 'models'}; {hint}"
        f" To make one: `headrace model prepare SOURCE --name {name}`"
    )
