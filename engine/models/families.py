"""Which code serves which model: one place that knows all families.

A family has a config, the cache that it fills, the tensors that it is made of, and a model that computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from engine.models.config import DENSE, ModelConfig
from engine.models.config_keys import Architecture, ConfigKeys, architecture_of, read_config
from engine.models.deepseek.config import MlaConfig, V4Config

AnyConfig: TypeAlias = ModelConfig | MlaConfig | V4Config


def open_config(model_dir: Path) -> AnyConfig:
    """Read `model_dir`/config.json. Raises ModelConfigError: none there, or a model that is not served."""
    return config_of(read_config(model_dir))


def config_of(keys: ConfigKeys) -> AnyConfig:
    """The config in `keys`. Raises ModelConfigError for a model that is not served."""
    architecture = architecture_of(keys)
    if architecture in DENSE:
        return ModelConfig.read(keys)
    if architecture is Architecture.DEEPSEEK_V4:
        return V4Config.read(keys)
    return MlaConfig.read(keys)
