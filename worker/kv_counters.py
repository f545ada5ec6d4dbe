"""What KV transfers of this worker have moved, for its reports. Any thread may count."""

from __future__ import annotations

import threading
from collections import Counter

from headrace.v1 import worker_pb2
from kvtransfer.transports.seam import PushStats


class KvCounters:
    """Since the worker started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_codec: Counter[str] = Counter()
        self._by_carrier: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}
        self._wire_bytes = 0
        self._fetched_tokens: Counter[str] = Counter()

    def note_push(self, stats: PushStats) -> None:
        """A push has ended, whatever its outcome."""
        with self._lock:
            self._by_codec.update(stats.codecs)
            self._by_carrier.update(stats.carriers)
            self._wire_bytes += stats.wire_bytes
            if stats.codec:
                self._reasons[stats.codec] = stats.reason

    def note_fetch(self, source: str, num_tokens: int) -> None:
        """A prefix was loaded: `source` is a kind, "store" or "worker"."""
        with self._lock:
            self._fetched_tokens[source] += num_tokens

    def report(self) -> worker_pb2.KvReport:
        """All figures, and for each codec why it was chosen last."""
        with self._lock:
            return worker_pb2.KvReport(
                pushed_bytes_by_codec=self._by_codec,
                pushed_bytes_by_carrier=self._by_carrier,
                pushed_wire_bytes=self._wire_bytes,
                last_reason_by_codec=self._reasons,
                fetched_tokens_by_source=self._fetched_tokens,
            )
