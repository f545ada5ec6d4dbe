"""What is wrong with a profile, where, and what to write instead. Pure values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""Where a value sits in a profile: `("decode", "resources", "cpus")`."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: the profile's file, as the user named it.
        place: where in the file; None where there is no such file.
        path: which setting.
        message: what is wrong.
        expected: what would be right; empty where the message says it.
        nearest: the nearest valid name or value; empty where none is near.
    """

    file: str
    place: Place | None
    path: KeyPath
    message: str
    expected: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        """One line: `laptop.yaml:12:3: decode.chnk: unknown key; did you mean "chunk"?`."""
        place = f":{self.place.line}:{self.place.column}" if self.place else ""
        where = f"{self.file}{place}: "
        setting = f"{dotted(self.path)}: " if self.path else ""
        hint = f'; did you mean "{self.nearest}"?' if self.nearest else ""
        expected = f" (expected {self.expected})" if self.expected else ""
        return f"{where}{setting}{self.message}{hint}{expected}"


class ProfileError(Exception):
    """A profile that cannot be used. `problems` holds all that was found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.place or Place(0, 0)))
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: KeyPath) -> str:
    """`decode.resources.cpus`."""
    return ".".join(map(str, path))


def nearest_name(name: str, valid: Sequence[str]) -> str:
    """The valid name most like `name`, or the empty string."""
    lowered = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=1, cutoff=0.55)
    return lowered[close[0]] if close else ""


def one_of(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
