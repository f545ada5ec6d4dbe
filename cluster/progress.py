"""Who is told what a launch is doing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Each name is begun once, and ended once unless its work fails."""

    def begin(self, name: str, doing: str) -> None:
        """`name` is being worked on."""

    def end(self, name: str, result: str) -> None:
        """`name` is done."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Tells nobody."""

    def begin(self, name: str, doing: str) -> None:
        """Nothing."""

    def end(self, name: str, result: str) -> None:
        """Nothing."""
