"""What routers are told of a worker's cached blocks: all of them once, then what changed. Pure.

The pool says under the engine's lock which blocks got a name and which were forgotten (engine/pool.py). Each stream
to a router begins with a snapshot, in pages; what changes meanwhile and afterwards is collected for it by key, so
that a block that came and went between two messages costs none. A stream that is not read fast enough is not
collected for beyond a bound: it begins anew with a snapshot.

Blocks that are not exact (rank above 0) are not told: not every request could use them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

from headrace.v1 import worker_pb2
from kvtransfer.key_digest import key_digest

MAX_KEYS_PER_MESSAGE = 4096
"""A router takes so many into its index in some milliseconds, beside the tokens that it hands on."""
MAX_COLLECTED_KEYS = 65_536


class BlockJournal:
    """The keys of the exact cached blocks, and the streams that are told of them. Any thread may call."""

    def __init__(
        self, max_keys_per_message: int = MAX_KEYS_PER_MESSAGE, max_collected: int = MAX_COLLECTED_KEYS
    ) -> None:
        self.max_keys_per_message = max_keys_per_message
        self.max_collected = max_collected
        self.digest = 0
        """Of the keys (kvtransfer/key_digest.py)."""
        self._keys: set[bytes] = set()
        self._streams: set[BlockStream] = set()
        self.lock = threading.Lock()
        """Held for the time that copying all keys takes, about 10 ms for a million, at the most."""

    @property
    def num_blocks(self) -> int:
        """Exact cached blocks."""
        return len(self._keys)

    def named(self, key: bytes, rank: int) -> None:
        """A block was cached under a name; takes some microseconds. (The pool's `on_named`.)"""
        if rank == 0:
            with self.lock:
                self._keys.add(key)
                self._changed(key, True)

    def forgotten(self, key: bytes, rank: int) -> None:
        """A name is no longer cached. (The pool's `on_forgotten`.)"""
        if rank == 0:
            with self.lock:
                self._keys.remove(key)
                self._changed(key, False)

    def open(self) -> BlockStream:
        """For a new stream to a router; close it with the stream."""
        stream = BlockStream(self)
        with self.lock:
            self._streams.add(stream)
        return stream

    def close(self, stream: BlockStream) -> None:
        """Collect nothing more for a stream. Idempotent."""
        with self.lock:
            self._streams.discard(stream)

    def keys(self) -> list[bytes]:
        """A copy of all keys. The caller holds the lock."""
        return list(self._keys)

    def _changed(self, key: bytes, added: bool) -> None:
        self.digest ^= key_digest((key,))
        for stream in self._streams:
            stream.collect(key, added)


class BlockStream:
    """What one stream to a router has still to be told, in messages numbered from 1."""

    def __init__(self, journal: BlockJournal) -> None:
        self._journal = journal
        self._number = 0
        self._snapshot_due = True
        self._pages: deque[list[bytes]] = deque()
        self._collected: dict[bytes, bool] = {}
        self._told_blocks = 0
        self._told_digest = 0

    @property
    def has_more(self) -> bool:
        """Whether another message should follow at once, as far as the stream's turn allows."""
        return bool(self._pages or self._collected or self._snapshot_due)

    def restart(self) -> None:
        """Tell everything anew: the router lost track. Pages of a snapshot under way are finished before."""
        with self._journal.lock:
            self._begin_anew()

    def collect(self, key: bytes, added: bool) -> None:
        """A block came or went. The journal calls, under its lock."""
        if self._snapshot_due:
            return
        # A key comes and goes in turn: what is collected of it and the opposite are nothing together.
        if self._collected.pop(key, None) is None:
            self._collected[key] = added
        if len(self._collected) > self._journal.max_collected:
            self._begin_anew()

    def next_message(self) -> worker_pb2.BlockEvents:
        """The next page of a snapshot, else what changed; without any change, that there was none."""
        with self._journal.lock:
            self._number += 1
            if self._snapshot_due and not self._pages:
                self._take_snapshot()
            return self._page() if self._pages else self._changes()

    def _begin_anew(self) -> None:
        self._snapshot_due = True
        self._collected.clear()

    def _take_snapshot(self) -> None:
        keys, size = self._journal.keys(), self._journal.max_keys_per_message
        self._pages.extend(keys[start : start + size] for start in range(0, max(1, len(keys)), size))
        self._told_blocks = self._told_digest = 0
        self._snapshot_due = False

    def _page(self) -> worker_pb2.BlockEvents:
        keys = self._pages.popleft()
        self._told_blocks += len(keys)
        self._told_digest ^= key_digest(keys)
        return worker_pb2.BlockEvents(
            number=self._number,
            is_snapshot=True,
            continues=bool(self._pages),
            changes=_grouped([], keys),
            num_blocks=self._told_blocks,
            digest=self._told_digest,
        )

    def _changes(self) -> worker_pb2.BlockEvents:
        told = dict(islice(self._collected.items(), self._journal.max_keys_per_message))
        for key in told:
            del self._collected[key]
        added = [key for key, is_added in told.items() if is_added]
        evicted = [key for key, is_added in told.items() if not is_added]
        self._told_blocks += len(added) - len(evicted)
        self._told_digest ^= key_digest(told)
        if not self._collected:
            # The journal's own figures, so that what was told wrongly, if anything ever is, shows.
            self._told_blocks, self._told_digest = self._journal.num_blocks, self._journal.digest
        return worker_pb2.BlockEvents(
            number=self._number,
            changes=_grouped(evicted, added),
            num_blocks=self._told_blocks,
            digest=self._told_digest,
        )


def _grouped(evicted: Sequence[bytes], added: Sequence[bytes]) -> list[worker_pb2.BlockChange]:
    groups = ((False, evicted), (True, added))
    return [worker_pb2.BlockChange(added=is_added, keys=b"".join(keys)) for is_added, keys in groups if keys]
