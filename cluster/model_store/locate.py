"""What SOURCE means: a GGUF file, a Hugging Face style directory, an installed package with a GGUF, or a model with
random weights."""

from importlib import metadata
from pathlib import Path

from cluster.model_store.errors import ModelSourceError, SourceNotFoundError
from cluster.model_store.gguf_source import open_gguf_source
from cluster.model_store.hf_directory import open_directory
from cluster.model_store.random_model import random_names, random_source
from cluster.model_store.source import ModelSource


def open_source(source: str) -> ModelSource:
    """Raises SourceNotFoundError if `source` is none of the three, and what opening it raises."""
    path = Path(source).expanduser()
    if source and path.is_dir():
        return open_directory(path)
    if path.is_file():
        return open_gguf_source(path)
    if source in random_names():
        return random_source(source)
    packaged = packaged_gguf(source)
    if packaged is None:
        raise SourceNotFoundError(
            f"{source}: neither a file, nor a directory, nor an installed Python package. Give a GGUF file, a"
            " directory with config.json and safetensors, a package that carries a GGUF file, or a model with"
            f" random weights: {', '.join(random_names())}"
        )
    return open_gguf_source(packaged)


def packaged_gguf(name: str) -> Path | None:
    """The one GGUF file of the installed distribution `name`, None if there is no such distribution."""
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None
    found = [file for file in distribution.files or [] if file.suffix.lower() == ".gguf"]
    if len(found) != 1:
        listed = f"{len(found)} GGUF files ({', '.join(map(str, found))})" if found else "no GGUF file"
        raise ModelSourceError(f"{name}: this installed package has {listed}; exactly one was expected")
    return Path(str(distribution.locate_file(found[0])))
