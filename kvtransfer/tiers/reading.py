"""One fetch from a store: a leading run of blocks held open, read ahead by one record, handed out piece by piece."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, TimeoutError
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvtransfer.layouts import Piece
from kvtransfer.sources import EncodedPiece, SourceRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor, Future

    from kvtransfer.tiers.records import BlockRecord, Part, RecordId

SPEED_WEIGHT = 0.2


class Speed:
    """Bytes per second, as an exponentially weighted mean; 0 until there is something to go by."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0

    def note(self, num_bytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        if num_bytes and seconds > 0:
            now = num_bytes / seconds
            before = self.bytes_per_s or now
            self.bytes_per_s = before + SPEED_WEIGHT * (now - before)


class HeldBlock(NamedTuple):
    """`record` is None where it lies on disk; `num_bytes`: as it travels or lies there."""

    name: RecordId
    record: BlockRecord | None
    num_bytes: int


class Holder(Protocol):
    """What a fetch needs of the store."""

    def read_from_disk(self, name: RecordId) -> BlockRecord | None:
        """The record, verified, or None. Takes as long as the disk does."""

    def release(self, run: OpenRun) -> None:
        """Takes the pins away. Called once."""


class OpenRun:
    """OpenBlocks of a store. `first_block`: of the asker's sequence. `executor` reads ahead; a read that takes
    longer than `read_timeout_s` ends the fetch. `speeds`: of memory and of disk, as they are served: with what the
    transport and the asker make of it."""

    def __init__(
        self,
        holder: Holder,
        blocks: Sequence[HeldBlock],
        first_block: int,
        executor: Executor,
        read_timeout_s: float,
        speeds: tuple[Speed, Speed],
        clock: Callable[[], float],
    ) -> None:
        self.blocks = tuple(blocks)
        self._holder = holder
        self._first_block = first_block
        self._executor = executor
        self._read_timeout_s = read_timeout_s
        self._speeds = speeds
        self._clock = clock
        self._ahead: dict[int, Future[BlockRecord | None]] = {}
        self._served: list[int] = []  # pieces that were handed out before each block
        self._close_lock = threading.Lock()
        self._is_closed = False

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def pieces(self) -> Iterator[EncodedPiece]:
        num_pieces = 0
        for index, block in enumerate(self.blocks):
            self._served.append(num_pieces)
            started = self._clock()
            record = self._load(index)
            for part in record.parts:
                yield self._place(part, index)
            num_pieces += len(record.parts)
            speed = self._speeds[0 if block.record is not None else 1]
            speed.note(record.payload_bytes, self._clock() - started)

    def piece(self, number: int) -> EncodedPiece:
        index = max(at for at, before in enumerate(self._served) if before <= number)
        record = self.blocks[index].record or self._wait_for(self._read(index))
        return self._place(record.parts[number - self._served[index]], index)

    def note_landed(self, number: int, in_flight_s: float, landing_s: float) -> None:
        """Nothing is chosen here."""

    def close(self) -> None:
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self._holder.release(self)

    def _load(self, index: int) -> BlockRecord:
        """The record of a block, with the one behind it being read meanwhile."""
        future = self._ahead.pop(index, None) or self._read(index)
        following = self._read(index + 1) if index + 1 < len(self.blocks) else None
        if following is not None:
            self._ahead[index + 1] = following
        return self.blocks[index].record or self._wait_for(future)

    def _read(self, index: int) -> Future[BlockRecord | None] | None:
        block = self.blocks[index]
        if block.record is not None:
            return None
        return self._executor.submit(self._holder.read_from_disk, block.name)

    def _wait_for(self, future: Future[BlockRecord | None] | None) -> BlockRecord:
        if future is None:
            raise SourceRefused("READ_FAILED", "a block is neither in memory nor on disk")
        try:
            record = future.result(self._read_timeout_s)
        except TimeoutError:
            future.cancel()
            raise SourceRefused(
                "READ_FAILED", f"the disk did not answer in {self._read_timeout_s:g} s"
            ) from None
        except CancelledError:
            raise SourceRefused("READ_FAILED", "the fetch was closed") from None
        if record is None:
            raise SourceRefused("READ_FAILED", "a block is no longer on disk as it was written")
        return record

    def _place(self, part: Part, index: int) -> EncodedPiece:
        """The part at its place in the asker's sequence."""
        block_tokens = self.blocks[index].name.shape.block_tokens
        first = (self._first_block + index) * block_tokens // part.tokens_per_entry
        entries = range(first + part.entries.start, first + part.entries.stop)
        return EncodedPiece(
            Piece(part.plane, part.layers, part.heads, entries),
            part.dtypes,
            part.fidelity,
            part.codec,
            part.codec_version,
            part.raw_bytes,
            part.payload,
        )
