"""A worker's or an operator's way to a store. A store that does not answer is an answer, too: nobody depends on it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc

from headrace.v1 import kvstore_pb2 as pb
from headrace.v1 import kvstore_pb2_grpc as pb_grpc
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.frames import LeaseRef
from kvtransfer.tiers.disk_types import Removed
from kvtransfer.tiers.store_types import Found, VerifyProgress
from kvtransfer.tiers.wire import (
    OFFER_ID_BYTES,
    entry_from_wire,
    found_from_wire,
    offer_to_wire,
    stats_from_wire,
)
from kvtransfer.transports.grpc_channel import open_bulk_channel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.tiers.receiving import Offer
    from kvtransfer.tiers.records import Shape
    from kvtransfer.tiers.store_types import Entry, StoreStats

UNAVAILABLE = "UNAVAILABLE"

_T = TypeVar("_T")


class StoreUnavailable(Exception):
    """An operator's question that the store did not answer. Workers' calls do not raise it."""


@dataclass(frozen=True, slots=True)
class Granted:
    """Push blocks [start_block, start_block + num_blocks) of the sequence, and commit them: Handoff.num_tokens is
    their end. `lease`: with both epochs."""

    lease: LeaseRef
    ttl_s: float
    start_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Declined:
    """The store takes nothing now. `cause`: a NotWanted, a Refusal, or UNAVAILABLE."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class LookedUp:
    """`epoch`: of the store, as the sender epoch of a fetch's lease. `unavailable`: why nothing could be asked;
    the rest is empty then."""

    epoch: int
    found: Found
    unavailable: str = ""


class StoreClient:
    """Safe to call from several threads. `channel` is also for PushSession and FetchSession, with `metadata`.

    `timeout_s`: of `offer` and `lookup`. After one that found nobody there, the next ones are answered at once for
    `retry_s`.
    """

    def __init__(
        self,
        address: str,
        cluster_secret: bytes,
        *,
        timeout_s: float = 0.5,
        retry_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.channel = open_bulk_channel(address)
        self.metadata = cluster_metadata(cluster_secret)
        self._stub = pb_grpc.KvStoreStub(self.channel)
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._down_until = 0.0
        self._down_reason = ""

    def close(self) -> None:
        """Idempotent."""
        self.channel.close()

    def offer(self, offer: Offer, *, sender_epoch: int, remaining_s: float) -> Granted | Declined:
        """Asks what of these blocks to push. Raises ValueError for an offer that no store takes."""
        request = offer_to_wire(offer, os.urandom(OFFER_ID_BYTES), sender_epoch, remaining_s)
        down = self._why_down()
        if down:
            return Declined(UNAVAILABLE, down)
        try:
            answer = self._stub.Offer(
                request, timeout=min(self._timeout_s, remaining_s), metadata=self.metadata
            )
        except grpc.RpcError as error:
            return Declined(UNAVAILABLE, self._note_failure(error))
        if not answer.lease_id:
            return Declined(answer.refused, answer.message)
        lease = LeaseRef(answer.lease_id, 1, sender_epoch, answer.receiver_epoch)
        return Granted(lease, answer.ttl_s, answer.start_block, answer.num_blocks)

    def lookup(self, keys: Sequence[bytes], fidelity: int, shape: Shape) -> LookedUp:
        """How long a leading run of the keys is held, for a reader with `shape` and a fidelity bound (a rank)."""
        nothing = Found(0, 0, ())
        down = self._why_down()
        if down or not keys:
            return LookedUp(0, nothing, down)
        request = pb.LookupRequest(
            keys=keys,
            fidelity=fidelity,
            layout=shape.layout,
            block_tokens=shape.block_tokens,
            dtypes=[pb.StoreDtypes(fields=fields) for fields in shape.dtypes],
        )
        try:
            answer = self._stub.Lookup(request, timeout=self._timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            return LookedUp(0, nothing, self._note_failure(error))
        return LookedUp(answer.epoch, found_from_wire(answer))

    # ---- an operator's questions; these raise StoreUnavailable

    def stat(self, timeout_s: float = 5.0) -> StoreStats:
        """All figures."""
        return stats_from_wire(
            self._ask(
                lambda: self._stub.Stat(pb.StoreStatRequest(), timeout=timeout_s, metadata=self.metadata)
            )
        )

    def entries(self, timeout_s: float = 30.0) -> list[Entry]:
        """What is held: a line a segment, and for memory a line a tenant, layout and fidelity."""
        return self._ask(
            lambda: [
                entry_from_wire(entry)
                for entry in self._stub.List(pb.StoreListRequest(), timeout=timeout_s, metadata=self.metadata)
            ]
        )

    def verify(self, timeout_s: float = 3600.0) -> Iterator[VerifyProgress]:
        """Reads every record on disk; the last is the outcome."""
        try:
            for said in self._stub.Verify(pb.StoreVerifyRequest(), timeout=timeout_s, metadata=self.metadata):
                yield VerifyProgress(said.done, said.total, said.num_bytes, said.bad)
        except grpc.RpcError as error:
            raise StoreUnavailable(self._text(error)) from error

    def gc(self, timeout_s: float = 60.0) -> Removed:
        """Removes files that are of no use to the store."""
        answer = self._ask(
            lambda: self._stub.Gc(pb.StoreGcRequest(), timeout=timeout_s, metadata=self.metadata)
        )
        return Removed(answer.files, answer.file_bytes)

    def _ask(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except grpc.RpcError as error:
            raise StoreUnavailable(self._text(error)) from error

    def _why_down(self) -> str:
        with self._lock:
            return self._down_reason if self._clock() < self._down_until else ""

    def _note_failure(self, error: grpc.RpcError) -> str:
        text = self._text(error)
        with self._lock:
            self._down_until = self._clock() + self._retry_s
            self._down_reason = text
        return text

    def _text(self, error: grpc.RpcError) -> str:
        return f"the store at {self.address} does not answer: {error.code().name}: {error.details()}"
