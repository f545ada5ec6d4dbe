"""Finds profiles: those that come with Headrace by name, others by file."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.problems import Problem, ProfileError, nearest_name, one_of
from cluster.profile import LoadedProfile, load_profile

DIRECTORY = Path(__file__).resolve().parent.parent / "deploy" / "profiles"


def find_profile(name_or_file: str) -> LoadedProfile:
    """The profile of this name in deploy/profiles, or of this file.

    Raises ProfileError with everything that is wrong with it, or with the names that there are.
    """
    file = Path(name_or_file)
    if file.suffix in (".yaml", ".yml") or os.sep in name_or_file:
        return load_profile(file)
    names = profile_names()
    if name_or_file in names:
        return load_profile(_shortest(DIRECTORY / f"{name_or_file}.yaml"))
    problem = Problem(
        file=name_or_file,
        place=None,
        path=(),
        message="there is no profile of this name",
        expected=f"{one_of(names)}, or a file" if names else "a file",
        nearest=nearest_name(name_or_file, names),
    )
    raise ProfileError([problem])


def profile_names() -> list[str]:
    """The profiles that come with Headrace."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def _shortest(path: Path) -> Path:
    """Relative to the working directory where the file is below it: problems quote it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
