"""Keeps the prefix index in step with what workers say of their cached blocks, and says how far it can be trusted.

    SNAPSHOT_AWAITED → EXACT ⇄ STALE

Each stream to a worker begins with a snapshot and goes on with numbered changes, each with the count and the digest
of the keys that the worker has after it. A number that is missing, a count or digest that is another, or reports that
come without any news of blocks make a feed STALE, and a snapshot is asked for: at once, and then ever more rarely
while that does not help. So lost, repeated and reordered messages cost time, not truth.

A worker whose feed is not EXACT is served *approximately*: what was last known of it counts, for a while, and so do
the prompts that were placed there since. On an EXACT one the blocks of prompts placed there are *expected*: they
count for a short time, until the worker itself says what became of them.

Knows no clock (`now` is monotonic seconds), no connections and no tokens. Workers are known by slots, small numbers
that are given and taken back here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from headrace.v1 import worker_pb2
from kvtransfer.key_digest import key_digest, split_keys
from router.core.assumed_keys import AssumedKeys
from router.core.fleet import WorkerRef
from router.core.prefix_index import IndexFull, PrefixIndex

EXPECTED_S = 10.0
PURGE_EVERY_S = 0.5  # expected blocks count for at most this much longer
FIRST_SNAPSHOT_S = 5.0
MIN_RETRY_S = 0.5
MAX_RETRY_S = 60.0
MAX_SILENT_REPORTS = 25
FORGET_STALE_S = 60.0


class FeedState(StrEnum):
    """How far what is known of a worker's blocks can be trusted."""

    SNAPSHOT_AWAITED = "snapshot_awaited"
    EXACT = "exact"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class KeyScheme:
    """What block keys of a worker are made with, beside the tenant's secret (kvtransfer/keys.py)."""

    identity: str
    block_tokens: int


class PromptKeys(Protocol):
    """The block keys of one prompt, in whatever scheme."""

    def keys(self, scheme: KeyScheme) -> Sequence[bytes]:
        """Of the full blocks that may be taken from a cache, from the first on."""


@dataclass(slots=True)
class FeedCounters:
    """What happened so far. A prediction is a false hit where less was cached than predicted, and a false exact hit
    where all that was known of the worker was EXACT; a missed hit where more was."""

    snapshots: int = 0
    gaps: int = 0
    mismatches: int = 0
    silences: int = 0
    repairs: int = 0
    requests: int = 0
    refused_full: int = 0
    predicted_tokens: int = 0
    confirmed_tokens: int = 0
    predictions: int = 0
    false_hits: int = 0
    false_exact_hits: int = 0
    missed_hits: int = 0

    @property
    def false_hit_rate(self) -> float:
        """Of the placements for which a cached prefix was predicted, the share that found less than that."""
        return self.false_hits / self.predictions if self.predictions else 0.0


@dataclass(slots=True)
class _Snapshot:
    """The pages that came so far."""

    keys: set[bytes] = field(default_factory=set)
    digest: int = 0


@dataclass(slots=True, eq=False)
class _Feed:
    slot: int
    scheme: KeyScheme | None
    heard_at_s: float
    exact_at_s: float
    snapshot_by_s: float  # when to ask for a snapshot that should come by itself
    ask_at_s: float = 0.0  # when to ask for another one at the earliest
    retry_s: float = MIN_RETRY_S
    state: FeedState = FeedState.SNAPSHOT_AWAITED
    connected: bool = True
    next_number: int = 1
    silent_reports: int = 0
    snapshot: _Snapshot | None = None


class IndexFeed:
    """The feeds of all workers and the index that they make."""

    def __init__(self, expected_s: float = EXPECTED_S, index: PrefixIndex | None = None) -> None:
        """`expected_s`: how long a prompt placed on an EXACT worker counts before the worker speaks of it."""
        self.index = index if index is not None else PrefixIndex()
        """What workers said. Read it; change it here only."""
        self.counters = FeedCounters()
        self._expected_s = expected_s
        self._assumed = AssumedKeys()
        self._feeds: dict[WorkerRef, _Feed] = {}
        self._schemes: Counter[KeyScheme] = Counter()
        self._slots = 0
        self._purge_at_s = 0.0

    # --- workers -----------------------------------------------------------------------------------------

    def joined(self, ref: WorkerRef, scheme: KeyScheme | None, now: float) -> int:
        """A stream to a new worker is open; returns its slot. `scheme` None: it tells nothing of its blocks.

        Raises:
            ValueError: this incarnation has joined already.
        """
        if ref in self._feeds:
            raise ValueError(f"{ref} has a feed already")
        slot = (~self._slots & (self._slots + 1)).bit_length() - 1
        self._slots |= 1 << slot
        self._feeds[ref] = _Feed(slot, scheme, now, now, now + FIRST_SNAPSHOT_S)
        if scheme is not None:
            self._schemes[scheme] += 1
        return slot

    def out_of_touch(self, ref: WorkerRef) -> None:
        """Its stream broke: nothing is heard, and nothing can be asked, until another one is open."""
        feed = self._feeds.get(ref)
        if feed is not None:
            feed.connected = False
            feed.state, feed.snapshot = FeedState.SNAPSHOT_AWAITED, None

    def back(self, ref: WorkerRef, now: float) -> None:
        """Another stream to the same incarnation is open; it begins with a snapshot."""
        feed = self._feeds.get(ref)
        if feed is not None:
            feed.connected = True
            feed.state, feed.snapshot = FeedState.SNAPSHOT_AWAITED, None
            feed.next_number, feed.silent_reports = 1, 0
            feed.snapshot_by_s, feed.ask_at_s, feed.retry_s = now + FIRST_SNAPSHOT_S, now, MIN_RETRY_S

    def left(self, ref: WorkerRef) -> None:
        """The worker is gone: its slot may be given to the next one. Repeats change nothing."""
        feed = self._feeds.pop(ref, None)
        if feed is None:
            return
        self.index.clear(feed.slot)
        self._assumed.clear(feed.slot)
        self._slots &= ~(1 << feed.slot)
        if feed.scheme is not None:
            self._schemes[feed.scheme] -= 1
            if not self._schemes[feed.scheme]:
                del self._schemes[feed.scheme]

    # --- what workers say --------------------------------------------------------------------------------

    def take(self, ref: WorkerRef, events: worker_pb2.BlockEvents, now: float) -> bool:
        """Takes a worker's news of its blocks; True: ask it for a snapshot now.

        Raises:
            ValueError: the message cannot be read; nothing was changed, so that the next one shows a gap.
        """
        feed = self._feeds.get(ref)
        if feed is None or feed.scheme is None:
            return False
        changes = _changes(ref, events)
        if events.number < feed.next_number:
            return False  # a repeat
        has_gap = events.number > feed.next_number
        feed.next_number = events.number + 1
        feed.heard_at_s, feed.silent_reports = now, 0
        if has_gap:
            self.counters.gaps += 1
            feed.snapshot = None
        try:
            if events.is_snapshot:
                return self._take_page(feed, events, changes, now)
            if has_gap or feed.snapshot is not None:
                return self._stale(feed, now)
            return feed.state is FeedState.EXACT and self._take_changes(feed, events, changes, now)
        except IndexFull:
            self.index.clear(feed.slot)
            self.counters.refused_full += 1
            feed.state, feed.snapshot, feed.ask_at_s = FeedState.STALE, None, now + MAX_RETRY_S
            return False

    def reported(self, ref: WorkerRef, now: float) -> bool:
        """A report came from a worker; news of its blocks come as often. True: ask it for a snapshot now."""
        feed = self._feeds.get(ref)
        if feed is None or feed.scheme is None:
            return False
        feed.silent_reports += 1
        if feed.silent_reports <= MAX_SILENT_REPORTS or feed.state is not FeedState.EXACT:
            return False
        self.counters.silences += 1
        return self._stale(feed, now)

    def due(self, now: float) -> list[WorkerRef]:
        """Which workers to ask for a snapshot now, since none came. To be called some times a second."""
        asked = []
        for ref, feed in self._feeds.items():
            if feed.state is FeedState.EXACT or feed.scheme is None:
                continue
            if now - feed.exact_at_s > FORGET_STALE_S and feed.snapshot is None:
                self.index.clear(feed.slot)
            if self._ask(feed, now):
                asked.append(ref)
        return asked

    def _take_page(
        self,
        feed: _Feed,
        events: worker_pb2.BlockEvents,
        changes: list[tuple[bool, list[bytes]]],
        now: float,
    ) -> bool:
        """A page is put into the index at once, so that none takes long; what the snapshot lacks goes at its end."""
        if feed.state is FeedState.EXACT:
            feed.state = FeedState.SNAPSHOT_AWAITED
        snapshot = feed.snapshot = feed.snapshot or _Snapshot()
        for _, keys in changes:
            self.index.add(feed.slot, keys)
            snapshot.keys.update(keys)
            snapshot.digest ^= key_digest(keys)
        if (len(snapshot.keys), snapshot.digest) != (events.num_blocks, events.digest):
            self.counters.mismatches += 1
            return self._stale(feed, now)
        if events.continues:
            feed.snapshot_by_s = now + FIRST_SNAPSHOT_S
            return False
        feed.snapshot = None
        self.index.keep_only(feed.slot, snapshot.keys)
        self._assumed.forget(feed.slot, self._assumed.index.keys_of(feed.slot) & snapshot.keys)
        self._assumed.expire(feed.slot, now - self._expected_s)
        self.counters.snapshots += 1
        if feed.state is FeedState.STALE:
            self.counters.repairs += 1
        feed.state, feed.exact_at_s = FeedState.EXACT, now
        return False

    def _take_changes(
        self,
        feed: _Feed,
        events: worker_pb2.BlockEvents,
        changes: list[tuple[bool, list[bytes]]],
        now: float,
    ) -> bool:
        for added, keys in changes:
            if added:
                self.index.add(feed.slot, keys)
            else:
                self.index.remove(feed.slot, keys)
            self._assumed.forget(feed.slot, keys)
        known = (self.index.num_blocks(feed.slot), self.index.digest(feed.slot))
        if known != (events.num_blocks, events.digest):
            self.counters.mismatches += 1
            return self._stale(feed, now)
        feed.exact_at_s, feed.retry_s = now, MIN_RETRY_S
        return False

    def _stale(self, feed: _Feed, now: float) -> bool:
        feed.state, feed.snapshot = FeedState.STALE, None
        return self._ask(feed, now)

    def _ask(self, feed: _Feed, now: float) -> bool:
        is_coming = feed.state is FeedState.SNAPSHOT_AWAITED or feed.snapshot is not None
        if not feed.connected or now < (feed.snapshot_by_s if is_coming else feed.ask_at_s):
            return False
        feed.ask_at_s = feed.snapshot_by_s = now + feed.retry_s
        feed.retry_s = min(2 * feed.retry_s, MAX_RETRY_S)
        self.counters.requests += 1
        return True

    # --- placement ---------------------------------------------------------------------------------------

    @property
    def schemes(self) -> Sequence[KeyScheme]:
        """What the workers that tell of their blocks make keys with."""
        return tuple(self._schemes)

    def slot_of(self, ref: WorkerRef) -> int | None:
        """A worker's number; None for an incarnation that has not joined, or has left."""
        feed = self._feeds.get(ref)
        return feed.slot if feed is not None else None

    def match(self, keys: Sequence[bytes], now: float) -> list[tuple[int, int]]:
        """Who has how many leading blocks of a prompt, as (bits of the slots, number of blocks), longest first: what
        workers told, and what is assumed or expected of them."""
        if now >= self._purge_at_s:
            self._purge(now)
        return self.index.match(keys, self._assumed.index)

    def cached(self, prompt: PromptKeys, now: float) -> list[tuple[int, int]]:
        """Who has how much of a prompt, as (bits of the slots, number of tokens), longest first. No slot is in two of
        them."""
        found = [
            (mask, num_blocks * scheme.block_tokens)
            for scheme in self._schemes
            for mask, num_blocks in self.match(prompt.keys(scheme), now)
        ]
        found.sort(key=lambda hit: -hit[1])
        return found

    def assume(self, ref: WorkerRef, prompt: PromptKeys, now: float) -> None:
        """A prompt was placed on a worker: it has, or soon will have, the blocks of it."""
        feed = self._feeds.get(ref)
        if feed is None or feed.scheme is None:
            return
        keys = prompt.keys(feed.scheme)
        if feed.state is FeedState.EXACT:
            told = self.index.keys_of(feed.slot)
            keys = [key for key in keys if key not in told]
        if keys:
            self._assumed.assume(feed.slot, keys, now)

    def confirm(self, ref: WorkerRef, predicted_tokens: int, actual_tokens: int) -> None:
        """What a placement was predicted to find cached on a worker, and what it found."""
        counters = self.counters
        counters.predicted_tokens += predicted_tokens
        counters.confirmed_tokens += min(predicted_tokens, actual_tokens)
        counters.predictions += predicted_tokens > 0
        counters.false_hits += actual_tokens < predicted_tokens
        counters.false_exact_hits += (
            actual_tokens < predicted_tokens and self.state_of(ref) is FeedState.EXACT
        )
        counters.missed_hits += actual_tokens > predicted_tokens

    def _purge(self, now: float) -> None:
        self._purge_at_s = now + PURGE_EVERY_S
        for feed in self._feeds.values():
            if feed.state is FeedState.EXACT:
                self._assumed.expire(feed.slot, now - self._expected_s)

    # --- figures -----------------------------------------------------------------------------------------

    def state_of(self, ref: WorkerRef) -> FeedState | None:
        """None for an incarnation that has not joined, has left, or tells nothing of its blocks."""
        feed = self._feeds.get(ref)
        return feed.state if feed is not None and feed.scheme is not None else None

    def num_feeds(self) -> Counter[FeedState]:
        """Feeds by state."""
        return Counter(feed.state for feed in self._feeds.values() if feed.scheme is not None)

    def age_s(self, now: float) -> float:
        """Seconds since that EXACT feed spoke which was silent longest; 0 where none is EXACT."""
        exact = (feed for feed in self._feeds.values() if feed.state is FeedState.EXACT)
        return max((now - feed.heard_at_s for feed in exact), default=0.0)


def _changes(ref: WorkerRef, events: worker_pb2.BlockEvents) -> list[tuple[bool, list[bytes]]]:
    try:
        changes = [(change.added, split_keys(change.keys)) for change in events.changes]
    except ValueError as error:
        raise ValueError(f"block events {events.number} of worker {ref.worker_id!r}: {error}") from None
    if events.is_snapshot and not all(added for added, _ in changes):
        raise ValueError(
            f"block events {events.number} of worker {ref.worker_id!r}: a snapshot in which blocks are evicted"
        )
    return changes
