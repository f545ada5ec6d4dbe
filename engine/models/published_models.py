"""Configs of published models, by name: to plan for a model before it is at hand."""

from __future__ import annotations

import json
from pathlib import Path

from engine.models.config_keys import ConfigKeys
from engine.models.families import AnyConfig, config_of

_HOME = Path(__file__).parent / "published"


def published_names() -> list[str]:
    """All names, in order."""
    return sorted(path.stem for path in _HOME.glob("*.json"))


def published_config(name: str) -> AnyConfig:
    """Raises KeyError for a name that is not one of `published_names`."""
    if name not in published_names():
        raise KeyError(name)
    path = _HOME / f"{name}.json"
    return config_of(ConfigKeys(json.loads(path.read_text(encoding="utf-8")), path.name))
