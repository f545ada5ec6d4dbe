"""A store over real gRPC: blocks are offered, pushed, committed, looked up and fetched, by the workers' own code."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from headrace.v1 import kvstore_pb2 as pb
from headrace.v1 import kvstore_pb2_grpc as pb_grpc
from headrace.v1 import kvtransfer_pb2 as transfer_pb
from kvtransfer.cache_sink import CacheSink
from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import CODECS, newest_codec
from kvtransfer.frames import LeaseRef
from kvtransfer.keys import tenant_label
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane
from kvtransfer.sources import FetchRequest
from kvtransfer.tiers.client import UNAVAILABLE, Declined, Granted, StoreClient
from kvtransfer.tiers.codec_classes import CODEC_RANKS
from kvtransfer.tiers.disk_types import DiskOptions
from kvtransfer.tiers.receiving import Offer, shape_of
from kvtransfer.tiers.server import StoreConfig, StoreServer
from kvtransfer.tiers.store_types import StoreOptions
from kvtransfer.tiers.wire import offer_to_wire
from kvtransfer.transports.grpc_fetch import FetchSession, FetchTarget
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from kvtransfer.transports.seam import TransferError
from tests.integration.kvtransfer_harness import (
    GQA,
    MIXED,
    PagedStore,
    Receiver,
)
from tests.tier_blocks import SECRET, key
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtransfer.fetching import FetchOutcome
    from kvtransfer.transports.seam import CommitOutcome

pytestmark = pytest.mark.integration

MIB = 1 << 20
BLOCK = 32  # tokens of a key block: two of the caches' own
ALICE = tenant_label(SECRET, "alice")
COARSE = CacheLayout(
    planes=(
        Plane("latent", 3, Paged(4), 1, (Field("nope", 28, "float8_e4m3"), Field("rope", 4, "bfloat16"))),
        Plane("indexer", 3, Paged(1), 1, (Field("key", 8, "uint8"),)),
    ),
    block_tokens=16,
)


class Writer:
    """A worker that writes its blocks back: a filled cache of `num_blocks` key blocks and a client."""

    OWNER = b"writer's lease 1"

    def __init__(self, store: StoreServer, num_blocks: int = 6, layout: CacheLayout = GQA) -> None:
        self.epoch = secrets.randbits(64)
        self.layout = layout
        self.keys = tuple(key(number) for number in range(num_blocks))
        self.cache = PagedStore(layout, seed=3)
        self.cache.allocate(self.OWNER, num_blocks * BLOCK)
        self.cache.fill(self.OWNER, num_blocks * BLOCK)
        self.client = StoreClient(store.address, SECRET, timeout_s=5.0)

    def make_offer(self, start: int = 0, stop: int | None = None, fidelity: int = 0) -> Offer:
        return Offer(ALICE, self.keys[start:stop], start, BLOCK, self.layout, fidelity)

    def offer(self, start: int = 0, stop: int | None = None, fidelity: int = 0) -> Granted | Declined:
        return self.client.offer(
            self.make_offer(start, stop, fidelity), sender_epoch=self.epoch, remaining_s=30.0
        )

    def push(
        self,
        granted: Granted,
        *,
        align_tokens: int | None = BLOCK,
        end_token: int | None = None,
        codec: str = "raw",
    ) -> PushSession:
        session = PushSession(
            channel=self.client.channel,
            lease=granted.lease,
            ttl_s=granted.ttl_s,
            remaining_s=30.0,
            cache=self.cache,
            layout=self.layout,
            chooser=FixedCodec(newest_codec(codec), "test"),
            owner=self.OWNER,
            start_token=granted.start_block * BLOCK,
            metadata=self.client.metadata,
            options=PushOptions(frame_bytes=4096, align_tokens=align_tokens),
        )
        session.advance(end_token or (granted.start_block + granted.num_blocks) * BLOCK)
        return session

    def write_back(self, start: int = 0, stop: int | None = None) -> CommitOutcome:
        granted = self.offer(start, stop)
        assert isinstance(granted, Granted), granted
        return self.commit(self.push(granted), granted)

    def commit(self, session: PushSession, granted: Granted) -> CommitOutcome:
        end = (granted.start_block + granted.num_blocks) * BLOCK
        handoff = transfer_pb.Handoff(num_tokens=end, layout=self.layout.identity(), handoff_major=1)
        return session.commit(handoff, 20.0)


class Reader:
    """A worker that fetches blocks into a cache of its own."""

    def __init__(self, store: StoreServer, layout: CacheLayout = GQA) -> None:
        self.layout = layout
        self.receiver = Receiver(layout)
        self.client = StoreClient(store.address, SECRET, timeout_s=5.0)
        self.fetched: dict[str, bytes] = {}

    def fetch(self, keys: tuple[bytes, ...], first_block: int = 0, fidelity: int = 0) -> FetchOutcome:
        grant = self.receiver.grant(
            (first_block + len(keys)) * BLOCK,
            start_token=first_block * BLOCK,
            request=secrets.token_hex(4),
            fidelity=fidelity,
        )
        found = self.client.lookup(keys, fidelity, shape_of(self.layout, BLOCK))
        request = FetchRequest(
            lease=LeaseRef(grant.lease_id, 1, found.epoch, self.receiver.epoch),
            keys=keys,
            first_block=first_block,
            block_tokens=BLOCK,
            layout=self.layout.identity(),
            dtypes=tuple(plane.dtypes for plane in self.layout.planes),
            fidelity=fidelity,
            codecs=tuple((codec.name, codec.version) for codec in CODECS),
        )
        session = FetchSession(
            channel=self.client.channel,
            request=request,
            target=FetchTarget(
                self.receiver.desk,
                self.receiver.lander,
                CacheSink(self.receiver.store, self.layout),
                self.receiver.credits,
                self.layout,
            ),
            on_fetched=lambda lease_id, num_blocks, rank: self.keep(lease_id, first_block, num_blocks),
            remaining_s=20.0,
            stall_s=5.0,
            metadata=self.client.metadata,
        )
        return session.run()

    def keep(self, lease_id: bytes, first_block: int, num_blocks: int) -> None:
        end = (first_block + num_blocks) * BLOCK
        self.fetched = self.receiver.store.read(lease_id, end, first_block * BLOCK)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., StoreServer]]:
    made: list[StoreServer] = []

    def make(*, disk: bool = True, host_bytes: int = 8 * MIB, **options: int) -> StoreServer:
        on_disk = DiskOptions(tmp_path / "kv", 64 * MIB) if disk else None
        config = StoreConfig(
            cluster_secret=SECRET,
            options=StoreOptions(host_bytes=host_bytes, disk=on_disk, **options),
            ttl_s=5.0,
        )
        server = StoreServer(config)
        server.start()
        assert server.wait_ready(10)
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[..., Writer | Reader]:
    def build(kind: type[Writer | Reader], *arguments: object) -> Writer | Reader:
        worker = kind(*arguments)  # type: ignore[arg-type]
        request.addfinalizer(worker.client.close)
        if isinstance(worker, Reader):
            request.addfinalizer(worker.receiver.close)
        return worker

    return build


def drain(server: StoreServer) -> None:
    assert server.store.write_back is not None
    assert server.store.write_back.drain(10)


def expect(writer: Writer, start: int, stop: int) -> dict[str, bytes]:
    """Canonical bytes of the writer's blocks [start, stop)."""
    return writer.cache.read(Writer.OWNER, stop * BLOCK, start * BLOCK)


@pytest.mark.parametrize("layout", [GQA, COARSE], ids=["gqa", "coarse"])
def test_what_is_written_back_is_fetched_byte_for_byte(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer], layout: CacheLayout
) -> None:
    server = make_server()
    writer, reader = make(Writer, server, 6, layout), make(Reader, server, layout)
    assert writer.write_back().is_committed
    outcome = reader.fetch(writer.keys)
    assert (outcome.num_blocks, outcome.fidelity, outcome.cause) == (6, 0, "")
    assert reader.fetched == expect(writer, 0, 6)
    found = writer.client.lookup(writer.keys, 0, shape_of(layout, BLOCK)).found
    assert [(run.tier, run.num_blocks) for run in found.tiers] == [("host", 6), ("disk", 0)]
    assert found.tiers[0].num_bytes == layout.num_bytes(6 * BLOCK)
    assert found.tiers[0].bytes_per_s > 0


def test_after_a_restart_the_same_blocks_come_from_disk(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    first = make_server()
    writer = make(Writer, first)
    writer.write_back()
    first.close()
    second = make_server()
    reader = make(Reader, second)
    assert reader.fetch(writer.keys).num_blocks == 6
    assert reader.fetched == expect(writer, 0, 6)
    stats = second.stats()
    assert (stats.disk_hits, stats.host_hits) == (6, 0)
    assert reader.fetch(writer.keys).num_blocks == 6  # they moved up
    assert second.stats().host_hits == 6
    # The blocks are let go when the stream has ended, which takes a moment.
    wait_until(lambda: {tier.num_pinned for tier in second.stats().tiers} == {0})


def test_a_run_ends_where_a_block_is_missing_and_may_begin_anywhere(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer, reader = make(Writer, server), make(Reader, server)
    writer.write_back(0, 4)
    assert reader.fetch(writer.keys[2:], first_block=2).num_blocks == 2
    assert reader.fetched == expect(writer, 2, 4)
    assert reader.fetch(writer.keys[4:], first_block=4).cause == "NO_BLOCKS"
    assert reader.receiver.table.num_held == 0


def test_only_what_is_missing_is_wanted(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer, reader = make(Writer, server), make(Reader, server)
    writer.write_back(0, 2)
    granted = writer.offer()
    assert isinstance(granted, Granted)
    assert (granted.start_block, granted.num_blocks) == (2, 4)
    assert writer.commit(writer.push(granted), granted).is_committed
    declined = writer.offer()
    assert isinstance(declined, Declined)
    assert declined.cause == "HELD"
    assert reader.fetch(writer.keys).num_blocks == 6
    assert reader.fetched == expect(writer, 0, 6)


def test_of_two_offers_of_the_same_blocks_one_is_wanted(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    one, other = make(Writer, server), make(Writer, server)
    granted = one.offer()
    assert isinstance(granted, Granted)
    declined = other.offer()
    assert isinstance(declined, Declined)
    assert declined.cause == "HELD"
    one.push(granted).abort("TEST")
    assert isinstance(other.offer(), Granted)
    assert server.stats().landing_bytes > 0


def test_the_same_offer_again_gets_the_same_lease(make_server: Callable[..., StoreServer]) -> None:
    server = make_server()
    offer = Offer(ALICE, (key(1),), 0, BLOCK, GQA, 0)
    client = StoreClient(server.address, SECRET)
    stub = pb_grpc.KvStoreStub(client.channel)
    request = offer_to_wire(offer, bytes(16), 7, 30.0)
    answers = [stub.Offer(request, timeout=5, metadata=client.metadata) for _ in range(2)]
    assert answers[0].lease_id == answers[1].lease_id != b""
    assert (answers[1].start_block, answers[1].num_blocks) == (0, 1)
    client.close()


def test_an_offer_gets_as_many_blocks_as_may_land_and_then_busy(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    block_bytes = GQA.num_bytes(BLOCK)
    server = make_server(landing_bytes=(64 << 10) + 3 * (block_bytes + block_bytes // 16))
    writer, other = make(Writer, server), make(Writer, server)
    granted = writer.offer()
    assert isinstance(granted, Granted)
    assert (granted.start_block, granted.num_blocks) == (0, 3)
    declined = other.offer(3)
    assert isinstance(declined, Declined)
    assert declined.cause == "BUSY"
    assert writer.commit(writer.push(granted), granted).is_committed
    rest = writer.offer()
    assert isinstance(rest, Granted)
    assert (rest.start_block, rest.num_blocks) == (3, 3)
    assert writer.commit(writer.push(rest), rest).is_committed
    assert server.stats().landing_bytes == 0


def test_a_lease_that_is_never_committed_leaves_nothing(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer = make(Writer, server)
    granted = writer.offer()
    assert isinstance(granted, Granted)
    session = writer.push(granted)
    assert not server.store.lookup(writer.keys, 0, shape_of(GQA, BLOCK)).num_blocks
    session.abort("TEST")
    stats = server.stats()
    assert (stats.landing_bytes, stats.num_leases, stats.tiers[0].num_records) == (0, 0, 0)


def test_pieces_that_cross_blocks_are_refused(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer = make(Writer, server, 4, COARSE)
    granted = writer.offer()
    assert isinstance(granted, Granted)
    session = writer.push(granted, align_tokens=None)
    wait_until(lambda: session.error is not None)
    assert session.error is not None
    assert session.error.cause == "BAD_PIECE"
    assert "cross key blocks" in session.error.message
    session.abort("TEST")


def test_blocks_are_kept_whole_or_not_at_all(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer, reader = make(Writer, server), make(Reader, server)
    for end, committed in ((6 * BLOCK - 16, False), (4 * BLOCK, True)):
        granted = writer.offer()
        assert isinstance(granted, Granted)
        session = writer.push(granted, end_token=end)
        handoff = transfer_pb.Handoff(num_tokens=end, layout=GQA.identity(), handoff_major=1)
        outcome = session.commit(handoff, 10.0)
        assert outcome.is_committed is committed
        assert committed or outcome.cause.startswith("PARTIAL_BLOCK")
        assert server.stats().landing_bytes == 0
    assert reader.fetch(writer.keys).num_blocks == 4


def test_lossy_blocks_are_kept_beside_exact_ones_and_served_within_the_bound(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer]
) -> None:
    server = make_server()
    writer, reader = make(Writer, server), make(Reader, server)
    exact_only = writer.offer()
    assert isinstance(exact_only, Granted)
    refused = writer.push(exact_only, codec="int8")
    handoff = transfer_pb.Handoff(num_tokens=6 * BLOCK, layout=GQA.identity(), handoff_major=1)
    with pytest.raises(TransferError, match="FIDELITY_EXCEEDED"):
        refused.commit(handoff, 10.0)
    refused.abort("TEST")
    granted = writer.offer(fidelity=1)
    assert isinstance(granted, Granted)
    assert writer.commit(writer.push(granted, codec="int8"), granted).is_committed
    assert reader.fetch(writer.keys).cause == "NO_BLOCKS"
    outcome = reader.fetch(writer.keys, fidelity=1)
    assert (outcome.num_blocks, outcome.fidelity) == (6, 1)
    assert writer.write_back().is_committed  # exact ones are still wanted
    assert reader.fetch(writer.keys, fidelity=1).fidelity == 0
    assert reader.fetched == expect(writer, 0, 6)


def test_a_layout_with_windows_is_not_kept(make_server: Callable[..., StoreServer]) -> None:
    client = StoreClient(make_server().address, SECRET)
    with pytest.raises(ValueError, match="window"):
        client.offer(Offer(ALICE, (key(1),), 0, BLOCK, MIXED, 0), sender_epoch=1, remaining_s=5.0)
    client.close()


def test_a_store_that_is_not_there_is_an_answer() -> None:
    now = [0.0]
    client = StoreClient("127.0.0.1:1", SECRET, timeout_s=0.3, retry_s=5.0, clock=lambda: now[0])
    offer = Offer(ALICE, (key(1),), 0, BLOCK, GQA, 0)
    first = client.offer(offer, sender_epoch=1, remaining_s=5.0)
    assert isinstance(first, Declined)
    assert first.cause == UNAVAILABLE
    assert "127.0.0.1:1" in first.message
    looked = client.lookup([key(1)], 0, shape_of(GQA, BLOCK))
    assert (looked.found.num_blocks, looked.unavailable) == (0, first.message)  # without asking again
    client.close()


def test_without_the_clusters_token_nothing_is_told(make_server: Callable[..., StoreServer]) -> None:
    server = make_server()
    client = StoreClient(server.address, b"another cluster's secret........", timeout_s=5.0)
    stub = pb_grpc.KvStoreStub(client.channel)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Stat(pb.StoreStatRequest(), timeout=5, metadata=client.metadata)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    client.close()


@pytest.mark.parametrize(
    "change",
    [
        {"offer_id": b"short"},
        {"tenant_label": b"short"},
        {"keys": [b"short"]},
        {"keys": []},
        {"fidelity": 3},
        {"remaining_s": float("nan")},
    ],
)
def test_a_malformed_offer_is_refused(
    make_server: Callable[..., StoreServer], change: dict[str, object]
) -> None:
    server = make_server(disk=False)
    client = StoreClient(server.address, SECRET)
    request = offer_to_wire(Offer(ALICE, (key(1),), 0, BLOCK, GQA, 0), bytes(16), 7, 30.0)
    for name, value in change.items():
        if isinstance(value, list):
            del getattr(request, name)[:]
            getattr(request, name).extend(value)
        else:
            setattr(request, name, value)
    with pytest.raises(grpc.RpcError) as refused:
        pb_grpc.KvStoreStub(client.channel).Offer(request, timeout=5, metadata=client.metadata)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    client.close()


def test_an_operator_sees_what_is_there(
    make_server: Callable[..., StoreServer], make: Callable[..., Writer], tmp_path: Path
) -> None:
    server = make_server()
    writer = make(Writer, server)
    writer.write_back()
    drain(server)
    stats = writer.client.stat()
    host, disk = stats.tiers
    assert (host.num_records, disk.num_records, disk.state) == (6, 6, "SERVING")
    assert host.tenants.keys() == disk.tenants.keys() == {ALICE}
    assert disk.used_bytes == sum(path.stat().st_blocks * 512 for path in (tmp_path / "kv").iterdir())
    entries = writer.client.entries()
    assert [(entry.tier, entry.num_records) for entry in entries] == [("host", 6), ("disk", 6)]
    assert list(writer.client.verify())[-1].done == 6
    (path,) = (tmp_path / "kv").glob("*.kv")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert list(writer.client.verify())[-1].bad == 1
    assert writer.client.stat().tiers[1].num_records == 5
    assert writer.client.gc().files == 0


def test_the_store_knows_every_codec_and_no_torch() -> None:
    assert {(codec.name, codec.version): codec.fidelity.rank for codec in CODECS} == CODEC_RANKS
    code = "import sys, kvtransfer.tiers.server, kvtransfer.tiers.offline; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
