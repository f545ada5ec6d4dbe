"""Blocks that a worker is taken to have because a prompt with them was sent there, before it says so itself.

A burst of prompts with one beginning should go to one worker although its first report is yet to come; and a worker
of which nothing exact is known is best judged by what it was given. Bounded for each worker (least recently sent
first) and in all.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from router.core.prefix_index import IndexFull, PrefixIndex

MAX_KEYS_PER_WORKER = 4096
MAX_ENTRIES = 500_000


class AssumedKeys:
    """Keys by slot, with the time (monotonic seconds, given) when a prompt with them was last sent there."""

    def __init__(self, max_per_worker: int = MAX_KEYS_PER_WORKER, max_entries: int = MAX_ENTRIES) -> None:
        self._max_per_worker = max_per_worker
        self.index = PrefixIndex(max_entries)
        """The same keys, to be matched. Read it; change it here only."""
        self._sent_at_s: dict[int, OrderedDict[bytes, float]] = {}

    def assume(self, slot: int, keys: Sequence[bytes], now: float) -> None:
        """A prompt of these blocks was sent to a worker. A prompt longer than the bound counts with its beginning;
        where there is no room in all, nothing is assumed."""
        keys = keys[: self._max_per_worker]
        try:
            self.index.add(slot, keys)
        except IndexFull:
            return
        sent = self._sent_at_s.setdefault(slot, OrderedDict())
        for key in keys:
            sent[key] = now
            sent.move_to_end(key)
        self.index.remove(
            slot, [sent.popitem(last=False)[0] for _ in range(len(sent) - self._max_per_worker)]
        )
        self._tidy(slot)

    def forget(self, slot: int, keys: Iterable[bytes]) -> None:
        """The worker said itself what became of these blocks."""
        sent = self._sent_at_s.get(slot)
        if sent is None:
            return
        told = [key for key in keys if sent.pop(key, None) is not None]
        self.index.remove(slot, told)
        self._tidy(slot)

    def expire(self, slot: int, before_s: float) -> None:
        """Forget what was last sent before a time."""
        sent = self._sent_at_s.get(slot)
        if sent is None:
            return
        old = []
        while sent and next(iter(sent.values())) < before_s:
            old.append(sent.popitem(last=False)[0])
        self.index.remove(slot, old)
        self._tidy(slot)

    def clear(self, slot: int) -> None:
        """The worker is gone; its slot may be given to another one."""
        self._sent_at_s.pop(slot, None)
        self.index.clear(slot)

    def _tidy(self, slot: int) -> None:
        if not self._sent_at_s[slot]:
            del self._sent_at_s[slot]
