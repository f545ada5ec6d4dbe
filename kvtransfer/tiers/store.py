"""A node's store: what is found in which tier, what is wanted, and how records come in and go out.

One lock is around the indices of both tiers, the landing areas and the lease table; nobody reads, writes, copies
or sends while holding it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvtransfer.sources import SourceRefused
from kvtransfer.tiers.catalog import best_of
from kvtransfer.tiers.health import TierState
from kvtransfer.tiers.host import HostTier
from kvtransfer.tiers.reading import HeldBlock, OpenRun, Speed
from kvtransfer.tiers.receiving import ReceivingAreas, why_not_storable
from kvtransfer.tiers.records import RecordId, Sealer, Shape
from kvtransfer.tiers.report import list_entries, stats_of
from kvtransfer.tiers.segments import DiskTier
from kvtransfer.tiers.store_types import DISK, HOST, Found, NotWanted, TierRun, Verdict, VerifyProgress
from kvtransfer.tiers.write_back import WriteBack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.sources import FetchRequest
    from kvtransfer.tiers.disk_types import Removed, Segment
    from kvtransfer.tiers.files import Files
    from kvtransfer.tiers.receiving import Offer
    from kvtransfer.tiers.records import BlockRecord, CodecSet
    from kvtransfer.tiers.store_types import Entry, StoreOptions, StoreStats


class NodeStore:
    """A BlockSource. `files`: a disk of the test's own."""

    def __init__(
        self,
        options: StoreOptions,
        cluster_secret: bytes,
        clock: Callable[[], float] = time.monotonic,
        files: Files | None = None,
    ) -> None:
        self.options = options
        self.lock = threading.RLock()
        self.host = HostTier(options.host_bytes, options.host_quota_bytes)
        self.areas = ReceivingAreas(options.landing_bytes, self.lock)
        self.disk: DiskTier | None = None
        self.write_back: WriteBack | None = None
        if options.disk is not None:
            self.disk = DiskTier(options.disk, Sealer(cluster_secret), self.lock, clock, files)
            self.write_back = WriteBack(self.disk, options.queue_bytes, self.lock)
        self.speeds = {HOST: Speed(), DISK: Speed()}
        self.host_hits = self.disk_hits = self.misses = 0
        self._clock = clock
        self._readers = ThreadPoolExecutor(options.read_threads, thread_name_prefix="kv-store-read")
        self._open: dict[OpenRun, tuple[list[RecordId], list[Segment]]] = {}

    def start(self) -> None:
        """Opens the disk tier, in a thread of its own: until it is open, what lies there is not found."""
        if self.write_back is not None:
            self.write_back.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the disk tier has been opened, or has said why not, within `timeout_s`."""
        return self.write_back is None or self.write_back.wait_opened(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Writes what waits for the disk, for up to `timeout_s`, and lets the directory go."""
        stopped = self.write_back is None or self.write_back.close(timeout_s)
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.disk is not None and stopped:
            self.disk.close()

    @property
    def num_fetches(self) -> int:
        return len(self._open)

    # ---- looking up and fetching

    def lookup(self, keys: Sequence[bytes], fidelity: int, shape: Shape) -> Found:
        """The longest leading run that a reader with `shape` and a fidelity bound can have. Touches and pins
        nothing."""
        with self.lock:
            run = self._run(keys, fidelity, shape, None)
        in_host = [block for block in run if block.record is not None]
        on_disk = [block for block in run if block.record is None]
        tiers = tuple(
            TierRun(tier, len(held), sum(block.num_bytes for block in held), self.speeds[tier].bytes_per_s)
            for tier, held in ((HOST, in_host), (DISK, on_disk))
        )
        return Found(len(run), max((block.name.fidelity for block in run), default=0), tiers)

    def open(self, request: FetchRequest) -> OpenRun:
        """Pins the longest leading run of the keys that is held in a form that the asker can read. Raises
        SourceRefused."""
        shape = Shape(request.layout, request.block_tokens, request.dtypes)
        with self.lock:
            blocks = self._run(request.keys, request.fidelity, shape, frozenset(request.codecs))
            self.misses += len(request.keys) - len(blocks)
            if not blocks:
                raise SourceRefused(
                    "NO_BLOCKS", "no block of these is held here in a form that the asker takes"
                )
            run = OpenRun(
                self,
                blocks,
                request.first_block,
                self._readers,
                self._read_timeout_s,
                (self.speeds[HOST], self.speeds[DISK]),
                self._clock,
            )
            self._open[run] = self._pin(blocks)
        return run

    def read_from_disk(self, name: RecordId) -> BlockRecord | None:
        """The record, verified; it moves up into memory where it fits. Takes as long as the disk does."""
        record = self.disk.read(name) if self.disk is not None else None
        if record is not None:
            with self.lock:
                self.host.put(record)
        return record

    def release(self, run: OpenRun) -> None:
        """Takes the pins of a fetch away."""
        with self.lock:
            in_host, on_disk = self._open.pop(run)
            for name in in_host:
                self.host.unpin(name)
        for segment in on_disk:
            if self.disk is not None:
                self.disk.unpin(segment)

    @property
    def _read_timeout_s(self) -> float:
        return self.options.disk.slow_s if self.options.disk is not None else 1.0

    def _run(
        self, keys: Sequence[bytes], bound: int, shape: Shape, codecs: CodecSet | None
    ) -> list[HeldBlock]:
        run = []
        for key in keys:
            held = self._best(key, bound, shape, codecs)
            if held is None:
                break
            run.append(held)
        return run

    def _best(self, key: bytes, bound: int, shape: Shape, codecs: CodecSet | None) -> HeldBlock | None:
        """The best record of a key; of the same record the copy in memory."""
        names = {*self.host.under(key), *(self.disk.under(key) if self.disk is not None else ())}
        if codecs is not None:
            names = {name for name in names if self._codecs(name) <= codecs}
        best = best_of(names, bound, shape)
        if best is None:
            return None
        record = self.host.get(best)
        if record is not None:
            return HeldBlock(best, record, record.payload_bytes)
        return HeldBlock(best, None, self.disk.num_bytes(best) if self.disk is not None else 0)

    def _codecs(self, name: RecordId) -> CodecSet:
        record = self.host.get(name)
        if record is not None or self.disk is None:
            return record.codecs if record is not None else frozenset()
        return self.disk.codecs(name)

    def _pin(self, blocks: Sequence[HeldBlock]) -> tuple[list[RecordId], list[Segment]]:
        """The last block first: of one prefix, what is nearer to its beginning shall stay longer."""
        in_host, on_disk = [], []
        for block in reversed(blocks):
            if block.record is not None:
                self.host.touch(block.name)
                self.host.pin(block.name)
                in_host.append(block.name)
            elif self.disk is not None:
                self.disk.touch(block.name)
                on_disk.append(self.disk.pin(block.name))
        self.host_hits += len(in_host)
        self.disk_hits += len(on_disk)
        return in_host, on_disk

    # ---- taking in

    def consider(self, offer: Offer) -> Verdict:
        """Which blocks of an offer to push: the first missing one up to the last, as many of them as may land now.
        Reserves nothing yet; under the lock."""
        nothing = range(offer.first_block, offer.first_block)
        reason = why_not_storable(offer.layout, offer.block_tokens)
        if reason is not None:
            return Verdict(nothing, NotWanted.UNSUPPORTED, reason)
        missing = [i for i, key in enumerate(offer.keys) if not self._has(key, offer)]
        if not missing:
            self._touch(offer)
            return Verdict(nothing, NotWanted.HELD, "all of these blocks are held, or are being pushed")
        if not self._could_keep(offer):
            return Verdict(nothing, NotWanted.NO_ROOM, f"no tier takes a block of {offer.block_bytes} bytes")
        fitting = self.areas.num_blocks_that_fit(offer.block_bytes)
        if not fitting:
            text = f"{self.areas.reserved_bytes} of {self.areas.limit_bytes} bytes are promised to others"
            return Verdict(nothing, NotWanted.BUSY, text)
        start = offer.first_block + missing[0]
        return Verdict(range(start, min(offer.first_block + missing[-1] + 1, start + fitting)))

    def publish(self, records: Sequence[BlockRecord]) -> None:
        """Makes blocks of one tenant, in the order of their sequence, visible, and queues them for the disk."""
        with self.lock:
            for record in reversed(records):
                self.host.put(record)
        if self.write_back is not None and self._disk_takes_writes():
            self.write_back.put(records)

    def _has(self, key: bytes, offer: Offer) -> bool:
        shape, bound = offer.shape, offer.fidelity
        return self.areas.is_landing(key, shape, bound) or self._best(key, bound, shape, None) is not None

    def _touch(self, offer: Offer) -> None:
        """A worker that has these blocks itself uses them, though it does not fetch them."""
        for key in reversed(offer.keys):
            held = self._best(key, offer.fidelity, offer.shape, None)
            if held is not None and held.record is not None:
                self.host.touch(held.name)
            elif held is not None and self.disk is not None:
                self.disk.touch(held.name)

    def _could_keep(self, offer: Offer) -> bool:
        in_host = offer.block_bytes <= self.host.index.limit_bytes
        return in_host or (self._disk_takes_writes() and self.disk_limit_bytes >= offer.block_bytes)

    @property
    def disk_limit_bytes(self) -> int:
        return self.options.disk.limit_bytes if self.options.disk is not None else 0

    def _disk_takes_writes(self) -> bool:
        """Off is not for ever, but nothing is queued for a disk that cannot be opened."""
        return self.disk is not None and self.disk.status().state is not TierState.OFF

    # ---- looking after it

    def stats(self) -> StoreStats:
        """All figures, as of one moment."""
        with self.lock:
            return stats_of(self)

    def entries(self) -> list[Entry]:
        """What is held: a line a segment, and for memory a line a tenant, layout and fidelity."""
        with self.lock:
            return list_entries(self)

    def verify(self) -> Iterator[VerifyProgress]:
        """Reads every record on disk, and drops what is not as it was written. Memory is not read: nothing verifies
        there what the frame's checksum has verified already."""
        names: list[RecordId] = []
        if self.disk is not None:
            with self.lock:
                names = self.disk.names()
        num_bytes = bad = 0
        yield VerifyProgress(0, len(names), 0, 0)
        for done, name in enumerate(names, 1):
            with self.lock:
                held = self.disk is not None and name in self.disk
                length = self.disk.num_bytes(name) if held and self.disk is not None else 0
            if held and self.disk is not None:
                bad += self.disk.check(name) is False
                num_bytes += length
            yield VerifyProgress(done, len(names), num_bytes, bad)

    def gc(self) -> Removed | None:
        """Removes files on disk that are of no use here. None without a disk tier."""
        return self.disk.gc() if self.disk is not None else None
