"""An answering and an asking worker's KV side in one process: real gRPC on loopback, a paged cache in numpy."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import grpc
import torch

from kvtransfer.cache_sink import CacheSink
from kvtransfer.cache_source import CacheBlockSource
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import CODECS, newest_codec
from kvtransfer.fetching import paged_part
from kvtransfer.frames import LeaseRef
from kvtransfer.layouts import Paged, Piece, Plane
from kvtransfer.sources import FetchRequest
from kvtransfer.transports.grpc_channel import make_bulk_server, open_bulk_channel
from kvtransfer.transports.grpc_fetch import FetchSession, FetchTarget
from kvtransfer.transports.grpc_serve import FetchServer, ServeOptions
from tests.integration.kvtransfer_harness import GQA, PagedStore, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.fetching import FetchOutcome
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.lease_types import Grant
    from kvtransfer.sources import BlockSource, EncodedPiece, OpenBlocks

BLOCK = 32
"""Tokens of a key block; the stores' own blocks have 16."""

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "uint8": torch.uint8,
}


class CachedStore(PagedStore):
    """A PagedStore that converts dtypes, and reads pinned blocks as those of the owner of the pin."""

    def __init__(self, layout: CacheLayout, seed: int) -> None:
        super().__init__(layout, seed=seed)
        self._pins: dict[bytes, tuple[bytes, int]] = {}

    def pin(self, owner: bytes, base: bytes, first_token: int) -> None:
        self._pins[owner] = (base, first_token)

    def unpin(self, owner: bytes) -> None:
        del self._pins[owner]

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        base, first_token = self._pins.get(owner, (owner, 0))
        stored = self.layout.plane(piece.plane)
        if first_token:
            assert isinstance(stored.kind, Paged)
            shift = first_token // stored.kind.tokens_per_entry
            piece = replace(piece, entries=range(piece.entries.start + shift, piece.entries.stop + shift))
        raw = convert(super().gather(base, piece, stored), stored, wire)
        return raw if out is None else out.copy_(raw)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        stored = self.layout.plane(piece.plane)
        super().scatter(owner, piece, stored, convert(data, wire, stored))


def convert(raw: torch.Tensor, source: Plane, target: Plane) -> torch.Tensor:
    """Canonical bytes of a piece with other dtypes."""
    if source.dtypes == target.dtypes:
        return raw
    rows, start, columns = raw.view(-1, source.record_bytes), 0, []
    for ours, theirs in zip(source.fields, target.fields, strict=True):
        numbers = rows[:, start : start + ours.num_bytes].contiguous().view(_DTYPES[ours.dtype])
        columns.append(numbers.to(_DTYPES[theirs.dtype]).view(torch.uint8))
        start += ours.num_bytes
    return torch.cat(columns, dim=1).reshape(-1)


class Answerer:
    """A worker that has a sequence of `num_tokens` cached, in key blocks named by `keys`."""

    OWNER = b"cached sequence!"

    def __init__(
        self,
        layout: CacheLayout = GQA,
        num_tokens: int = 256,
        *,
        fidelity: int = 0,
        source: BlockSource | None = None,
        options: ServeOptions | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        frame_bytes: int = 4096,
        codec: str = "raw",
    ) -> None:
        self.epoch = secrets.randbits(64)
        self.layout = layout
        self.fidelity = fidelity
        self.store = CachedStore(layout, seed=3)
        self.store.allocate(self.OWNER, num_tokens)
        for plane in layout.planes:
            piece = Piece(plane.name, range(plane.layers), range(plane.heads), plane.live(num_tokens))
            self.store.scatter(self.OWNER, piece, plane, finite_bytes(plane, piece))
        self.keys = [bytes([i]) * 16 for i in range(1, num_tokens // BLOCK + 1)]
        self._lock = threading.Lock()
        self.source: BlockSource = source or CacheBlockSource(
            self.store,
            layout,
            BLOCK,
            self._pin,
            self._unpin,
            lambda request: FixedCodec(newest_codec(codec), "the test's"),
            frame_bytes,
        )
        self.fetches = FetchServer(self.source, lambda: self.epoch, options)
        self.server = make_bulk_server(max_calls=16, interceptors=interceptors)
        self.server.add_generic_rpc_handlers((self.fetches.handler(),))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def close(self) -> None:
        self.server.stop(0).wait(5)

    def _pin(self, owner: bytes, keys: Sequence[bytes], bound: int) -> tuple[int, int] | None:
        if keys[0] not in self.keys or self.fidelity > bound:
            return None
        first = self.keys.index(keys[0])
        held = 0
        while held < len(keys) and self.keys[first + held : first + held + 1] == [keys[held]]:
            held += 1
        with self._lock:
            self.store.pin(owner, self.OWNER, first * BLOCK)
        return held, self.fidelity

    def _unpin(self, owner: bytes) -> None:
        with self._lock:
            self.store.unpin(owner)


def finite_bytes(plane: Plane, piece: Piece) -> torch.Tensor:
    """Random numbers of the plane's dtypes, as canonical bytes."""
    generator = torch.Generator().manual_seed(1)
    num_rows = plane.num_bytes(piece) // plane.record_bytes
    columns = [
        (100 * torch.rand(num_rows, field.width, generator=generator)).to(_DTYPES[field.dtype])
        for field in plane.fields
    ]
    return torch.cat([column.view(torch.uint8) for column in columns], dim=1).reshape(-1)


@dataclass
class Sealed:
    """What an asker was told to cache: the canonical bytes of the paged planes from the first block on."""

    num_blocks: int
    fidelity: int
    planes: dict[str, bytes]


@dataclass
class Asker:
    """A worker that lacks the blocks; its lease table, lander and credit are those of a receiver of pushes."""

    answerer: Answerer
    layout: CacheLayout = GQA
    pace: Callable[[int], None] | None = None
    landing_bytes: int = 64 << 20
    fails_to_seal: bool = False
    sealed: list[Sealed] = field(default_factory=list)
    _num_asked: int = 0

    def __post_init__(self) -> None:
        store = CachedStore(self.layout, seed=7)
        self.receiver = Receiver(self.layout, pace=self.pace, landing_bytes=self.landing_bytes, store=store)
        self.channel = open_bulk_channel(self.answerer.address)

    @property
    def target(self) -> FetchTarget:
        receiver = self.receiver
        sink = CacheSink(receiver.store, self.layout)
        return FetchTarget(receiver.desk, receiver.lander, sink, receiver.credits, self.layout)

    def request(self, keys: Sequence[bytes], first_block: int = 0, fidelity: int = 0) -> FetchRequest:
        self._num_asked += 1
        num_tokens = (first_block + len(keys)) * BLOCK
        self.grant: Grant = self.receiver.grant(
            num_tokens,
            start_token=first_block * BLOCK,
            request=f"fetch {self._num_asked}",
            fidelity=fidelity,
        )
        return FetchRequest(
            lease=LeaseRef(self.grant.lease_id, 1, self.answerer.epoch, self.receiver.epoch),
            keys=tuple(keys),
            first_block=first_block,
            block_tokens=BLOCK,
            layout=self.layout.identity(),
            dtypes=tuple(plane.dtypes for plane in self.layout.planes),
            fidelity=fidelity,
            codecs=tuple((codec.name, codec.version) for codec in CODECS),
        )

    def session(
        self, request: FetchRequest, *, remaining_s: float = 20.0, stall_s: float = 10.0
    ) -> FetchSession:
        self._first_block = request.first_block
        return FetchSession(
            channel=self.channel,
            request=request,
            target=self.target,
            on_fetched=self._seal,
            remaining_s=remaining_s,
            stall_s=stall_s,
        )

    def fetch(
        self, keys: Sequence[bytes], first_block: int = 0, fidelity: int = 0, **times: float
    ) -> FetchOutcome:
        return self.session(self.request(keys, first_block, fidelity), **times).run()

    @property
    def is_clean(self) -> bool:
        """No lease, memory or credit is held."""
        receiver = self.receiver
        return not (receiver.table.num_held or receiver.store.num_owners or receiver.credits.num_streams)

    def close(self) -> None:
        self.channel.close()
        self.receiver.close()

    def _seal(self, lease_id: bytes, num_blocks: int, fidelity: int) -> None:
        if self.fails_to_seal:
            raise RuntimeError("no room in the index")
        first = self._first_block
        whole = self.receiver.store.read(lease_id, (first + num_blocks) * BLOCK, first * BLOCK)
        paged = {plane.name: whole[plane.name] for plane in paged_part(self.layout).planes}
        self.sealed.append(Sealed(num_blocks, fidelity, paged))


def cached_bytes(answerer: Answerer, blocks: range) -> dict[str, bytes]:
    """What a fetch of those key blocks must bring."""
    whole = answerer.store.read(Answerer.OWNER, blocks.stop * BLOCK, blocks.start * BLOCK)
    return {plane.name: whole[plane.name] for plane in paged_part(answerer.layout).planes}


class Tampering(grpc.ServerInterceptor):
    """Changes what goes down a Fetch: `change(number, message)` gives what is sent in place of each message."""

    def __init__(self, change: Callable[[int, bytes], Sequence[bytes]]) -> None:
        self._change = change

    def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        handler = continuation(details)

        def tampered(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for number, message in enumerate(handler.stream_stream(messages, context)):
                yield from self._change(number, message)

        return grpc.stream_stream_rpc_method_handler(tampered)


class GatedSource:
    """A source whose piece `number` waits until `gate` is open; `reached` is set when it is asked for."""

    def __init__(self, inner: BlockSource, number: int) -> None:
        self._inner = inner
        self._number = number
        self.gate = threading.Event()
        self.reached = threading.Event()

    def open(self, request: FetchRequest) -> OpenBlocks:
        return _Gated(self._inner.open(request), self)

    def pass_through(self, number: int) -> None:
        if number == self._number:
            self.reached.set()
            assert self.gate.wait(20)


class _Gated:
    def __init__(self, inner: OpenBlocks, gate: GatedSource) -> None:
        self._inner = inner
        self._gate = gate
        self.num_blocks = inner.num_blocks
        self.piece = inner.piece
        self.note_landed = inner.note_landed
        self.close = inner.close

    def pieces(self) -> Iterator[EncodedPiece]:
        for number, piece in enumerate(self._inner.pieces()):
            self._gate.pass_through(number)
            yield piece
