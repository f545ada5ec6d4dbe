"""`auto` on real pushes through a relay whose speed can be changed: what it chose, and that every byte is right."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from statistics import mode
from typing import TYPE_CHECKING

import pytest
import torch

from kvtransfer.choosers import CodecChoosers
from kvtransfer.codec_speed import SpeedBook
from kvtransfer.codecs import CODECS, Fidelity, newest_codec
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane
from kvtransfer.transports.grpc_push import PushOptions
from tests.integration.kvtransfer_harness import Peer, Receiver, Sender

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvtransfer.choice import CodecChoice, CodecChooser
    from kvtransfer.codecs import Codec
    from kvtransfer.lease_types import Grant
    from kvtransfer.transports.grpc_push import PushSession
    from kvtransfer.transports.seam import PushStats

pytestmark = pytest.mark.integration

NUM_TOKENS = 8192
PART = 2048  # tokens, 4 MiB
SLOW = 3e6  # bytes per second
FAST = float("inf")
SMOOTH = CacheLayout(
    tuple(Plane(name, 4, Paged(1), 2, (Field(name, 64, "bfloat16"),)) for name in ("k", "v")),
    block_tokens=128,
)
OPTIONS = PushOptions(frame_bytes=128 << 10, window_bytes=512 << 10)
RECV_BYTES = 64 << 10
ENCODE = 8e6  # bytes per second: far from what either link carries, on a busy machine too


class Relay:
    """Passes TCP connections on to `address`, what the caller sends at no more than `bytes_per_s`."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.bytes_per_s = FAST
        self._target = (host, int(port))
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        # What buffers hold is on its way already when the speed changes.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECV_BYTES)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
                callee = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [caller, callee]
            for end in (caller, callee):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((caller, callee, True), (callee, caller, False)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        free_at = 0.0
        try:
            while data := source.recv(RECV_BYTES):
                sink.sendall(data)
                if limited and self.bytes_per_s != FAST:
                    now = time.monotonic()
                    free_at = max(free_at, now) + len(data) / self.bytes_per_s
                    time.sleep(free_at - now)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


class Slow:
    """A codec whose encoder is slow, so that a fast link is not worth it wherever the test runs."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name, self.version, self.fidelity = codec.name, codec.version, codec.fidelity

    def encode(self, raw: torch.Tensor, plane: Plane, piece: Piece) -> Buffer:
        time.sleep(raw.numel() / ENCODE)
        return self._codec.encode(raw, plane, piece)

    def decode(self, payload: Buffer, plane: Plane, piece: Piece) -> torch.Tensor:
        return self._codec.decode(payload, plane, piece)


class Recording:
    """A chooser that writes down what it chose."""

    def __init__(self, chooser: CodecChooser) -> None:
        self._chooser = chooser
        self.choices: list[CodecChoice] = []
        self.note_encoded = chooser.note_encoded
        self.note_landed = chooser.note_landed

    def choose(self, bytes_left: int) -> CodecChoice:
        choice = self._chooser.choose(bytes_left)
        self.choices.append(choice)
        return choice

    def settled(self, num_parts: int) -> list[str]:
        """By part the codec that most frames of its second half took. The last frames do not count: what is left
        then is so little that it hardly matters."""
        num_frames = len(self.choices) // num_parts
        names = [choice.codec.name for choice in self.choices]
        starts = range(0, num_parts * num_frames, num_frames)
        return [mode(names[start + num_frames // 2 : start + num_frames - 4]) for start in starts]


class Pair:
    """A sender and a receiver with a relay in between."""

    def __init__(self) -> None:
        self.receiver = Receiver(SMOOTH)
        self.relay = Relay(self.receiver.address)
        peer = Peer(self.relay.address, self.receiver.epoch)
        self.sender = Sender(peer, NUM_TOKENS, SMOOTH)
        self._fill_smoothly()
        self.choosers = CodecChoosers(SpeedBook(time.monotonic), lambda: 0.0, time.monotonic, exact_codecs())
        self.choosers.probe(SMOOTH)
        self.chooser = Recording(
            self.choosers.chooser_for("auto", ["exact"], peer=(peer.address, peer.epoch), layout=SMOOTH)
        )

    def close(self) -> None:
        self.sender.close()
        self.relay.close()
        self.receiver.close()

    def push(self, *speeds: float) -> PushStats:
        """As many parts as there are speeds, each at its speed; commits, and checks every byte."""
        num_tokens = len(speeds) * PART
        grant = self.receiver.grant(NUM_TOKENS)
        session = self.sender.session(grant, chooser=self.chooser, options=OPTIONS)
        for number, speed in enumerate(speeds, 1):
            self.relay.bytes_per_s = speed
            session.advance(number * PART)
            self._await_landed(grant, session, number)
        assert session.commit(self.sender.handoff(num_tokens), 30.0).is_committed
        sent = self.sender.store.read(self.sender.OWNER, num_tokens)
        assert self.receiver.store.read(grant.lease_id, num_tokens) == sent
        return session.stats()

    def _await_landed(self, grant: Grant, session: PushSession, num_parts: int) -> None:
        give_up_at = time.monotonic() + 30
        while self._landed_bytes(grant) < SMOOTH.num_bytes(num_parts * PART):
            assert session.error is None
            assert time.monotonic() < give_up_at, "the part did not land"
            time.sleep(0.005)

    def _landed_bytes(self, grant: Grant) -> int:
        with self.receiver.lock:
            landed = list(self.receiver.lease(grant).landed.values())
        return sum(record.raw_bytes for record, _ in landed)

    def _fill_smoothly(self) -> None:
        random = torch.Generator().manual_seed(5)
        for plane in SMOOTH.planes:
            shape = (plane.layers, NUM_TOKENS, plane.heads, plane.fields[0].width)
            numbers = torch.randn(shape, generator=random).to(torch.bfloat16)
            piece = Piece(plane.name, range(plane.layers), range(plane.heads), range(NUM_TOKENS))
            raw = numbers.view(torch.uint8).reshape(-1)
            self.sender.store.scatter(self.sender.OWNER, piece, plane, raw)


def exact_codecs() -> tuple[Codec, ...]:
    """Raw as it is, and every other exact codec with a slow encoder."""
    names = dict.fromkeys(codec.name for codec in CODECS if codec.fidelity is Fidelity.EXACT)
    newest = [newest_codec(name) for name in names]
    return tuple(codec if codec.name == "raw" else Slow(codec) for codec in newest)


@pytest.fixture
def pair() -> Iterator[Pair]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other, when other tests run beside this one
    pair = Pair()
    yield pair
    pair.close()
    torch.set_num_threads(num_threads)


def test_a_slow_link_gets_the_compressing_codec_and_the_push_says_why(pair: Pair) -> None:
    stats = pair.push(SLOW)
    assert pair.chooser.settled(1) == [stats.codec]
    assert stats.codec not in ("", "raw")
    assert stats.wire_bytes < 0.85 * stats.kv_bytes
    assert stats.reason.startswith(f"{stats.codec}: ")
    assert "predicted over" in stats.reason
    assert ", raw " in stats.reason


def test_a_fast_link_gets_raw(pair: Pair) -> None:
    stats = pair.push(FAST)
    assert pair.chooser.settled(1) == ["raw"]
    assert stats.codec == "raw"
    assert all(choice.reason for choice in pair.chooser.choices)


def test_a_link_that_slows_down_and_recovers_in_mid_transfer_changes_the_codec_and_back(pair: Pair) -> None:
    pair.push(FAST, SLOW, FAST)
    first, second, third = pair.chooser.settled(3)
    assert first == third == "raw"
    assert second != "raw"


def test_what_one_transfer_learned_of_a_link_the_next_one_begins_with(pair: Pair) -> None:
    pair.push(SLOW)
    peer = (pair.relay.address, pair.receiver.epoch)
    again = pair.choosers.chooser_for("auto", [], peer=peer, layout=SMOOTH)
    choice = again.choose(SMOOTH.num_bytes(NUM_TOKENS))
    assert choice.codec.name != "raw"
    assert "predicted over" in choice.reason
