"""Clusters in homes of their own: beside one that a user has up, and beside one another.

Those that wait for their turn cost next to nothing, so alternatives can be asked in turns within seconds of one another
and a machine's slow minutes fall on all of them.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rich.console import Console

from bench.clusters import BenchCluster
from cluster.launch import down, up
from cluster.model_store import store_root
from cluster.profile import LoadedProfile
from cluster.state import run_directory


@contextmanager
def apart(profile: LoadedProfile, console: Console) -> Iterator[BenchCluster]:
    """A cluster of the profile in a new home with the user's models; taken down at the end whatever happens.

    Raises what cluster.launch.up raises.
    """
    name = profile.profile.name
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as directory:
        home = Path(directory)
        (home / "models").symlink_to(store_root() / "models")
        token_file = run_directory(home) / "ray-token"
        token_file.touch(mode=0o600)
        token_file.write_text(_ray_token())
        with console.status(f"{name}: starting …"):
            state = up(profile, home=home)
        try:
            yield BenchCluster(name, state.router_address, bytes.fromhex(state.cluster_secret))
        finally:
            down(home=home)


@cache
def _ray_token() -> str:
    """One for all: Ray reads a token once in a process."""
    return secrets.token_hex(32)
