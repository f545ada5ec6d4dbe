"""A profile with nothing left out, and where each value came from. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.plan import ClusterPlan
from cluster.problems import KeyPath
from cluster.profile import LoadedProfile, canonical

LONGEST_ALIGNED = 40
"""Longer lines push their comment out, and not everybody else's."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of `headrace profile show`.

    Attributes:
        path: which setting; its length is the depth.
        value: as it is written in a profile, a tuple for a list; None for a section's head.
        source: `file:line`, `default`, or `derived` with the reason; empty for a section's head.
    """

    path: KeyPath
    value: str | tuple[str, ...] | None
    source: str


def explain(loaded: LoadedProfile, planned: ClusterPlan) -> Iterator[Setting]:
    """Every setting in the order of the vocabulary. Sections that are not used are left out."""
    yield from _section(loaded, planned, canonical(loaded.profile), ())


def render(settings: Iterator[Setting]) -> str:
    """A valid profile, with the sources as comments."""
    rows = [(_yaml(setting), setting.source) for setting in settings]
    width = max(len(text) for text, _ in rows if len(text) <= LONGEST_ALIGNED)
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in rows)


def _section(
    loaded: LoadedProfile, planned: ClusterPlan, values: dict[str, Any], path: KeyPath
) -> Iterator[Setting]:
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict):
            yield Setting(here, None, "")
            yield from _section(loaded, planned, value, here)
            continue
        derived = planned.derived.get(here)
        if derived is not None:
            yield Setting(here, derived.value, f"derived: {derived.reason}")
        elif value is not None and loaded.says(here):
            written = tuple(map(str, value)) if isinstance(value, list) else str(value)
            yield Setting(here, written, f"{loaded.file}:{loaded.document.values[here].line}")
        elif value is not None and value != "":
            yield Setting(here, str(value), "default")


def _yaml(setting: Setting) -> str:
    indent = "  " * (len(setting.path) - 1)
    match setting.value:
        case None:
            written = ""
        case str(text):
            written = f" {_scalar(text)}"
        case items:
            written = f" [{', '.join(map(_scalar, items))}]"
    return f"{indent}{setting.path[-1]}:{written}"


def _scalar(text: str) -> str:
    """Quoted where YAML would read something else."""
    plain = text and not text[0].isspace() and text[0] not in "!&*-?|>%@`\"'#{}[],:" and ": " not in text
    return (
        text if plain and " #" not in text and not text.endswith(":") else "'" + text.replace("'", "''") + "'"
    )
