"""One end of a large transfer in a process of its own, over a cache that takes no memory, with its peak memory.

    python -m tests.integration.kvtransfer_memory_peer receive LANDING_BYTES NUM_TOKENS NUM_LEASES BYTES_PER_S CARRIER
    python -m tests.integration.kvtransfer_memory_peer send NUM_TOKENS WINDOW_BYTES CARRIER

CARRIER is inline or tcp.

The receiver says ADDRESS EPOCH LEASE...; the sender reads that. Each first moves a little on a lease of its own, so
that what a first transfer sets up once is not counted, and says how many bytes its resident memory grew at the most
after that.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import torch

from headrace.v1 import kvtransfer_pb2 as pb
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import newest_codec
from kvtransfer.credit import CreditBook
from kvtransfer.desk import LeaseDesk
from kvtransfer.frames import LeaseRef, max_frame_bytes
from kvtransfer.landing import FrameLander
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane
from kvtransfer.lease_types import Grant, RequestId
from kvtransfer.leases import LeaseTable
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.grpc_channel import make_bulk_server, open_bulk_channel
from kvtransfer.transports.grpc_push import PushSession
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services
from kvtransfer.transports.push_books import PushOptions
from worker.pacing import LandingPace

LAYOUT = CacheLayout(
    tuple(Plane(name, 32, Paged(1), 8, (Field(name, 128, "float32"),)) for name in "kv"), block_tokens=16
)
"""256 KiB a token: 4,096 tokens are 1 GiB."""

FRAME_BYTES = max_frame_bytes(LAYOUT)
WARM_UP_TOKENS = 64
SENDER_EPOCH = 7


class PatternCache:
    """A CacheStore that computes what it holds, and checks what is written to it."""

    def __init__(self) -> None:
        self.num_bytes_written = 0
        self._pattern = torch.randint(
            0, 256, (8 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
        )
        self._lock = threading.Lock()

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        raw = self._content(piece, wire)
        return raw.clone() if out is None else out.copy_(raw)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        if not torch.equal(self._content(piece, wire), data):
            raise ValueError(f"{piece} came with other bytes")
        with self._lock:
            self.num_bytes_written += len(data)

    def fence(self) -> None:
        """Nothing is pending."""

    def _content(self, piece: Piece, wire: Plane) -> torch.Tensor:
        start = zlib.crc32(repr(piece).encode()) % (1 << 19)
        return self._pattern[start : start + wire.num_bytes(piece)]


class PeakMemory:
    """Growth of this process's resident memory at its peak, from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._before = self._read("VmRSS")

    def growth(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, key: str) -> int:
        match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1]) << 10


def receive(landing_bytes: int, num_tokens: int, num_leases: int, bytes_per_s: float, carrier: str) -> None:
    epoch, cache, table_lock = secrets.randbits(32), PatternCache(), threading.RLock()
    table = LeaseTable(epoch, time.monotonic, secrets.token_bytes)
    desk = LeaseDesk(table, table_lock, lambda lease_ids: None)
    sink = CacheSink(cache, LAYOUT)
    lander = FrameLander(desk, sink, LAYOUT, time.monotonic, LandingPace(lambda: True, bytes_per_s))
    server = make_bulk_server(max_calls=2 * num_leases + 4)
    service = KvTransferService(desk, sink, LAYOUT, lambda lease_id, handoff, fidelity: None, time.monotonic)
    carriers = CarrierHost(CarrierOptions(shm=False, tcp_host="127.0.0.1" if carrier == "tcp" else ""))
    credits = CreditBook(landing_bytes, FRAME_BYTES)
    add_kv_services(server, BulkReceiver(lander, credits, carriers.open_slots), service)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    leases = []
    for number in range(num_leases + 1):
        grant = table.grant(RequestId("t", f"{number}"), 1, ttl_s=30, remaining_s=120)
        assert isinstance(grant, Grant)
        leases.append(grant.lease_id.hex())
    say(address, epoch, *leases)
    sys.stdin.readline()  # warm
    peak = PeakMemory()
    say("ready")
    sys.stdin.readline()  # done
    expected = LAYOUT.num_bytes(WARM_UP_TOKENS) + num_leases * LAYOUT.num_bytes(num_tokens)
    say(peak.growth(), cache.num_bytes_written == expected)
    server.stop(0).wait(5)


def send(num_tokens: int, window_bytes: int, carrier: str) -> None:
    address, epoch, *lease_ids = sys.stdin.readline().split()
    carriers = SenderCarriers(shm=False, tcp=carrier == "tcp")
    channel, cache = open_bulk_channel(address), PatternCache()

    def push(lease_id: str, length: int) -> None:
        session = PushSession(
            channel=channel,
            lease=LeaseRef(bytes.fromhex(lease_id), 1, SENDER_EPOCH, int(epoch)),
            ttl_s=30,
            remaining_s=120,
            cache=cache,
            layout=LAYOUT,
            chooser=FixedCodec(newest_codec("raw"), "the test's"),
            owner=b"any",
            metadata=carriers.metadata(),
            open_writer=partial(carriers.open_writer, address=address) if carrier == "tcp" else None,
            options=PushOptions(window_bytes=window_bytes, frame_bytes=carriers.frame_bytes(address)),
        )
        session.advance(length)
        handoff = pb.Handoff(num_tokens=length, layout=LAYOUT.identity(), handoff_major=1)
        outcome = session.commit(handoff, 100)
        if not outcome.is_committed or session.stats().carriers.keys() != {carrier}:
            say("failed", outcome, session.stats())

    push(lease_ids[0], WARM_UP_TOKENS)
    say("warm")
    sys.stdin.readline()
    peak = PeakMemory()
    threads = [threading.Thread(target=push, args=(lease_id, num_tokens)) for lease_id in lease_ids[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(peak.growth())
    channel.close()


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["receive", landing_bytes, num_tokens, num_leases, bytes_per_s, carrier]:
            receive(int(landing_bytes), int(num_tokens), int(num_leases), float(bytes_per_s), carrier)
        case ["send", num_tokens, window_bytes, carrier]:
            send(int(num_tokens), int(window_bytes), carrier)
    os._exit(0)
