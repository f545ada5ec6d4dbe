"""Cached blocks pulled from another worker into a lease of one's own, and the other end of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from kvtransfer.coverage import find_gap
from kvtransfer.frames import FrameRecord, LeaseRef
from kvtransfer.layouts import pieces_for
from kvtransfer.lease_types import Grant, Ready, RequestId
from tests.lease_world.content import BLOCK_TOKENS, FRAME_BYTES, LAYOUT, PROMPTS, keys_of, root_of
from tests.lease_world.sending import Upload

if TYPE_CHECKING:
    from tests.lease_world.worker import Event, Worker

TTL_S = 4.0
REMAINING_S = 10.0


@dataclass(eq=False, slots=True)
class Asked:
    """A fetch under way: its lease is the asker's own."""

    request: RequestId
    ref: LeaseRef
    start_token: int


@dataclass(eq=False, slots=True)
class Serving:
    """A fetch that is answered: its blocks are pinned until the asker has them or is gone."""

    owner: bytes
    ref: LeaseRef
    num_blocks: int
    upload: Upload
    give_up_at: float


class Fetch:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.asked: dict[bytes, Asked] = {}
        self.serving: list[Serving] = []
        self._numbers = count(1)

    def events(self) -> Iterator[Event]:
        now = self.worker.clock()
        for served in self.serving:
            upload = served.upload
            yield from upload.events()
            if upload.is_reading:
                continue
            if upload.error is not None or now >= served.give_up_at:
                yield "a fetch is not served on", partial(self._stop_serving, served)
            elif upload.ledger.is_settled:
                yield "a fetch is served", partial(self._served, served)

    # --- the asker -----------------------------------------------------------------------------

    def ask(self, request: RequestId, other: str, other_epoch: int) -> None:
        """Pull the request's prefix from another worker, into the cache here."""
        worker, prompt = self.worker, PROMPTS[request]
        name = RequestId(request.tenant, f"fetch {worker.incarnation} {next(self._numbers)}")
        keeper = worker.decode.keeper
        with keeper.desk.change() as table:
            granted = table.grant(name, 1, ttl_s=TTL_S, remaining_s=REMAINING_S, peer_epoch=other_epoch)
            assert isinstance(granted, Grant)
            worker.watch_lease("decode", granted.lease_id)
            cached = keeper.reserve(granted.lease_id, prompt, 1, root_of(request.tenant))
            if cached is None:
                keeper.release(granted.lease_id, "NO_CAPACITY")
                return
        ref = LeaseRef(granted.lease_id, 1, other_epoch, worker.epoch)
        self.asked[granted.lease_id] = Asked(request, ref, cached)
        first_block = cached // BLOCK_TOKENS
        worker.net.post(
            worker.name,
            other,
            "fetch",
            lambda peer: peer.fetch.serve(worker, ref, request, first_block),
        )

    def closed(self, ref: LeaseRef, manifest: dict[int, FrameRecord], num_blocks: int) -> None:
        """The other side's last word: what it served. The asker commits by itself, or ends its lease."""
        asked = self.asked.get(ref.lease_id)
        if asked is None or asked.ref != ref:
            return
        keeper, memory = self.worker.decode.keeper, self.worker.memory
        prompt, root = PROMPTS[asked.request], root_of(asked.request.tenant)
        self.forget(ref.lease_id)
        end = num_blocks * BLOCK_TOKENS
        with keeper.desk.change() as table:
            verdict = table.check_commit(ref, manifest)
            if isinstance(verdict, Ready) and not find_gap(LAYOUT, verdict.pieces, verdict.start_token, end):
                self.worker.check_own_bytes(ref.lease_id, range(verdict.start_token, end))
                memory.seal(ref.lease_id, prompt, root, end)
                self.worker.adopted.add(ref.lease_id)
                table.commit(ref.lease_id)
                self.worker.check()
            keeper.release(ref.lease_id, "FETCHED")

    def forget(self, lease_id: bytes) -> None:
        self.asked.pop(lease_id, None)

    # --- the other end -------------------------------------------------------------------------

    def serve(self, asker: Worker, ref: LeaseRef, request: RequestId, first_block: int) -> None:
        worker = self.worker
        if ref.sender_epoch != worker.epoch:
            return  # asked of another incarnation; the asker's lease runs out
        keys = keys_of(root_of(request.tenant), PROMPTS[request])[
            : (len(PROMPTS[request]) - 1) // BLOCK_TOKENS
        ]
        num_blocks = worker.memory.pool.lookup(keys)
        if num_blocks <= first_block:
            return
        owner = b"serving %d" % next(self._numbers)
        worker.memory.pin(owner, keys[:num_blocks])
        upload = Upload(worker, ref, asker.name, owner, PROMPTS[request], TTL_S)
        tokens = range(first_block * BLOCK_TOKENS, num_blocks * BLOCK_TOKENS)
        upload.add(pieces_for(LAYOUT, tokens, FRAME_BYTES))
        self.serving.append(Serving(owner, ref, num_blocks, upload, worker.clock() + REMAINING_S))

    def _served(self, served: Serving) -> None:
        manifest = served.upload.ledger.manifest()
        self.worker.net.post(
            self.worker.name,
            served.upload.to,
            "the end of a fetch",
            lambda asker: asker.fetch.closed(served.ref, manifest, served.num_blocks),
        )
        self._stop_serving(served)

    def _stop_serving(self, served: Serving) -> None:
        self.serving.remove(served)
        served.upload.hang_up()
        self.worker.memory.release(served.owner)
