"""What lies in a disk tier's directory, read from the segments' tables alone. Changes nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvtransfer.tiers.directory import segment_paths, temporary_paths
from kvtransfer.tiers.records import BadRecord, ForeignRecord
from kvtransfer.tiers.segment_file import UnknownSegment, read_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvtransfer.tiers.files import FileFacts, Files
    from kvtransfer.tiers.records import Sealer
    from kvtransfer.tiers.segment_file import SegmentTable

_log = logging.getLogger(__name__)


class ScannedSegment(NamedTuple):
    path: Path
    facts: FileFacts
    table: SegmentTable


@dataclass(slots=True)
class Scan:
    """`torn`: files that a dying store left unfinished or that were damaged since, of no use to anybody.
    `unusable`: files that are not for this store (another cluster's, another version's) or cannot be read."""

    segments: list[ScannedSegment] = field(default_factory=list)
    torn: list[Path] = field(default_factory=list)
    unusable: list[Path] = field(default_factory=list)
    num_cut: int = 0  # records that their file is too short for
    num_unreadable: int = 0


def scan_directory(
    directory: Path, files: Files, sealer: Sealer | None, progress: Callable[[int, int], None] | None = None
) -> Scan:
    """Reads one table at a time; `progress(done, of)` in segments. Without a sealer another cluster's segments are
    not told apart. Raises OSError where the directory cannot be listed."""
    scan = Scan(torn=temporary_paths(directory))
    paths = segment_paths(directory)
    for done, path in enumerate(paths):
        if progress is not None:
            progress(done, len(paths))
        _scan_one(path, files, sealer, scan)
    scan.segments.sort(key=lambda segment: segment.facts.modified)
    return scan


def _scan_one(path: Path, files: Files, sealer: Sealer | None, scan: Scan) -> None:
    try:
        facts = files.facts(path)
        table = read_table(lambda at, size: files.read(path, at, size), facts.size, sealer)
    except FileNotFoundError:
        return  # evicted by a store that runs
    except (ForeignRecord, UnknownSegment) as error:
        _log.warning("%s is left alone: %s", path, error)
        scan.unusable.append(path)
    except OSError as error:
        _log.warning("%s cannot be read: %s", path, error)
        scan.num_unreadable += 1
        scan.unusable.append(path)
    except BadRecord as error:
        _log.warning("%s is torn: %s", path, error)
        scan.torn.append(path)
    else:
        scan.num_cut += table.num_cut
        scan.segments.append(ScannedSegment(path, facts, table))
