"""Spoiled frames, acknowledgements and fetch messages, as many as there is time for, against what reads them.

    python -m tests.fuzz.frames_fuzzer --frames 1000000 --seed 7

Frames go the whole way, `FrameLander.land` on a real cache. After each of them: an answer came and no exception;
memory is exactly what the frames that were acknowledged have written, and those were good by every rule, as this
module works them out by itself; nothing is left behind in the lease. Rounds of some hundred frames stand by
themselves: a failure names its seed and round, which `--round` runs again.
"""

from __future__ import annotations

import argparse
import logging
import random
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from engine.cache import PagedCache
from engine.models.layouts import gqa_layout
from engine.pool import BlockPool
from kvtransfer.cache_sink import CacheSink
from kvtransfer.codecs import CODECS, Codec, find_codec
from kvtransfer.desk import LeaseDesk
from kvtransfer.fetch_messages import BadFetchMessage, decode_closing, decode_request
from kvtransfer.frames import (
    Ack,
    AckFault,
    DamagedFrame,
    FrameHeader,
    LeaseRef,
    Opening,
    decode_ack,
    decode_frame,
    decode_opening,
    encode_ack,
    encode_frame,
    encode_opening,
)
from kvtransfer.landing import FrameLander
from kvtransfer.layouts import Piece
from kvtransfer.lease_types import Grant, Refusal, RequestId
from kvtransfer.leases import LeaseTable
from tests.fuzz.fetch_samples import good_closing, good_request
from tests.fuzz.mutations import join, seal_if_possible, split, spoil_bytes, spoil_map

LAYOUT = gqa_layout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="bfloat16", block_tokens=4)
NUM_BLOCKS = 16
NUM_TOKENS = 20  # of the lease that frames may land in
START_TOKEN = 4  # what it holds already
OUR_EPOCH, THEIR_EPOCH = 0xAAAA_BBBB_CCCC_DDDD, 0x1111_2222_3333_4444
FRAMES_PER_ROUND = 400
MAX_GROWTH_BYTES = 48 << 20
CAUSES = {cause.value for cause in (*AckFault, *Refusal)}


class Found(AssertionError):
    """A spoiled message had an effect. The message says which, and how to see it again."""


@dataclass(slots=True)
class Summary:
    num_messages: int = 0
    num_spoiled: int = 0
    """Frames that were refused."""
    causes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    growth_bytes: int = 0

    def text(self) -> str:
        rate = self.num_messages / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.num_messages} messages in {self.seconds:.1f} s ({rate:.0f}/s), {self.num_spoiled} refused, "
            f"resident memory grew by {self.growth_bytes / (1 << 20):.1f} MiB"
        ]
        lines += [f"  {number:9d}  {cause}" for cause, number in self.causes.most_common()]
        return "\n".join(lines)


class Receiver:
    """Leases on a small cache, and what its memory must be."""

    def __init__(self, rng: random.Random) -> None:
        self.pool = BlockPool(NUM_BLOCKS, LAYOUT.block_tokens)
        self.cache = PagedCache(LAYOUT, NUM_BLOCKS, torch.device("cpu"), self.pool.blocks)
        ids = count(1)
        self.table = LeaseTable(OUR_EPOCH, lambda: 0.0, lambda size: next(ids).to_bytes(size, "big"))
        self.desk = LeaseDesk(self.table, threading.RLock(), self._reclaim)
        self.lander = FrameLander(self.desk, CacheSink(self.cache, LAYOUT), LAYOUT, lambda: 0.0)
        self.bound = rng.choice((0, 2))
        self.open = self.grant("open", self.bound)
        self.neighbour = self.grant("neighbour", 2, committed=True)
        self.over = self.grant("over", 2)
        with self.desk.change() as table:
            table.abort(self.over, "TEST")
        self._fill(rng)
        self.expected = {name: _bytes_of(tensor).copy() for name, tensor in self.cache.planes.items()}

    def grant(self, request: str, bound: int, *, committed: bool = False) -> LeaseRef:
        with self.desk.change() as table:
            name = RequestId("tenant", request)
            granted = table.grant(
                name, 3, ttl_s=1.0, remaining_s=1.0, peer_epoch=THEIR_EPOCH, local=committed, fidelity=bound
            )
            assert isinstance(granted, Grant)
            self.pool.open(granted.lease_id, [], self.pool.blocks_for(NUM_TOKENS))
            table.hold_prefix(granted.lease_id, START_TOKEN)
        return LeaseRef(granted.lease_id, 3, THEIR_EPOCH, OUR_EPOCH)

    def check(self) -> None:
        """Memory is what was acknowledged, and no landing is open."""
        for name, tensor in self.cache.planes.items():
            if not np.array_equal(_bytes_of(tensor), self.expected[name]):
                raise Found(f"memory of plane {name!r} changed")
        lease = self.table.get(self.open.lease_id)
        if lease is None or lease.landing:
            raise Found("a landing was left open")

    def expect(self, header: FrameHeader, raw: bytes) -> None:
        """Note a good frame: its bytes, at its positions of its lease, and nowhere else."""
        piece, blocks = header.piece, self.pool.blocks(self.open.lease_id)
        record = LAYOUT.plane(piece.plane).record_bytes
        rows = iter(range(0, len(raw), record))
        for layer in piece.layers:
            for entry in piece.entries:
                slot = (
                    blocks[entry // LAYOUT.block_tokens] * LAYOUT.block_tokens + entry % LAYOUT.block_tokens
                )
                for head in piece.heads:
                    at = next(rows)
                    row = np.frombuffer(raw[at : at + record], np.uint8)
                    self.expected[piece.plane][layer, head, slot] = row

    def end(self) -> None:
        """Everything is given back, once."""
        with self.desk.change() as table:
            table.fence(1)
        stats = self.pool.stats()
        self.pool.check()
        if (stats.private, stats.owners, self.table.num_held) != (0, 0, 0):
            raise Found(f"left behind: {stats}, {self.table.num_held} leases")

    def _fill(self, rng: random.Random) -> None:
        """Canaries everywhere: numbers that no frame brings."""
        for tensor in self.cache.planes.values():
            raw = rng.randbytes(tensor.numel() * tensor.element_size())
            tensor.copy_(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape))

    def _reclaim(self, lease_ids: list[bytes]) -> None:
        for lease_id in lease_ids:
            self.pool.close(lease_id)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """[layers, heads, slots, bytes] of a plane, not copied."""
    return tensor.view(torch.uint8).numpy()


class Sender:
    """Good frames of every codec for the receiver's leases, to be spoiled."""

    def __init__(self, rng: random.Random, receiver: Receiver) -> None:
        self._rng = rng
        self._receiver = receiver
        self._numbers = count(1)

    def frame(self) -> bytes:
        """A frame that would land, or would but for its lease."""
        rng, receiver = self._rng, self._receiver
        ref = rng.choice((receiver.open,) * 6 + (receiver.neighbour, receiver.over))
        plane = rng.choice(LAYOUT.planes)
        first = rng.randrange(START_TOKEN, NUM_TOKENS)
        piece = Piece(
            plane.name,
            rng.choice((range(2), range(1), range(1, 2))),
            rng.choice((range(2), range(1))),
            range(first, rng.randrange(first + 1, NUM_TOKENS + 1)),
        )
        codec: Codec = rng.choice(CODECS)
        numbers = torch.tensor(
            [rng.gauss(0.0, 1.0) for _ in range(plane.num_bytes(piece) // 2)], dtype=torch.bfloat16
        )
        payload = codec.encode(numbers.view(torch.uint8), plane, piece)
        header = FrameHeader(
            ref, next(self._numbers), piece, codec.name, codec.version, plane.num_bytes(piece), plane.dtypes
        )
        return encode_frame(header, payload)[0]


def spoil_frame(rng: random.Random, frame: bytes) -> bytes:
    """The frame with something wrong; now and then it is good after all."""
    kind = rng.randrange(10)
    if kind < 2:
        return spoil_bytes(rng, frame)
    if kind < 4:
        return seal_if_possible(spoil_bytes(rng, frame))
    header, payload = split(frame)
    if rng.random() < 0.8:  # else most have landed already, with other bytes
        header["n"] = rng.getrandbits(32)
    if kind < 8:
        try:
            return join(spoil_map(rng, header), payload)
        except (ValueError, OverflowError):  # msgpack has no word for it
            return seal_if_possible(spoil_bytes(rng, frame))
    return join(header, spoil_bytes(rng, payload))


class Round:
    """Some hundred messages against one receiver; `seed` decides everything."""

    def __init__(self, seed: str, summary: Summary) -> None:
        self._rng = random.Random(seed)
        self._summary = summary
        self._receiver = Receiver(self._rng)
        self._sender = Sender(self._rng, self._receiver)

    def run(self) -> None:
        bases = [self._sender.frame() for _ in range(12)]
        for number in range(FRAMES_PER_ROUND):
            base = self._rng.choice(bases)
            message = spoil_frame(self._rng, base)
            self._try(number, message, lambda message=message: self._land(message))
            if number % 8 == 0:
                self._read_others(number)
        self._receiver.end()

    def _try(self, number: int, message: bytes, action: Callable[[], None]) -> None:
        self._summary.num_messages += 1
        try:
            action()
        except Found as found:
            raise Found(f"message {number}: {found}; it is {message[:4096].hex()}") from found
        except Exception as error:
            text = f"message {number}: {type(error).__name__} escaped: {error}; it is {message[:4096].hex()}"
            raise Found(text) from error

    def _land(self, message: bytes) -> None:
        receiver = self._receiver
        landed_before = self._landed()
        ack = receiver.lander.land(message)
        if ack.ok:
            header = self._good_header(message)
            if header.number not in landed_before:
                receiver.expect(header, self._raw(message))
            self._summary.causes["landed: good after all"] += 1
        else:
            if ack.cause not in CAUSES:
                raise Found(f"refused with cause {ack.cause!r}")
            if self._landed() != landed_before:
                raise Found("a refused frame counts as landed")
            self._summary.num_spoiled += 1
            self._summary.causes[ack.cause] += 1
            decode_ack(encode_ack(replace(ack, credit=1)))  # what is said of it can be said
        receiver.check()

    def _good_header(self, message: bytes) -> FrameHeader:
        """By every rule, or Found."""
        receiver, header = self._receiver, decode_frame(message).header
        piece, plane = header.piece, LAYOUT.plane(header.piece.plane)
        codec = find_codec(header.codec, header.codec_version)
        rules = {
            "lease, attempt and epochs": header.lease == receiver.open,
            "layers": 0 <= piece.layers.start < piece.layers.stop <= plane.layers,
            "heads": 0 <= piece.heads.start < piece.heads.stop <= plane.heads,
            "entries": START_TOKEN <= piece.entries.start < piece.entries.stop <= NUM_TOKENS,
            "fidelity": max(header.fidelity, codec.fidelity.rank) <= receiver.bound,
            "length": header.raw_bytes == plane.with_dtypes(header.dtypes).num_bytes(piece),
        }
        broken = [name for name, holds in rules.items() if not holds]
        if broken:
            raise Found(f"landed with wrong {', '.join(broken)}: {header}")
        return header

    def _raw(self, message: bytes) -> bytes:
        frame = decode_frame(message)
        header = frame.header
        plane = LAYOUT.plane(header.piece.plane)
        wire = plane.with_dtypes(header.dtypes)
        raw = find_codec(header.codec, header.codec_version).decode(frame.payload, wire, header.piece)
        numbers = torch.frombuffer(bytearray(raw.numpy().tobytes()), dtype=getattr(torch, header.dtypes[0]))
        stored = numbers if header.dtypes == plane.dtypes else numbers.to(torch.bfloat16)
        return stored.view(torch.uint8).numpy().tobytes()

    def _landed(self) -> set[int]:
        lease = self._receiver.table.get(self._receiver.open.lease_id)
        return set() if lease is None else set(lease.landed)

    def _read_others(self, number: int) -> None:
        """Messages that are only read: an error of the one kind that their readers know, or none."""
        rng = self._rng
        good, read, error = rng.choice(
            (
                (encode_ack(Ack(5, ok=False, cause="X", message="why", credit=7)), decode_ack, DamagedFrame),
                (encode_opening(Opening(9, ({"kind": "shm", "slots": 3},))), decode_opening, DamagedFrame),
                (good_request(rng), decode_request, BadFetchMessage),
                (good_closing(rng), decode_closing, BadFetchMessage),
            )
        )
        message = spoil_bytes(rng, good)
        if good[:2] == b"HR" and rng.random() < 0.8:
            message = seal_if_possible(message)

        def action() -> None:
            try:
                read(message)
            except error as refused:
                self._summary.causes[type(refused).__name__ + " of other messages"] += 1

        self._try(number, message, action)


def run(num_frames: int, seed: int, *, progress: bool = False) -> Summary:
    """Until so many spoiled frames were refused. Raises Found."""
    logging.getLogger("kvtransfer.landing").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    summary, began = Summary(), time.monotonic()
    resident = 0
    for number in count():
        if summary.num_spoiled >= num_frames:
            break
        run_round(seed, number, summary)
        if number == 20:
            resident = _resident_bytes()  # everything that is made once has been made
        if progress and number % 250 == 249:
            rate = summary.num_messages / (time.monotonic() - began)
            print(f"{summary.num_spoiled} refused, {rate:.0f} messages/s", flush=True)  # noqa: T201
    summary.seconds = time.monotonic() - began
    summary.growth_bytes = max(0, _resident_bytes() - resident) if resident else 0
    if summary.growth_bytes > MAX_GROWTH_BYTES:
        raise Found(f"seed {seed}: resident memory grew by {summary.growth_bytes >> 20} MiB")
    return summary


def run_round(seed: int, number: int, summary: Summary) -> None:
    try:
        Round(f"{seed}:{number}", summary).run()
    except Found as found:
        raise Found(f"--seed {seed} --round {number}: {found}") from found


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000, help="spoiled frames to be refused")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--round", type=int, default=None, help="only this round")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)  # noqa: T201
    if options.round is not None:
        run_round(seed, options.round, Summary())
        return 0
    print(run(options.frames, seed, progress=True).text())  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
