"""One end of `headrace bench transfer`, in a process of its own: `python -m bench.transfer_end HOST`.

Reads one JSON object a line ({"do": NAME, …}), answers each with one. A cache end holds a paged cache of the
demo model's layout; the receiving one serves a worker's KV port on it.
"""

from __future__ import annotations

import json
import resource
import secrets
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import torch
import xxhash
from safetensors.torch import load_file

from bench import bare_grpc, tcp
from engine.cache import PagedCache
from engine.cache_size import window_planes
from engine.models.layouts import cache_layout, gqa_layout
from engine.models.published_models import published_config
from engine.pool import BlockPool
from engine.window_cache import WindowCache
from engine.windows import WindowPool
from headrace.v1 import kvtransfer_pb2 as pb
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import newest_codec
from kvtransfer.credit import DEFAULT_LANDING_BYTES, CreditBook
from kvtransfer.desk import LeaseDesk
from kvtransfer.frames import LeaseRef, max_frame_bytes
from kvtransfer.landing import FrameLander
from kvtransfer.layouts import DEFAULT_PIECE_BYTES, CacheLayout, Piece, pieces_for, window_pieces_for
from kvtransfer.lease_types import Grant, RequestId
from kvtransfer.leases import LeaseTable
from kvtransfer.transports.carriers import CARRIED_FRAME_BYTES
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.grpc_channel import make_bulk_server, open_bulk_channel
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services
from kvtransfer.transports.seam import HANDOFF_MAJOR

if TYPE_CHECKING:
    from bench.bare_nixl import PagedRegion

BLOCK_TOKENS = 64
COMPACT = 2
PATIENCE_S = 300.0
EPOCH = 1
OWNER = b"the sender's own"


class End:
    """What both ends know: the sample's planes, and how to be measured."""

    pool: BlockPool

    def __init__(self, host: str) -> None:
        torch.set_num_threads(1)
        self.host = host
        self.layout: CacheLayout
        self.cache: PagedCache
        self.num_tokens = 0
        self._listening: Any = None
        self._received: threading.Thread | None = None
        self._noise = b""
        self._paged: PagedRegion | None = None

    def cpu(self) -> dict[str, float]:
        """Seconds of processor time of this process so far."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {"cpu_s": used.ru_utime + used.ru_stime}

    def open_cache(self, sample: str) -> dict[str, Any]:
        """A cache with room for the sample in {"k", "v"} [layers, heads, tokens, width], and one spare block."""
        planes = load_file(sample)
        keys = planes["k"]
        dtype = str(keys.dtype).removeprefix("torch.")
        num_layers, num_heads, num_tokens, width = keys.shape
        return self.make_cache(gqa_layout(num_layers, num_heads, width, dtype, BLOCK_TOKENS), num_tokens)

    def make_cache(self, layout: CacheLayout, num_tokens: int) -> dict[str, Any]:
        """A cache with room for one sequence, and one spare block."""
        self.layout, self.num_tokens = layout, num_tokens
        num_blocks, cpu = -(-num_tokens // layout.block_tokens) + 1, torch.device("cpu")
        has_windows = bool(window_planes(layout))
        self.pool = BlockPool(
            num_blocks, layout.block_tokens, windows=WindowPool(1, 0) if has_windows else None
        )
        windows = WindowCache(layout, 1, 0, 0, cpu)
        blocks_of, slot_of = self.pool.blocks, self.pool.slot
        self.cache = PagedCache(layout, num_blocks, cpu, blocks_of, None, windows, slot_of)
        return {"kv_bytes": layout.num_bytes(num_tokens)}

    def memory(self, forget_peak: bool = False) -> dict[str, int]:
        """Bytes that are resident, and at most were since `forget_peak`."""
        if forget_peak:
            Path("/proc/self/clear_refs").write_text("5")
        facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident, peak = (int(facts[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
        return {"resident": resident, "peak": peak}

    def slots(self, owner: bytes) -> torch.Tensor:
        """Where the sample's tokens lie in the planes."""
        starts = torch.tensor(self.pool.blocks(owner)) * BLOCK_TOKENS
        return (starts[:, None] + torch.arange(BLOCK_TOKENS)).reshape(-1)[: self.num_tokens]

    # --- a bare socket

    def tcp_listen(self, congestion: str, num_bytes: int) -> dict[str, Any]:
        """Take `num_bytes` from the next connection, in the background."""
        buffer = memoryview(np.ones(num_bytes, np.uint8)).cast("B")  # written to, so that its pages are there
        server = tcp.listen(self.host, congestion)
        self._received = threading.Thread(target=tcp.receive, args=(server, buffer), daemon=True)
        self._received.start()
        return {"port": server.getsockname()[1]}

    def tcp_send(self, host: str, port: int, congestion: str, num_bytes: int) -> dict[str, float]:
        """Send that many bytes."""
        if len(self._noise) != num_bytes:
            self._noise = np.random.default_rng(1).bytes(num_bytes)
        return {"seconds": tcp.send(host, port, congestion, memoryview(self._noise))}

    def paged_region(self, num_bytes: int) -> PagedRegion:
        """Of NIXL alone; made at the first call."""
        if self._paged is None:
            from bench.bare_nixl import PagedRegion

            self._paged = PagedRegion(secrets.token_hex(4), num_bytes)
        return self._paged


class ReceivingEnd(End):
    """A decode worker's KV side."""

    def nixl_paged_listen(self, num_bytes: int) -> dict[str, Any]:
        """Where pages may be written; polls until all are."""
        region = self.paged_region(num_bytes)
        threading.Thread(target=region.poll, daemon=True).start()
        return {"name": region.name, "metadata": region.metadata().hex(), "pages": region.pages}

    def serve(self, sample: str) -> dict[str, Any]:
        """Open the cache and the port."""
        return self._serve(self.open_cache(sample))

    def serve_model(self, model: str, kv_dtype: str, num_tokens: int) -> dict[str, Any]:
        """The same for a published model's cache of so many tokens, whose memory is there already."""
        facts = self.make_cache(cache_layout(published_config(model), kv_dtype), num_tokens)
        touch(self.cache)
        return self._serve(facts)

    def sums(self, lease: str) -> dict[str, Any]:
        """Of what landed, checksums piece by piece, in order; then the lease ends."""
        found = piece_sums(self.cache, self.layout, bytes.fromhex(lease), self.num_tokens)
        with self.desk.change() as table:
            table.release(bytes.fromhex(lease))
        return {"sums": found}

    def _serve(self, facts: dict[str, Any]) -> dict[str, Any]:
        lock = threading.RLock()
        self.table = LeaseTable(EPOCH, time.monotonic, secrets.token_bytes)
        self.desk = LeaseDesk(self.table, lock, self._reclaim)
        sink = CacheSink(self.cache, self.layout)
        lander = FrameLander(self.desk, sink, self.layout, time.monotonic)
        service = KvTransferService(
            self.desk, sink, self.layout, lambda _lease, _handoff, _fidelity: None, time.monotonic
        )
        credits = CreditBook(DEFAULT_LANDING_BYTES, max_frame_bytes(self.layout, CARRIED_FRAME_BYTES))
        self.carriers = CarrierHost(CarrierOptions(nixl=find_spec("nixl") is not None, tcp_host=self.host))
        self.server = make_bulk_server()
        add_kv_services(self.server, BulkReceiver(lander, credits, self.carriers.open_slots), service)
        self.server.add_generic_rpc_handlers((bare_grpc.handler(),))
        port = self.server.add_insecure_port(f"{self.host}:0")
        self.server.start()
        return {**facts, "address": f"{self.host}:{port}"}

    def grant(self, request: str) -> dict[str, Any]:
        """A lease with room for the whole sample, for codecs of every class."""
        with self.desk.change() as table:
            granted = table.grant(
                RequestId("bench", request), 1, ttl_s=PATIENCE_S, remaining_s=PATIENCE_S, fidelity=COMPACT
            )
            assert isinstance(granted, Grant)
            self.pool.open(granted.lease_id, [], self.pool.blocks_for(self.num_tokens))
        return {"lease": granted.lease_id.hex()}

    def release(self, lease: str) -> dict[str, Any]:
        """Give the lease's blocks back; says what they held."""
        slots = self.slots(bytes.fromhex(lease))
        checksums = [
            _checksum(plane.index_select(2, slots).contiguous()) for plane in self.cache.planes.values()
        ]
        with self.desk.change() as table:
            table.release(bytes.fromhex(lease))
        return {"checksums": checksums}

    def _reclaim(self, lease_ids: list[bytes]) -> None:
        for lease_id in lease_ids:
            self.pool.close(lease_id)


class SendingEnd(End):
    """A prefill worker's KV side."""

    def load(self, sample: str) -> dict[str, Any]:
        """Open a cache that holds the sample."""
        facts = self.open_cache(sample)
        self.pool.open(OWNER, [], self.pool.blocks_for(self.num_tokens))
        slots = self.slots(OWNER)
        planes = load_file(sample)
        for name, plane in self.cache.planes.items():
            plane.index_copy_(2, slots, planes[name])
        checksums = [_checksum(planes[name]) for name in self.cache.planes]
        return {**facts, "checksums": checksums}

    def load_model(self, model: str, kv_dtype: str, num_tokens: int) -> dict[str, Any]:
        """A published model's cache of so many tokens, full of random bytes."""
        facts = self.make_cache(cache_layout(published_config(model), kv_dtype), num_tokens)
        self.pool.open(OWNER, [], self.pool.blocks_for(num_tokens))
        rng = np.random.default_rng(1)
        for piece in whole(self.layout, num_tokens):
            plane = self.layout.plane(piece.plane)
            raw = torch.from_numpy(rng.integers(0, 256, plane.num_bytes(piece), np.uint8))
            self.cache.scatter(OWNER, piece, plane, raw)
        return facts | {"sums": piece_sums(self.cache, self.layout, OWNER, num_tokens)}

    def connect(self, address: str) -> dict[str, Any]:
        """A channel to the receiver, connected."""
        self._carriers: dict[str, SenderCarriers] = {}
        self._address = address
        self._channel = open_bulk_channel(address)
        grpc.channel_ready_future(self._channel).result(PATIENCE_S)
        return {}

    def grpc_send(self, num_bytes: int) -> dict[str, float]:
        """About that many bytes with nothing behind them, in messages as long as frames."""
        message = bytes(DEFAULT_PIECE_BYTES)
        return {"seconds": bare_grpc.send(self._channel, message, num_bytes // len(message), PATIENCE_S)}

    def nixl_paged_send(self, num_bytes: int, name: str, metadata: str, pages: list[int]) -> dict[str, float]:
        """Write all pages."""
        region = self.paged_region(num_bytes)
        region.agent.add_remote_agent(bytes.fromhex(metadata))
        return {"seconds": region.write(name, pages, PATIENCE_S)}

    def push(self, lease: str, codec: str, carrier: str) -> dict[str, Any]:
        """Everything is ready at once: seconds until the commit is acknowledged. `carrier`: shm, nixl, tcp or none."""
        if carrier not in self._carriers:
            self._carriers[carrier] = SenderCarriers(
                shm=carrier == "shm", nixl=carrier == "nixl", tcp=carrier == "tcp"
            )
        carriers = self._carriers[carrier]
        reference = LeaseRef(bytes.fromhex(lease), 1, EPOCH, EPOCH)
        began = time.monotonic()
        session = PushSession(
            channel=self._channel,
            lease=reference,
            ttl_s=PATIENCE_S,
            remaining_s=PATIENCE_S,
            cache=self.cache,
            layout=self.layout,
            chooser=FixedCodec(newest_codec(codec), "measured"),
            owner=OWNER,
            metadata=carriers.metadata(),
            open_writer=partial(carriers.open_writer, address=self._address),
            options=PushOptions(frame_bytes=carriers.frame_bytes(self._address)),
        )
        handoff = pb.Handoff(
            num_tokens=self.num_tokens,
            layout=self.layout.identity(),
            handoff_major=HANDOFF_MAJOR,
            codec=codec,
        )
        outcome = session.commit(handoff, PATIENCE_S)
        seconds = time.monotonic() - began
        if not outcome.is_committed:
            raise RuntimeError(f"{outcome.cause}: {outcome.message}")
        stats = session.stats()
        if carrier and carrier not in stats.carriers:
            raise RuntimeError(f"KV went {', '.join(stats.carriers)} instead of by {carrier}")
        return {"seconds": seconds, "wire_bytes": stats.wire_bytes}


def whole(layout: CacheLayout, num_tokens: int) -> list[Piece]:
    """All that a sequence has."""
    return [*pieces_for(layout, range(num_tokens)), *window_pieces_for(layout, num_tokens)]


def piece_sums(cache: PagedCache, layout: CacheLayout, owner: bytes, num_tokens: int) -> list[int]:
    """A checksum of each piece."""
    return [
        xxhash.xxh3_64_intdigest(cache.gather(owner, piece, layout.plane(piece.plane)).numpy())
        for piece in whole(layout, num_tokens)
    ]


def touch(cache: PagedCache) -> None:
    """So that its pages count before anything lands."""
    for plane in (*cache.planes.values(), *cache.windows.slots.values()):
        plane.fill_(0)


def _checksum(plane: torch.Tensor) -> int:
    return int(plane.view(torch.uint8).to(torch.int64).sum())


def main() -> None:
    """Serve commands until the input ends."""
    role, host = sys.argv[1:]
    end: End = ReceivingEnd(host) if role == "receive" else SendingEnd(host)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer = getattr(end, command.pop("do"))(**command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
