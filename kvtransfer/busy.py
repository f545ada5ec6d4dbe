"""How busy others keep the cores on which this process encodes. Thin: it reads the system's counters."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SAMPLE_S = 0.25


def busy_seconds(cpus: Collection[int]) -> float:
    """Seconds that these cores (all where empty) have been in use since the machine started."""
    cores = psutil.cpu_times(percpu=True)
    chosen = [core for number, core in enumerate(cores) if not cpus or number in cpus]
    return sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) for core in chosen)


class BusyCores:
    """Called, gives the share 0 to 1 of the cores `cpus` (as the operating system counts them; empty: all) that others
    used lately. Any thread may call.

    `own_s`: seconds that this process has spent encoding. Without taking them away, a codec would make the cores look
    busy by which it is judged. `read`: where the cores' seconds come from.
    """

    def __init__(
        self,
        cpus: Collection[int],
        own_s: Callable[[], float],
        clock: Callable[[], float],
        read: Callable[[Collection[int]], float] = busy_seconds,
    ) -> None:
        self._cpus = frozenset(cpus)
        self._num_cpus = len(self._cpus) or psutil.cpu_count() or 1
        self._own_s = own_s
        self._clock = clock
        self._read = read
        self._lock = threading.Lock()
        self._share = 0.0
        self._last = self._counters()

    def __call__(self) -> float:
        with self._lock:
            if self._clock() - self._last[0] >= SAMPLE_S:
                now, used_s, own_s = self._counters()
                then, used_before_s, own_before_s = self._last
                others_s = used_s - used_before_s - (own_s - own_before_s)
                self._share = min(1.0, max(0.0, others_s / ((now - then) * self._num_cpus)))
                self._last = (now, used_s, own_s)
            return self._share

    def _counters(self) -> tuple[float, float, float]:
        return self._clock(), self._read(self._cpus), self._own_s()
