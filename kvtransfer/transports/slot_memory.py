"""Memory for the landing slots of a stream, or for what is to be written into them: bounded, and used again, because
memory that is fresh from the system costs more than the copies into it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.transports.carriers import CarrierFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SlotMemory:
    """Regions of `region_bytes`, at most `max_bytes` of them in all. Safe to call from several threads."""

    def __init__(self, region_bytes: int, max_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._max_regions = max_bytes // region_bytes
        self._lock = threading.Lock()
        self._num_taken = 0
        self._idle: list[NDArray[np.uint8]] = []

    def take(self) -> NDArray[np.uint8]:
        """uint8 [region_bytes]; what an earlier user left is in it. Raises CarrierFailed when all are in use."""
        with self._lock:
            if self._num_taken >= self._max_regions:
                raise CarrierFailed(f"{self._num_taken} regions of {self._region_bytes} bytes are in use")
            self._num_taken += 1
            return self._idle.pop() if self._idle else np.empty(self._region_bytes, np.uint8)

    def put_back(self, region: NDArray[np.uint8]) -> None:
        """Nobody uses the region any more."""
        with self._lock:
            self._num_taken -= 1
            self._idle.append(region)

    @property
    def num_taken(self) -> int:
        return self._num_taken
