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
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import torch
from safetensors.torch import load_file

from bench import bare_grpc, tcp
from engine.cache import PagedCache
from engine.models.layouts import gqa_layout
from engine.pool import BlockPool
from headrace.v1 import kvtransfer_pb2 as pb
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import newest_codec
from kvtransfer.credit import DEFAULT_LANDING_BYTES, CreditBook
from kvtransfer.desk import LeaseDesk
from kvtransfer.frames import LeaseRef, max_frame_bytes
from kvtransfer.landing import FrameLander
from kvtransfer.layouts import DEFAULT_PIECE_BYTES, CacheLayout
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
        num_layers, num_heads, self.num_tokens, width = keys.shape
        self.layout = gqa_layout(num_layers, num_heads, width, dtype, BLOCK_TOKENS)
        num_blocks = -(-self.num_tokens // BLOCK_TOKENS) + 1
        self.pool = BlockPool(num_blocks, BLOCK_TOKENS)
        self.cache = PagedCache(self.layout, num_blocks, torch.device("cpu"), self.pool.blocks)
        return {"kv_bytes": self.layout.num_bytes(self.num_tokens)}

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
        facts = self.open_cache(sample)
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
