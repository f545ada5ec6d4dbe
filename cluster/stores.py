"""Where a node's store keeps its blocks, and what its process is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.model_store.store import store_root
from kvtransfer.keys import derive

if TYPE_CHECKING:
    from kvtransfer.tiers.server import StoreConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """One node's store. `disk_path`: relative to HEADRACE_HOME on its node; empty without a disk tier."""

    store_id: str
    address: str
    cluster_secret: bytes = field(repr=False)
    cpus: tuple[int, ...]
    host_bytes: int
    disk_path: str
    disk_bytes: int
    tenant_share: float


def store_address(cluster_secret: bytes) -> str:
    """Where a node's store listens, as gRPC takes it: a socket in the file system, which no other machine reaches.

    Its name gives nothing away, and nobody who does not know the secret can make one of that name first.
    """
    return f"unix:/tmp/headrace-{derive(cluster_secret, 'headrace store socket')[:12].hex()}.sock"


def disk_directory(path: str, home: Path | None = None) -> Path:
    """The directory of a profile's disk tier on this machine: a relative one lies in HEADRACE_HOME."""
    return store_root(home) / Path(path).expanduser()


def store_config(settings: StoreSettings) -> StoreConfig:
    """For the process that serves it, on the machine that it runs on."""
    from kvtransfer.tiers.disk_types import DiskOptions
    from kvtransfer.tiers.server import StoreConfig
    from kvtransfer.tiers.store_types import StoreOptions

    def quota(limit_bytes: int) -> int | None:
        return None if settings.tenant_share == 1.0 else int(limit_bytes * settings.tenant_share)

    disk = None
    if settings.disk_path:
        directory = disk_directory(settings.disk_path)
        disk = DiskOptions(directory, settings.disk_bytes, quota(settings.disk_bytes))
    options = StoreOptions(
        host_bytes=settings.host_bytes, host_quota_bytes=quota(settings.host_bytes), disk=disk
    )
    return StoreConfig(cluster_secret=settings.cluster_secret, options=options, listen=settings.address)
