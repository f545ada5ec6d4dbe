"""The values of a node's store (store.py): options, answers, figures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvtransfer.tiers.health import TierState

if TYPE_CHECKING:
    from kvtransfer.tiers.disk_types import DiskCounters, DiskOptions

HOST = "host"
DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Bytes. The process holds at most `host_bytes` + `landing_bytes` + `queue_bytes`, and two records for each
    fetch from disk. `host_bytes` 0: no host tier; `disk` None: no disk tier. `host_quota_bytes`: of every tenant
    (index.py); None: the limit alone. `landing_bytes`: of what is being pushed; `queue_bytes`: of what waits to be
    written to disk. `read_threads`: reads of the disk at one time."""

    host_bytes: int
    host_quota_bytes: int | None = None
    disk: DiskOptions | None = None
    landing_bytes: int = 64 << 20
    queue_bytes: int = 128 << 20
    read_threads: int = 4


class NotWanted(StrEnum):
    """Why a store takes nothing of an offer."""

    HELD = "HELD"  # all of it is here, or is being pushed by somebody else
    BUSY = "BUSY"  # as much is landing as may; offer it again later
    NO_ROOM = "NO_ROOM"  # no tier could keep a block of this size
    UNSUPPORTED = "UNSUPPORTED"  # a layout whose blocks cannot be kept by key


@dataclass(frozen=True, slots=True)
class Verdict:
    """On an offer: the blocks of the sequence to push, or why none."""

    blocks: range
    refused: NotWanted | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class TierRun:
    """Of a leading run of keys, what one tier holds. `bytes_per_s`: at which this tier has been served lately,
    with what the transport and the asker made of it; 0 where nothing is known."""

    tier: str
    num_blocks: int
    num_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """The longest leading run of the keys that is held. `fidelity`: the worst rank in it, 0 for an empty one."""

    num_blocks: int
    fidelity: int
    tiers: tuple[TierRun, ...]


@dataclass(frozen=True, slots=True)
class TierStats:
    """`tenants`: bytes by label. `unusable_bytes`: files that only `gc` removes."""

    tier: str
    state: TierState
    reason: str
    since_s: float
    limit_bytes: int
    used_bytes: int
    num_records: int
    num_pinned: int
    num_evicted: int
    num_refused: int
    bytes_per_s: float
    tenants: dict[bytes, int]
    unusable_files: int = 0
    unusable_bytes: int = 0
    counters: DiskCounters | None = None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """`hits` and `misses`: blocks asked for by fetches, since the store began."""

    tiers: tuple[TierStats, ...]
    landing_bytes: int
    queued_bytes: int
    dropped_records: int
    dropped_bytes: int
    num_leases: int
    num_fetches: int
    host_hits: int
    disk_hits: int
    misses: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A segment, or what memory holds of one tenant, layout and fidelity."""

    tier: str
    name: str
    tenant: bytes
    layout: str
    block_tokens: int
    fidelity: int
    num_records: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """Records read so far, of how many, and those that were damaged or could not be read."""

    done: int
    total: int
    num_bytes: int
    bad: int
