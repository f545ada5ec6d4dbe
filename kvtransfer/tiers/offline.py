"""What can be said and done about a store's directory when no store runs on it: `headrace cache` without a cluster.

Looking changes nothing and needs no lock, so it also works beside a store that runs; what that evicts meanwhile is
left out. Only `gc_directory` takes the directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtransfer.tiers.directory import DirectoryLock, lock_holder
from kvtransfer.tiers.disk_types import Removed
from kvtransfer.tiers.files import OsFiles
from kvtransfer.tiers.records import BadRecord, Sealer
from kvtransfer.tiers.report import entry_of
from kvtransfer.tiers.scan import scan_directory
from kvtransfer.tiers.segment_file import read_record
from kvtransfer.tiers.store_types import VerifyProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtransfer.tiers.scan import Scan, ScannedSegment
    from kvtransfer.tiers.store_types import Entry


@dataclass(frozen=True, slots=True)
class DirectoryStats:
    """`disk_bytes`: what segments take of the file system. `torn_*`: left unfinished or damaged, a store removes
    them when it starts; `unusable_*`: another cluster's or version's, or not to be read: only gc removes them.
    `cut_records`: their file is too short for them. `holder`: who has the directory open, or None."""

    directory: Path
    holder: str | None
    num_segments: int
    num_records: int
    disk_bytes: int
    torn_files: int
    torn_bytes: int
    unusable_files: int
    unusable_bytes: int
    cut_records: int
    tenants: dict[bytes, int]


def list_directory(directory: Path, cluster_secret: bytes | None) -> list[Entry]:
    """A line for each segment, the one written first before the others.

    `cluster_secret`: None where it is not known; then another cluster's segments are not told apart. So in all
    functions here; all raise OSError where the directory cannot be read.
    """
    scan = _scan(directory, cluster_secret)
    return [
        entry_of(path.name, table.tenant, [row.id for row in table.rows], facts.disk_bytes)
        for path, facts, table in scan.segments
    ]


def stat_directory(directory: Path, cluster_secret: bytes | None) -> DirectoryStats:
    """All figures."""
    scan = _scan(directory, cluster_secret)
    tenants: dict[bytes, int] = {}
    for _, facts, table in scan.segments:
        tenants[table.tenant] = tenants.get(table.tenant, 0) + facts.disk_bytes
    return DirectoryStats(
        directory=directory,
        holder=lock_holder(directory),
        num_segments=len(scan.segments),
        num_records=sum(len(segment.table.rows) for segment in scan.segments),
        disk_bytes=sum(tenants.values()),
        torn_files=len(scan.torn),
        torn_bytes=sum(map(_disk_bytes, scan.torn)),
        unusable_files=len(scan.unusable),
        unusable_bytes=sum(map(_disk_bytes, scan.unusable)),
        cut_records=scan.num_cut,
        tenants=tenants,
    )


def verify_directory(directory: Path, cluster_secret: bytes | None) -> Iterator[VerifyProgress]:
    """Reads every record and checks it; the last message is the outcome. Changes nothing. Records that a torn
    table names are not known, so torn files count as one bad record each."""
    scan = _scan(directory, cluster_secret)
    sealer = Sealer(cluster_secret) if cluster_secret is not None else None
    total = sum(len(segment.table.rows) for segment in scan.segments)
    done = num_bytes = 0
    bad = scan.num_cut + sum(path.suffix != ".tmp" for path in scan.torn)
    yield VerifyProgress(0, total, 0, bad)
    for segment in scan.segments:
        done += len(segment.table.rows)
        num_bytes += sum(row.num_bytes for row in segment.table.rows)
        bad += _num_bad(segment, sealer)
        yield VerifyProgress(done, total, num_bytes, bad)


def gc_directory(directory: Path, cluster_secret: bytes) -> Removed:
    """Removes torn and unusable files. Raises DirectoryInUse where a store runs on it: ask that store;
    FileNotFoundError for a directory that is not there."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    lock = DirectoryLock(directory)
    try:
        scan = _scan(directory, cluster_secret)
        files = file_bytes = 0
        for path in (*scan.torn, *scan.unusable):
            file_bytes += _disk_bytes(path)
            path.unlink()
            files += 1
        return Removed(files, file_bytes)
    finally:
        lock.close()


def _scan(directory: Path, cluster_secret: bytes | None) -> Scan:
    sealer = Sealer(cluster_secret) if cluster_secret is not None else None
    return scan_directory(directory, OsFiles(), sealer)


def _num_bad(segment: ScannedSegment, sealer: Sealer | None) -> int:
    bad = 0
    for row in segment.table.rows:
        try:
            data = OsFiles().read(segment.path, row.offset, row.num_bytes)
            read_record(data, row.id, segment.table.tenant, sealer)
        except FileNotFoundError:
            return 0  # evicted by a store that runs
        except (OSError, BadRecord):
            bad += 1
    return bad


def _disk_bytes(path: Path) -> int:
    try:
        return OsFiles().facts(path).disk_bytes
    except OSError:
        return 0
