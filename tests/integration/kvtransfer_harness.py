"""A receiving and a sending worker's KV side in one process: real gRPC on loopback, a paged cache in numpy."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import grpc
import numpy as np
import torch

from headrace.v1 import kvtransfer_pb2 as pb
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import newest_codec
from kvtransfer.codecs.memory import readable
from kvtransfer.credit import DEFAULT_LANDING_BYTES, CreditBook
from kvtransfer.desk import LeaseDesk
from kvtransfer.frames import FrameHeader, LeaseRef, decode_opening, encode_frame, max_frame_bytes
from kvtransfer.landing import FrameLander
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, Window
from kvtransfer.lease_types import Grant, Lease, RequestId
from kvtransfer.leases import LeaseTable
from kvtransfer.transports.grpc_channel import make_bulk_server, open_bulk_channel
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from kvtransfer.transports.grpc_receive import BulkReceiver, KvTransferService, add_kv_services

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtransfer.choice import CodecChooser
    from kvtransfer.codecs import Codec
    from kvtransfer.transports.grpc_receive import OpenSlots
    from kvtransfer.transports.seam import CommitOutcome
    from kvtransfer.transports.slot_writing import OpenWriter

GQA = CacheLayout(
    planes=(
        Plane("k", layers=6, kind=Paged(1), heads=2, fields=(Field("k", 8, "float32"),)),
        Plane("v", layers=6, kind=Paged(1), heads=2, fields=(Field("v", 8, "float32"),)),
    ),
    block_tokens=16,
)
MIXED = CacheLayout(
    planes=(
        Plane("latent", 3, Paged(4), 1, (Field("nope", 28, "float8_e4m3"), Field("rope", 4, "bfloat16"))),
        Plane("indexer", 3, Paged(4), 1, (Field("key", 8, "uint8"),)),
        Plane("window", 4, Window(24, 1), 2, (Field("kv", 8, "bfloat16"),)),
        Plane("tail", 2, Window(8, 4), 1, (Field("kv", 4, "float32"), Field("gate", 4, "float32"))),
    ),
    block_tokens=16,
)


class PagedStore:
    """A CacheStore over one pool a plane: uint8 [layers, blocks · entries, heads, record]; block order is random."""

    def __init__(self, layout: CacheLayout, num_blocks: int = 64, seed: int = 0) -> None:
        self.layout = layout
        self.num_scatters = 0
        self.num_fences = 0
        self._tables: dict[bytes, np.ndarray] = {}
        self._free = list(np.random.default_rng(seed).permutation(num_blocks))
        self._pools = {
            plane.name: np.zeros(
                (plane.layers, num_blocks * layout.block_tokens, plane.heads, plane.record_bytes), np.uint8
            )
            for plane in layout.planes
        }

    def allocate(self, owner: bytes, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.layout.block_tokens)
        self._tables[owner] = np.array([self._free.pop() for _ in range(num_blocks)])

    def free(self, owner: bytes) -> None:
        self._free.extend(self._tables.pop(owner))

    @property
    def num_owners(self) -> int:
        return len(self._tables)

    def fill(self, owner: bytes, num_tokens: int, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        for plane in self.layout.planes:
            live = plane.live(num_tokens)
            piece = Piece(plane.name, range(plane.layers), range(plane.heads), live)
            self.scatter(owner, piece, plane, readable(rng.bytes(plane.num_bytes(piece))))

    def read(self, owner: bytes, num_tokens: int, start_token: int = 0) -> dict[str, bytes]:
        """Canonical bytes of each plane from `start_token` on."""
        whole = {}
        for plane in self.layout.planes:
            live = plane.live(num_tokens)
            if isinstance(plane.kind, Paged):
                live = range(start_token // plane.kind.tokens_per_entry, live.stop)
            piece = Piece(plane.name, range(plane.layers), range(plane.heads), live)
            whole[plane.name] = self.gather(owner, piece, plane).numpy().tobytes() if live else b""
        return whole

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        pool = self._pools[piece.plane]
        box = pool[_span(piece.layers), self._slots(owner, piece), _span(piece.heads)]
        raw = torch.from_numpy(np.ascontiguousarray(box).reshape(-1))
        return raw if out is None else out.copy_(raw)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        self.num_scatters += 1
        pool = self._pools[piece.plane]
        shape = (len(piece.layers), len(piece.entries), len(piece.heads), pool.shape[-1])
        slots = self._slots(owner, piece)
        pool[_span(piece.layers), slots, _span(piece.heads)] = data.numpy().reshape(shape)

    def fence(self) -> None:
        self.num_fences += 1

    def _slots(self, owner: bytes, piece: Piece) -> np.ndarray:
        table, per_block = self._tables[owner], self.layout.block_tokens
        entries = np.arange(piece.entries.start, piece.entries.stop)
        if len(entries) and entries[-1] // per_block >= len(table):
            raise ValueError(f"entries up to {entries[-1]} in {len(table)} blocks of {per_block}")
        return table[entries // per_block] * per_block + entries % per_block


def _span(box: range) -> slice:
    return slice(box.start, box.stop)


class Peer(NamedTuple):
    """What a sender knows of a receiver in another process."""

    address: str
    epoch: int


class Receiver:
    """A decode worker's KV side."""

    def __init__(
        self,
        layout: CacheLayout = GQA,
        *,
        pace: Callable[[int], None] | None = None,
        on_commit: Callable[[bytes, pb.Handoff, int], None] | None = None,
        max_wait_s: float = 5.0,
        landing_bytes: int = DEFAULT_LANDING_BYTES,
        open_slots: OpenSlots | None = None,
        store: PagedStore | None = None,
    ) -> None:
        self.epoch = secrets.randbits(64)
        self.lock = threading.RLock()
        self.store = store or PagedStore(layout, seed=7)
        self.table = LeaseTable(self.epoch, time.monotonic, secrets.token_bytes)
        self.desk = LeaseDesk(self.table, self.lock, self._reclaim)
        sink = CacheSink(self.store, layout)
        self.lander = FrameLander(self.desk, sink, layout, time.monotonic, pace)
        self.credits = CreditBook(landing_bytes, max_frame_bytes(layout))
        self.committed: list[tuple[bytes, pb.Handoff]] = []
        self.fidelities: list[int] = []
        self.reclaimed: list[bytes] = []
        self._service = KvTransferService(
            self.desk, sink, layout, on_commit or self._commit, time.monotonic, max_wait_s
        )
        self._open_slots = open_slots
        self.address = "127.0.0.1:0"
        self.server = self._serve()

    def _serve(self) -> grpc.Server:
        server = make_bulk_server(max_calls=16)
        add_kv_services(server, BulkReceiver(self.lander, self.credits, self._open_slots), self._service)
        self.address = f"127.0.0.1:{server.add_insecure_port(self.address)}"
        server.start()
        return server

    def restart_server(self) -> None:
        """On the same port, with the same table and memory: a network fault, not a new incarnation."""
        self.close()
        self.server = self._serve()

    def grant(
        self,
        num_tokens: int,
        *,
        start_token: int = 0,
        ttl_s: float = 30.0,
        request: str = "r",
        attempt: int = 1,
        fidelity: int = 0,
    ) -> Grant:
        with self.desk.change() as table:
            grant = table.grant(
                RequestId("t", request), attempt, ttl_s=ttl_s, remaining_s=60.0, fidelity=fidelity
            )
            assert isinstance(grant, Grant)
            self.store.allocate(grant.lease_id, num_tokens)
            table.hold_prefix(grant.lease_id, start_token)
        return grant

    def lease(self, grant: Grant) -> Lease:
        lease = self.table.get(grant.lease_id)
        assert lease is not None
        return lease

    def close(self) -> None:
        self.server.stop(0).wait(5)

    def _commit(self, lease_id: bytes, handoff: pb.Handoff, fidelity: int) -> None:
        self.committed.append((lease_id, handoff))
        self.fidelities.append(fidelity)

    def _reclaim(self, lease_ids: list[bytes]) -> None:
        for lease_id in lease_ids:
            self.reclaimed.append(lease_id)
            self.store.free(lease_id)


class Sender:
    """A prefill worker's KV side: a filled cache and a channel to one receiver."""

    OWNER = b"sender's lease 1"

    def __init__(
        self, receiver: Receiver | Peer, num_tokens: int, layout: CacheLayout = GQA, seed: int = 1
    ) -> None:
        self.epoch = secrets.randbits(64)
        self.layout = layout
        self.receiver_epoch = receiver.epoch
        self.store = PagedStore(layout, seed=3)
        self.store.allocate(self.OWNER, num_tokens)
        self.store.fill(self.OWNER, num_tokens, seed)
        self.channel = open_bulk_channel(receiver.address)

    def ref(self, grant: Grant, **changes: int) -> LeaseRef:
        facts = {"attempt": grant.attempt, "sender_epoch": self.epoch, "receiver_epoch": self.receiver_epoch}
        return LeaseRef(grant.lease_id, **(facts | changes))

    def session(
        self,
        grant: Grant,
        *,
        start_token: int = 0,
        remaining_s: float = 30.0,
        codec: Codec | None = None,
        chooser: CodecChooser | None = None,
        wire: CacheLayout | None = None,
        ref: LeaseRef | None = None,
        options: PushOptions | None = None,
        open_writer: OpenWriter | None = None,
    ) -> PushSession:
        return PushSession(
            channel=self.channel,
            lease=ref or self.ref(grant),
            ttl_s=grant.ttl_s,
            remaining_s=remaining_s,
            cache=self.store,
            layout=self.layout,
            chooser=chooser or FixedCodec(codec or newest_codec("raw"), "the test's"),
            owner=self.OWNER,
            wire=wire,
            open_writer=open_writer,
            start_token=start_token,
            options=options or PushOptions(frame_bytes=4096),
        )

    def handoff(self, num_tokens: int) -> pb.Handoff:
        return pb.Handoff(num_tokens=num_tokens, layout=self.layout.identity(), handoff_major=1, codec="raw")

    def push_all(self, session: PushSession, num_tokens: int, chunk: int = 32) -> CommitOutcome:
        for ready in range(chunk, num_tokens + 1, chunk):
            session.advance(ready)
        return session.commit(self.handoff(num_tokens), 20.0)

    def frame(
        self, ref: LeaseRef, number: int, piece: Piece, codec: tuple[str, int] = ("raw", 1)
    ) -> tuple[bytes, int]:
        """One frame by hand: its message and checksum."""
        plane = self.layout.plane(piece.plane)
        header = FrameHeader(ref, number, piece, *codec, plane.num_bytes(piece), plane.dtypes)
        return encode_frame(header, self.store.gather(self.OWNER, piece, plane).numpy().data)

    def close(self) -> None:
        self.channel.close()


def raw_push(channel: grpc.Channel, messages: list[bytes]) -> list[bytes]:
    """Sends messages as they are and gives the acknowledgements, without the opening."""
    push = channel.stream_stream("/headrace.v1.KvBulk/Push")
    opening, *acks = push(iter(messages), timeout=20.0)
    decode_opening(opening)
    return acks


def holding(gate: threading.Event) -> Callable[[int], None]:
    """A pace that lets nothing land before the gate opens."""

    def pace(num_bytes: int) -> None:
        del num_bytes
        gate.wait(20)

    return pace


def flip_messages(sender: Sender, numbers: set[int]) -> None:
    """From now on the channel flips one payload bit in the messages of these ordinals."""
    inner = sender.channel

    class FlippingChannel:
        def __getattr__(self, name: str) -> object:
            return getattr(inner, name)

        def stream_stream(self, method: str) -> object:
            call = inner.stream_stream(method)

            def flipped(messages: Iterator[bytes], **kwargs: object) -> object:
                def damaged() -> Iterator[bytes]:
                    for ordinal, message in enumerate(messages):
                        if ordinal in numbers:
                            message = message[:-5] + bytes([message[-5] ^ 4]) + message[-4:]
                        yield message

                return call(damaged(), **kwargs)

            return flipped

    sender.channel = FlippingChannel()  # type: ignore[assignment]
