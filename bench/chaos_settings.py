"""What the processes of a chaos cluster are told. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.config import RouterConfig
from worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`announced`: the relay that the routers dial; `kv_announced`: that other workers dial. `seed`: of what it does
    to messages."""

    config: WorkerConfig
    announced: str
    kv_announced: str
    seed: int


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """A router's."""

    config: RouterConfig


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """A store's; see kvtransfer.tiers."""

    address: str
    cluster_secret: bytes
    directory: Path
    host_bytes: int
    disk_bytes: int
