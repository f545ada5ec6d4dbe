"""A config.json, read key by key: every value typed, every error with its place. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

CONFIG_FILE = "config.json"
_LARGEST_NUMBER = 1e15


class ModelConfigError(ValueError):
    """A config.json that cannot be served; the message names the file, the key and what is supported."""


class Architecture(StrEnum):
    """Model families, as `model_type` spells them."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    DEEPSEEK_V3 = "deepseek_v3"
    DEEPSEEK_V32 = "deepseek_v32"
    DEEPSEEK_V4 = "deepseek_v4"


_CLASS_NAMES = {
    "LlamaForCausalLM": Architecture.LLAMA,
    "Qwen2ForCausalLM": Architecture.QWEN2,
    "Qwen3ForCausalLM": Architecture.QWEN3,
    "DeepseekV3ForCausalLM": Architecture.DEEPSEEK_V3,
    "DeepseekV32ForCausalLM": Architecture.DEEPSEEK_V32,
    "DeepseekV4ForCausalLM": Architecture.DEEPSEEK_V4,
}


class ConfigKeys:
    """Typed reads of one JSON object, with errors that say where."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.raw = raw
        self._source = source
        self._prefix = prefix

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ModelConfigError(f"{self._source}: {self._prefix}{key}: {problem}")

    def child(self, key: str, value: Mapping[str, Any]) -> ConfigKeys:
        return ConfigKeys(value, self._source, f"{self._prefix}{key}.")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing; a number is needed")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"is {value!r}; a number is needed")
        if not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:  # NaN too
            self.fail(key, f"is {value}; a number of at most {_LARGEST_NUMBER:.0e} is needed")
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            self.fail(key, f"is {value}; a number above 0 is needed")
        return float(value)

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value) or value < 1:
            self.fail(key, f"is {value}; a whole number of at least 1 is needed")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"is {value!r}; true or false is needed")
        return bool(value)


def read_config(model_dir: Path) -> ConfigKeys:
    """The keys of `model_dir`/config.json.

    Raises:
        ModelConfigError: no such file, or not a JSON object.
    """
    path = model_dir / CONFIG_FILE
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelConfigError(
            f"{path}: cannot be read ({error.strerror}); is it a prepared model?"
        ) from error
    except ValueError as error:
        raise ModelConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{path}: holds a JSON {type(raw).__name__}; an object is needed")
    return ConfigKeys(raw, str(path))


def architecture_of(keys: ConfigKeys) -> Architecture:
    """Which family the config is of. Raises ModelConfigError for one that is not served."""
    supported = ", ".join(f"{architecture} ({name})" for name, architecture in _CLASS_NAMES.items())
    names, model_type = keys.raw.get("architectures"), keys.raw.get("model_type")
    found = []
    if names is not None:
        if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_CLASS_NAMES):
            keys.fail("architectures", f"{names!r} is not supported; supported are {supported}")
        found.append(_CLASS_NAMES[names[0]])
    if model_type is not None:
        if model_type not in list(Architecture):
            keys.fail("model_type", f"{model_type!r} is not supported; supported are {supported}")
        found.append(Architecture(model_type))
    if not found:
        keys.fail("model_type", f"is missing; supported are {supported}")
    if found[0] is not found[-1]:
        keys.fail("architectures", f"{names} does not fit model_type {model_type!r}")
    return found[0]
