"""What `headrace up` remembers for `status`, `generate` and `down`: one file in HEADRACE_HOME/run, mode 0600.

It holds the cluster's secret, so nobody else may read it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import ClusterError
from cluster.local_ray import LocalRay
from cluster.model_store import store_root

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """A cluster that is up or coming up.

    Attributes:
        ray_address: of the Ray cluster it runs on.
        local_ray: the Ray that `up` started, or None for one that was there before.
        actors: names of the actors, the router's first.
        ready: whether `up` came to its end.
    """

    profile: str
    router_address: str
    cluster_secret: str
    ray_address: str
    local_ray: LocalRay | None
    actors: tuple[str, ...] = ()
    ready: bool = False
    other_routers: tuple[str, ...] = ()

    @property
    def routers(self) -> list[str]:
        """Addresses of all routers."""
        return [self.router_address, *self.other_routers]

    @property
    def is_stale(self) -> bool:
        """Whether the cluster is certainly gone."""
        return self.local_ray is not None and not self.local_ray.is_running()


def run_directory(home: Path | None = None) -> Path:
    """HEADRACE_HOME/run, made if need be, for this user only."""
    directory = store_root(home) / "run"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def log_file(run_dir: Path, actor: str) -> Path:
    """Where `actor` logs, on its own machine."""
    return run_dir / "logs" / f"{actor}.log"


def read_state(run_dir: Path) -> ClusterState | None:
    """The cluster that was brought up here, or None.

    Raises ClusterError for a file that this version cannot read.
    """
    path = _state_file(run_dir)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        local_ray = content["local_ray"]
        content["local_ray"] = LocalRay(**local_ray) if local_ray else None
        for name in ("actors", "other_routers"):
            content[name] = tuple(content.get(name, ()))
        return ClusterState(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(
            f"{path} cannot be read: {error}; stop the cluster that it describes and remove it"
        ) from error


def write_state(run_dir: Path, state: ClusterState) -> None:
    """Write it whole or not at all."""
    path = _state_file(run_dir)
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(state)}, file, indent=2)
    draft.replace(path)


def remove_state(run_dir: Path) -> None:
    """Forget the cluster."""
    _state_file(run_dir).unlink(missing_ok=True)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Only one `up` or `down` at a time. Raises ClusterError at once if another one runs."""
    with (run_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError("another `headrace up` or `headrace down` is at work; wait for it") from error
        yield


def _state_file(run_dir: Path) -> Path:
    return run_dir / "cluster.json"
