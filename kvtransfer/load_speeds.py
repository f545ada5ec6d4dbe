"""What loading from each source and computing have taken so far: the measurements that `worth.py` decides by. Pure."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FORGET_S = 300.0
"""A source that was not used for so long counts as unknown, so that one that was slow once is tried again."""
SMOOTHING = 0.3
"""The share of the newest measurement in a mean."""
SMALL_BYTES = 1 << 20
"""A load up to this size shows what one takes whatever its size."""
MAX_SOURCES = 256


@dataclass(slots=True)
class _Source:
    noted_at: float
    s_per_byte: float | None = None
    fixed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SourceSpeed:
    """What loads from one source have taken: `num_bytes` take fixed_s + num_bytes / bytes_per_s."""

    source: str
    bytes_per_s: float
    fixed_s: float


class LoadSpeeds:
    """By source: a tier's name, or a worker's address. Any thread may call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sources: dict[str, _Source] = {}
        self._prefill_tokens = self._prefill_s = 0.0

    @property
    def prefill_s_per_token(self) -> float | None:
        """None before the first prompt."""
        with self._lock:
            return self._prefill_s / self._prefill_tokens if self._prefill_tokens else None

    def note_load(self, source: str, num_bytes: int, seconds: float) -> None:
        """`num_bytes` came from `source` in `seconds`, from asking for them to having them."""
        if num_bytes < 1:
            return
        with self._lock:
            known = self._known(source)
            if known is None:
                known = self._sources[source] = _Source(self._clock())
                if len(self._sources) > MAX_SOURCES:
                    del self._sources[min(self._sources, key=lambda name: self._sources[name].noted_at)]
            known.noted_at = self._clock()
            if num_bytes <= SMALL_BYTES:
                known.fixed_s = _mean(known.fixed_s or None, seconds)
            else:
                moving_s = max(seconds - known.fixed_s, 0.1 * seconds)
                known.s_per_byte = _mean(known.s_per_byte, moving_s / num_bytes)

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """So many tokens of a prompt were computed in `seconds`. A few, such as a prompt's last ones, count as few."""
        if num_tokens < 1:
            return
        with self._lock:
            self._prefill_tokens = (1 - SMOOTHING) * self._prefill_tokens + num_tokens
            self._prefill_s = (1 - SMOOTHING) * self._prefill_s + seconds

    def bytes_per_s(self, source: str) -> float | None:
        """None where nothing is known, or not any more."""
        with self._lock:
            known = self._known(source)
            return None if known is None or known.s_per_byte is None else _bytes_per_s(known.s_per_byte)

    def fixed_s(self, source: str) -> float:
        """What a load from the source takes whatever its size; 0 where that is not known."""
        with self._lock:
            known = self._known(source)
            return 0.0 if known is None else known.fixed_s

    def measured(self) -> list[SourceSpeed]:
        """Every source whose speed is known, the one used last first."""
        with self._lock:
            known = [(name, source) for name in self._sources if (source := self._known(name)) is not None]
            known.sort(key=lambda each: -each[1].noted_at)
            return [
                SourceSpeed(name, _bytes_per_s(source.s_per_byte), source.fixed_s)
                for name, source in known
                if source.s_per_byte is not None
            ]

    def _known(self, source: str) -> _Source | None:
        known = self._sources.get(source)
        return known if known is not None and self._clock() - known.noted_at <= FORGET_S else None


def _bytes_per_s(s_per_byte: float) -> float:
    return 1 / max(s_per_byte, 1e-12)


def _mean(known: float | None, new: float) -> float:
    return new if known is None else known + SMOOTHING * (new - known)
