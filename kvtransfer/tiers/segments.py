"""The disk tier: segment files in a directory, an index of them in memory, and what happens when the disk fails.

Segments are written under a temporary name, synced, renamed, and never changed; whole segments go, the one whose
records were all unused for longest first. The byte limit counts what the files take of the file system, the
temporary one, the lock's and unusable segments too, and is never exceeded: room is made before a file is begun.

A failed write stops writing for a while (full, read-only, failing: READ_ONLY), a slow operation stops using the
tier for a while (DEGRADED); a record that cannot be read, or is not what was written, is a miss and is dropped.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from kvtransfer.tiers.catalog import Catalog
from kvtransfer.tiers.directory import (
    DirectoryInUse,
    DirectoryLock,
    new_segment_path,
    temporary_of,
)
from kvtransfer.tiers.disk_types import DiskCounters, Removed, Segment
from kvtransfer.tiers.files import OsFiles
from kvtransfer.tiers.health import TierHealth, TierState, TierStatus
from kvtransfer.tiers.index import TierIndex
from kvtransfer.tiers.records import BadRecord
from kvtransfer.tiers.scan import scan_directory
from kvtransfer.tiers.segment_file import MAX_RECORDS, encode_segment, read_record

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from kvtransfer.tiers.disk_types import DiskOptions
    from kvtransfer.tiers.files import FileFacts, Files
    from kvtransfer.tiers.records import BlockRecord, CodecSet, RecordId, Sealer
    from kvtransfer.tiers.scan import Scan
    from kvtransfer.tiers.segment_file import Row, SegmentTable

_log = logging.getLogger(__name__)

CLOSED = "closed"


class _Place(NamedTuple):
    segment: Segment
    row: Row


class DiskTier:
    """`lock`: the store's, held for changes of the index and never during input or output."""

    def __init__(
        self,
        options: DiskOptions,
        sealer: Sealer,
        lock: threading.RLock,
        clock: Callable[[], float],
        files: Files | None = None,
    ) -> None:
        self.options = options
        self.counters = DiskCounters()
        self._sealer = sealer
        self._lock = lock
        self._clock = clock
        self._files = files or OsFiles()
        self._health = TierHealth(clock, options.slow_s, options.retry_s)
        self._index: TierIndex[Path] = TierIndex(options.limit_bytes, options.quota_bytes)
        self._catalog: Catalog[_Place] = Catalog()
        self._segments: dict[Path, Segment] = {}
        self._unusable: dict[Path, int] = {}  # not ours to read: bytes by file
        self._directory_lock: DirectoryLock | None = None
        self._block_bytes = 4096
        self._other_bytes = 0
        self._closed_reason = "not opened yet"
        self._closed_since = clock()
        self._open_at = clock()

    # ---- opening and closing

    @property
    def is_open(self) -> bool:
        return self._directory_lock is not None

    @property
    def is_due(self) -> bool:
        """It is not open, and it is time to try."""
        return not self.is_open and self._clock() >= self._open_at

    def open(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Takes the directory and reads the tables of its segments; `progress(done, of)`. Where that fails, the
        tier is OFF, says why, and wants to be tried again (`is_due`)."""
        self._open_at = self._clock() + self.options.retry_s
        try:
            lock = DirectoryLock(self.options.directory)
        except (DirectoryInUse, OSError) as error:
            self._stay_closed(str(error))
            return False
        try:
            self._block_bytes = self._files.block_bytes(self.options.directory)
            scan = scan_directory(self.options.directory, self._files, self._sealer, progress)
        except OSError as error:
            lock.close()
            self._stay_closed(str(error))
            return False
        self._remove_torn(scan)
        with self._lock:
            self._count_others()
            for path, facts, table in scan.segments:
                self._index.adopt(path, table.tenant, self._on_disk(facts))
                self._publish(Segment(path, table.tenant), table)
            self._directory_lock = lock
            evict = self._withdraw(self._index.excess())
        self._delete(evict)
        return True

    def close(self) -> None:
        """Idempotent."""
        if self._directory_lock is not None:
            self._directory_lock.close()
            self._directory_lock = None
            self._stay_closed(CLOSED)

    def _stay_closed(self, reason: str) -> None:
        if reason != self._closed_reason:
            self._closed_reason, self._closed_since = reason, self._clock()
            if reason != CLOSED:
                _log.warning("the disk tier is off: %s", reason)

    def _remove_torn(self, scan: Scan) -> None:
        """Counts what the scan found, and takes away what is of no use; what cannot be counts as unusable."""
        self.counters.bad_records += scan.num_cut
        self.counters.read_failures += scan.num_unreadable
        self._unusable = {path: self._bytes_of(path) for path in scan.unusable}
        for path in scan.torn:
            try:
                self._files.remove(path)
                self.counters.torn_files += 1
            except OSError as error:
                _log.warning("%s cannot be removed: %s", path, error)
                self._unusable[path] = self._bytes_of(path)

    def _bytes_of(self, path: Path) -> int:
        try:
            return self._on_disk(self._files.facts(path))
        except OSError:
            return 0

    def _count_others(self) -> None:
        """What is left of the limit for segments: the lock's file and unusable ones take of it."""
        self._other_bytes = self._block_bytes + sum(self._unusable.values())
        limit = max(0, self.options.limit_bytes - self._other_bytes)
        self._index.limit_bytes = limit
        quota = self.options.quota_bytes
        self._index.quota_bytes = limit if quota is None else min(quota, limit)

    # ---- what is there

    def under(self, key: bytes) -> Iterable[RecordId]:
        """The records of a key; none while the tier is not read. Under the lock."""
        return self._catalog.under(key) if self.is_open and self._health.may_read() else ()

    def __contains__(self, name: RecordId) -> bool:
        return name in self._catalog

    def num_bytes(self, name: RecordId) -> int:
        """Of a record in its file. Raises KeyError. Under the lock."""
        return self._place(name).row.num_bytes

    def codecs(self, name: RecordId) -> CodecSet:
        """What its reader must speak. Raises KeyError. Under the lock."""
        return self._place(name).row.codecs

    def touch(self, name: RecordId) -> None:
        """It was used just now, and its segment with it. Raises KeyError. Under the lock."""
        self._index.touch(self._place(name).segment.path)

    def pin(self, name: RecordId) -> Segment:
        """Its segment stays until `unpin`. Raises KeyError. Under the lock."""
        segment = self._place(name).segment
        self._index.pin(segment.path)
        return segment

    def unpin(self, segment: Segment) -> None:
        with self._lock:
            is_free = self._index.unpin(segment.path) == 0 and not segment.records
            evict = self._withdraw([segment.path]) if is_free else []
        self._delete(evict)

    def _place(self, name: RecordId) -> _Place:
        place = self._catalog.get(name)
        if place is None:
            raise KeyError(name)
        return place

    # ---- reading

    def read(self, name: RecordId) -> BlockRecord | None:
        """The record, verified; None where it is not here, or no longer what was written. Takes as long as the
        disk does."""
        with self._lock:
            place = self._catalog.get(name)
            if place is None:
                return None
            self._index.pin(place.segment.path)
            operation = self._health.begin(write=False)
        record = None
        try:
            record = self._read(place)
        finally:
            with self._lock:
                self._health.end(operation, write=False)
                if record is None:
                    self._drop(place)
            self.unpin(place.segment)
        return record

    def check(self, name: RecordId) -> bool | None:
        """Whether the record can be read as it was written; one that cannot is dropped. None where it is gone."""
        with self._lock:
            if name not in self._catalog:
                return None
        return self.read(name) is not None

    def _read(self, place: _Place) -> BlockRecord | None:
        segment, row = place
        try:
            data = self._files.read(segment.path, row.offset, row.num_bytes)
            return read_record(data, row.id, segment.tenant, self._sealer)
        except OSError as error:
            self.counters.read_failures += 1
            _log.warning("a block of %s cannot be read, and is dropped: %s", segment.path, error)
        except BadRecord as error:
            self.counters.bad_records += 1
            _log.warning("a block of %s is damaged, and is dropped: %s", segment.path, error)
        return None

    def _drop(self, place: _Place) -> None:
        if self._catalog.get(place.row.id) == place:
            self._catalog.remove(place.row.id)
        place.segment.records.discard(place.row.id)

    # ---- writing

    def write(self, records: Sequence[BlockRecord]) -> int:
        """Keeps records of one tenant; how many of them came new. One thread calls at a time; takes as long as the
        disk does."""
        written = 0
        with self._lock:
            new = [record for record in records if record.id not in self._catalog]
        for batch in self._batches(new):
            if self._write_segment(batch):
                written += len(batch)
            else:
                self.counters.not_written += len(batch)
        self.counters.written += written
        return written

    def _batches(self, records: Sequence[BlockRecord]) -> Iterator[list[BlockRecord]]:
        batch: list[BlockRecord] = []
        num_bytes = 0
        for record in records:
            too_long = num_bytes + record.payload_bytes > self.options.segment_bytes
            if batch and (too_long or len(batch) == MAX_RECORDS):
                yield batch
                batch, num_bytes = [], 0
            batch.append(record)
            num_bytes += record.payload_bytes
        if batch:
            yield batch

    def _write_segment(self, records: Sequence[BlockRecord]) -> bool:
        table, parts = encode_segment(records, self._sealer)
        file_bytes = sum(memoryview(part).nbytes for part in parts)
        segment = Segment(new_segment_path(self.options.directory), table.tenant)
        if not self._make_room(segment, self._rounded(file_bytes)):
            return False
        with self._lock:
            operation = self._health.begin(write=True)
        failure, facts = None, None
        try:
            temporary = temporary_of(segment.path)
            facts = self._files.write_new(temporary, parts)
            self._files.publish(temporary, segment.path)
        except (OSError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) else "out of memory"
            failure = f"{reason or error} ({segment.path.parent})"
        with self._lock:
            self._health.end(operation, write=True, failure=failure)
            if facts is not None and failure is None:
                self.counters.written_bytes += file_bytes
                self._index.resize(segment.path, self._on_disk(facts))
                self._publish(segment, table)
                evict = self._withdraw(self._index.excess())
                self._index.unpin(segment.path)
            else:
                _log.warning("a segment could not be written: %s", failure)
                self.counters.write_failures += 1
                evict = [segment.path]  # pinned once, as those that `_withdraw` gives
        self._delete(evict)
        return failure is None

    def _make_room(self, segment: Segment, disk_bytes: int) -> bool:
        """Counts the segment to come, pinned, once what must go for it is gone."""
        with self._lock:
            if not self.is_open or not self._health.may_write():
                return False
            plan = self._index.plan(segment.tenant, disk_bytes)
            if plan.refused is not None:
                return False
            evict = self._withdraw(plan.evict)
        self.counters.evicted_segments += len(evict)
        if self._delete(evict) < len(evict):
            self._note_write_failure("segments that should go cannot be deleted")
            return False
        with self._lock:
            self._index.insert(segment.path, segment.tenant, disk_bytes)
            self._index.pin(segment.path)
        return True

    def _note_write_failure(self, reason: str) -> None:
        with self._lock:
            self._health.end(self._health.begin(write=True), write=True, failure=reason)

    def _publish(self, segment: Segment, table: SegmentTable) -> None:
        """Its records are found from now on."""
        self._segments[segment.path] = segment
        for row in table.rows:
            if row.id not in self._catalog:
                segment.records.add(row.id)
                self._catalog.add(row.id, _Place(segment, row))

    def _withdraw(self, paths: Iterable[Path]) -> list[Path]:
        """Their records are found no more; pins the files for `_delete`, so that nobody chooses them again."""
        withdrawn = list(paths)
        for path in withdrawn:
            segment = self._segments.pop(path, None)
            for name in segment.records if segment is not None else ():
                self._catalog.remove(name)
            if segment is not None:
                segment.records.clear()
            self._index.pin(path)
        return withdrawn

    def _delete(self, paths: Iterable[Path]) -> int:
        """How many of them are gone. One that cannot be deleted stays counted, and is chosen again some day."""
        deleted = 0
        for path in paths:
            is_gone = True
            try:
                self._files.remove(path)
                self._files.remove(temporary_of(path))
            except OSError as error:
                _log.warning("%s cannot be deleted: %s", path, error)
                is_gone = False
            with self._lock:
                self._index.unpin(path)
                if is_gone:
                    self._index.remove(path)
            deleted += is_gone
        return deleted

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block_bytes) * self._block_bytes

    def _on_disk(self, facts: FileFacts) -> int:
        return max(facts.disk_bytes, self._rounded(facts.size))

    # ---- looking after it

    def status(self) -> TierStatus:
        with self._lock:
            if not self.is_open:
                return TierStatus(TierState.OFF, self._closed_reason, self._clock() - self._closed_since)
            return self._health.status()

    @property
    def index(self) -> TierIndex[Path]:
        """To be read only, under the lock."""
        return self._index

    @property
    def used_bytes(self) -> int:
        """All that counts against the limit. Under the lock."""
        return self._index.used_bytes + self._other_bytes

    @property
    def unusable(self) -> dict[Path, int]:
        """Files that are not read, and stay until `gc`: bytes by path. Under the lock."""
        return dict(self._unusable)

    @property
    def num_records(self) -> int:
        return len(self._catalog)

    def segments(self) -> list[Segment]:
        """Under the lock."""
        return list(self._segments.values())

    def names(self) -> list[RecordId]:
        """Of all records. Under the lock."""
        return [name for name, _ in self._catalog.items()]

    def gc(self) -> Removed:
        """Removes what is of no use here: another cluster's segments, those of other versions, leftovers."""
        with self._lock:
            unusable = dict(self._unusable)
        files = file_bytes = 0
        for path, num_bytes in unusable.items():
            try:
                self._files.remove(path)
            except OSError as error:
                _log.warning("%s cannot be removed: %s", path, error)
                continue
            files += 1
            file_bytes += num_bytes
            with self._lock:
                self._unusable.pop(path, None)
                self._count_others()
        return Removed(files, file_bytes)
