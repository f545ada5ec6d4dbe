"""A Hugging Face style directory as a model source: config.json, safetensors (also sharded), tokenizer files.

Nothing of the directory is executed: code that it may carry (`auto_map`) is never looked at.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.model_store.architectures import check_architecture, deepseek_config, is_deepseek
from cluster.model_store.errors import DamagedSourceError, SourceNotFoundError, UnsupportedTokenizerError
from cluster.model_store.hf_config import complete_config
from cluster.model_store.safetensors_file import read_safetensors
from cluster.model_store.source import ModelSource, TokenizerSource
from cluster.model_store.tensors import SourceTensor
from engine.models.deepseek.config import MlaConfig, V4Config
from engine.models.deepseek.tensors import is_left_out

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Buffers that old checkpoints carry and that follow from the configuration.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


def open_directory(directory: Path) -> ModelSource:
    """The model in `directory`. Weights are read when they are written.

    Raises ModelSourceError: a file is missing, damaged or of a kind that is not supported.
    """
    config_path = directory / "config.json"
    config = _read_json(config_path)
    check_architecture(config, config_path)
    config = _deepseek(config, config_path) if is_deepseek(config) else complete_config(config, config_path)
    return ModelSource(
        description=f"directory {directory.name}",
        suggested_name=directory.resolve().name,
        config=config,
        tensors=_tensors(directory, config),
        tokenizer=_tokenizer(directory, config),
    )


def _deepseek(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """As it is, once the engine has read it."""
    deepseek_config(config, path)
    return {"tie_word_embeddings": False} | {key: value for key, value in config.items() if key != "auto_map"}


def _tensors(directory: Path, config: dict[str, Any]) -> list[SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for path in _weight_files(directory):
        for tensor in read_safetensors(path):
            if tensor.name in tensors:
                raise DamagedSourceError(
                    f"{path}: tensor {tensor.name} is also in {tensors[tensor.name].origin}"
                )
            if not tensor.name.endswith(_DERIVED_SUFFIX):
                tensors[tensor.name] = tensor
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)  # a copy of the embedding that some exporters write
    if is_deepseek(config):
        served = deepseek_config(config, directory)
        assert isinstance(served, MlaConfig | V4Config)
        return [tensor for tensor in tensors.values() if not is_left_out(served, tensor.name)]
    return list(tensors.values())


def _weight_files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise DamagedSourceError(f"{index}: it has no weight_map")
        files = sorted(directory / Path(str(name)).name for name in set(weight_map.values()))
    else:
        files = [single]
    for file in files:
        if not file.is_file():
            named = (
                f"{index.name} names it"
                if index.is_file()
                else "weights are read from safetensors files only"
            )
            raise SourceNotFoundError(f"{file}: there is no such file; {named}")
    return files


def _tokenizer(directory: Path, config: dict[str, Any]) -> TokenizerSource:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise SourceNotFoundError(
            f"{path}: there is no such file; tokenizers are read in this format only, not tokenizer.model"
        )
    settings_path = directory / "tokenizer_config.json"
    raw_settings = _read_json(settings_path) if settings_path.is_file() else {}
    text = path.read_text(encoding="utf-8")
    settings: dict[str, Any] = {}
    for name in _NAMED_TOKENS:
        if (token := _token_text(raw_settings.get(name))) is not None:
            settings[name] = token
    tokenizer = _parse(path, text)
    settings["add_bos_token"] = _adds_bos(tokenizer, settings, raw_settings)
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    listed = _ids(generation.get("eos_token_id"))
    named = tokenizer.token_to_id(settings["eos_token"]) if "eos_token" in settings else None
    return TokenizerSource(
        tokenizer_json=text,
        settings=settings,
        chat_template=_chat_template(directory, raw_settings),
        eos_token_ids=listed or tuple(dict.fromkeys((*_ids(config.get("eos_token_id")), *_ids(named)))),
        eos_is_complete=bool(listed),
    )


def _parse(path: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise UnsupportedTokenizerError(f"{path}: not a tokenizer that can be read: {error}") from error


def _adds_bos(tokenizer: Tokenizer, settings: dict[str, Any], raw_settings: dict[str, Any]) -> bool:
    """What tokenizer_config.json says, else what the tokenizer's post-processor does."""
    if "bos_token" not in settings:
        return False
    if isinstance(raw_settings.get("add_bos_token"), bool):
        return bool(raw_settings["add_bos_token"])
    ids = tokenizer.encode("a").ids
    return bool(ids) and ids[0] == tokenizer.token_to_id(settings["bos_token"])


def _chat_template(directory: Path, raw_settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = raw_settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template.strip() else None


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise DamagedSourceError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedSourceError(f"{path}: it should hold a JSON object")
    return value
