"""The router's waiting line: bounded in tokens, first come first served.

Bounded in tokens because that is what a wait costs: a thousand short prompts are soon through, thirty long
ones are not. Strictly in order of arrival: what cannot be placed yet holds back what came later, so that no
large request starves. An entry taken out and put back (its worker refused it) returns to its old place.
Each entry carries its deadline, so that what has run out of time is not dispatched.

Knows no clock: `now` and deadlines are monotonic seconds, passed in.
"""

import heapq
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 1.0
NUM_DEPARTURES = 32  # how many the drain rate is measured over


@dataclass(frozen=True, slots=True)
class Entry(Generic[K]):
    """One waiting request: `num_tokens` of prompt, `deadline` in monotonic seconds, `order` of arrival."""

    key: K
    num_tokens: int
    deadline: float
    order: int


@dataclass(frozen=True, slots=True)
class Full:
    """There is no room. `retry_after_s` is when there will be, as the line has moved lately."""

    queued_tokens: int
    max_tokens: int
    retry_after_s: float


class TokenQueue(Generic[K]):
    """A bounded first-in first-out line of requests, each weighing its prompt's tokens."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"a queue needs room for at least one token, not {max_tokens}")
        self.max_tokens = max_tokens
        self.queued_tokens = 0
        self._entries: dict[K, Entry[K]] = {}
        self._line: list[tuple[int, K]] = []
        self._next_order = 0
        self._departures: deque[tuple[float, int]] = deque(maxlen=NUM_DEPARTURES)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def offer(self, key: K, num_tokens: int, deadline: float, now: float) -> Full | None:
        """Lets a request in at the end of the line, or says why not.

        An empty line takes a request of any size: one larger than the bound could never come in otherwise.

        Raises:
            ValueError: the key is in the line already, or `num_tokens` is not positive.
        """
        if key in self._entries:
            raise ValueError(f"{key!r} is queued already")
        if num_tokens < 1:
            raise ValueError(f"a request weighs at least one token, not {num_tokens}")
        if self._entries and self.queued_tokens + num_tokens > self.max_tokens:
            excess = self.queued_tokens + num_tokens - self.max_tokens
            return Full(self.queued_tokens, self.max_tokens, self._time_to_drain_s(excess, now))
        self._insert(Entry(key, num_tokens, deadline, self._next_order))
        self._next_order += 1
        return None

    def head(self) -> Entry[K] | None:
        """The request that is next, left in the line."""
        while self._line and not self._is_current(self._line[0]):
            heapq.heappop(self._line)
        return self._entries[self._line[0][1]] if self._line else None

    def take(self, now: float) -> Entry[K]:
        """Takes the head out.

        Raises:
            LookupError: the line is empty.
        """
        entry = self.head()
        if entry is None:
            raise LookupError("the queue is empty")
        self._drop(entry)
        self._departures.append((now, entry.num_tokens))
        return entry

    def put_back(self, entry: Entry[K]) -> None:
        """Returns a taken entry to its old place; the bound was passed when it first came.

        Raises:
            ValueError: the key is in the line already.
        """
        if entry.key in self._entries:
            raise ValueError(f"{entry.key!r} is queued already")
        self._insert(entry)

    def remove(self, key: K) -> bool:
        """Takes a request out wherever it stands; False if it is not in the line."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def _insert(self, entry: Entry[K]) -> None:
        self._entries[entry.key] = entry
        self.queued_tokens += entry.num_tokens
        heapq.heappush(self._line, (entry.order, entry.key))

    def _drop(self, entry: Entry[K]) -> None:
        del self._entries[entry.key]
        self.queued_tokens -= entry.num_tokens
        if len(self._line) > 2 * len(self._entries) + NUM_DEPARTURES:
            self._line = [(e.order, e.key) for e in self._entries.values()]
            heapq.heapify(self._line)

    def _is_current(self, place: tuple[int, K]) -> bool:
        entry = self._entries.get(place[1])
        return entry is not None and entry.order == place[0]

    def _time_to_drain_s(self, num_tokens: int, now: float) -> float:
        if len(self._departures) < 2:
            return DEFAULT_RETRY_AFTER_S
        elapsed_s = now - self._departures[0][0]
        drained_tokens = sum(tokens for _, tokens in self._departures)
        if elapsed_s <= 0:
            return MIN_RETRY_AFTER_S
        return min(max(num_tokens * elapsed_s / drained_tokens, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
