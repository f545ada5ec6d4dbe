"""The values of the disk tier (segments.py): its options, its counters, a segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from kvtransfer.tiers.records import RecordId


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """`limit_bytes`, `quota_bytes`: of file system space, in all and by tenant (index.py). `segment_bytes`: about
    how long a segment may be; one record may be longer. `slow_s`: what one read or write may take before the tier
    counts as too slow; `retry_s`: for how long a tier in trouble is left alone."""

    directory: Path
    limit_bytes: int
    quota_bytes: int | None = None
    segment_bytes: int = 32 << 20
    slow_s: float = 10.0
    retry_s: float = 30.0


@dataclass(slots=True)
class DiskCounters:
    """Since the tier was opened, in records where nothing else is said."""

    written: int = 0
    written_bytes: int = 0
    not_written: int = 0  # no room, or the tier took no writes
    write_failures: int = 0  # segments
    read_failures: int = 0
    bad_records: int = 0  # damaged, or cut off
    evicted_segments: int = 0
    torn_files: int = 0  # temporary or damaged files removed at the start


@dataclass(slots=True)
class Segment:
    """`records`: those that are still served from it."""

    path: Path
    tenant: bytes
    records: set[RecordId] = field(default_factory=set)


class Removed(NamedTuple):
    """What `gc` took away."""

    files: int
    file_bytes: int
