"""The KvStore calls: thin, what they answer is decided in store.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from headrace.v1 import kvstore_pb2 as pb
from headrace.v1 import kvstore_pb2_grpc as pb_grpc
from kvtransfer.lease_types import Refused, RequestId
from kvtransfer.tiers.wire import (
    check_fidelity,
    check_keys,
    entries_to_wire,
    found_to_wire,
    offer_from_wire,
    shape_from_wire,
    stats_to_wire,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtransfer.desk import LeaseDesk
    from kvtransfer.leases import LeaseTable
    from kvtransfer.tiers import receiving
    from kvtransfer.tiers.store import NodeStore

PROGRESS_EVERY = 64


class KvStoreService(pb_grpc.KvStoreServicer):
    """`epoch`: the store's incarnation. `ttl_s`: of the leases that offers are granted."""

    def __init__(self, store: NodeStore, desk: LeaseDesk, epoch: int, ttl_s: float) -> None:
        self._store = store
        self._desk = desk
        self._epoch = epoch
        self._ttl_s = ttl_s

    def Offer(self, request: pb.OfferRequest, context: grpc.ServicerContext) -> pb.OfferResponse:
        try:
            offer = offer_from_wire(request)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        with self._desk.change() as table:
            return self._consider(table, offer, request)

    def Lookup(self, request: pb.LookupRequest, context: grpc.ServicerContext) -> pb.LookupResponse:
        try:
            keys, shape = check_keys(request.keys), shape_from_wire(request)
            check_fidelity(request.fidelity)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return found_to_wire(self._store.lookup(keys, request.fidelity, shape), self._epoch)

    def Stat(self, request: pb.StoreStatRequest, context: grpc.ServicerContext) -> pb.StoreStatResponse:
        disk = self._store.options.disk
        return stats_to_wire(self._store.stats(), self._epoch, str(disk.directory) if disk else "")

    def List(self, request: pb.StoreListRequest, context: grpc.ServicerContext) -> Iterator[pb.StoreEntry]:
        yield from entries_to_wire(self._store.entries())

    def Verify(
        self, request: pb.StoreVerifyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StoreVerifyProgress]:
        for progress in self._store.verify():
            if not context.is_active():
                return
            if progress.done % PROGRESS_EVERY == 0 or progress.done == progress.total:
                yield pb.StoreVerifyProgress(
                    done=progress.done, total=progress.total, num_bytes=progress.num_bytes, bad=progress.bad
                )

    def Gc(self, request: pb.StoreGcRequest, context: grpc.ServicerContext) -> pb.StoreGcResponse:
        removed = self._store.gc()
        if removed is None:
            return pb.StoreGcResponse()
        return pb.StoreGcResponse(files=removed.files, file_bytes=removed.file_bytes)

    def _consider(
        self, table: LeaseTable, offer: receiving.Offer, request: pb.OfferRequest
    ) -> pb.OfferResponse:
        """Under the lock, so that of two offers of the same blocks one gets the lease."""
        owner = RequestId(offer.tenant.hex(), request.offer_id.hex())
        blocks = self._store.areas.find(owner)
        if blocks is None:
            verdict = self._store.consider(offer)
            if verdict.refused is not None:
                return self._refuse(verdict.refused, verdict.message)
            blocks = verdict.blocks
        grant = table.grant(
            owner,
            1,
            ttl_s=self._ttl_s,
            remaining_s=request.remaining_s,
            peer_epoch=request.sender_epoch,
            fidelity=offer.fidelity,
        )
        if isinstance(grant, Refused):
            return self._refuse(grant.refusal, grant.message)
        if not grant.repeated:
            self._store.areas.open(grant.lease_id, owner, offer, blocks)
            table.hold_prefix(grant.lease_id, blocks.start * offer.block_tokens)
        return pb.OfferResponse(
            lease_id=grant.lease_id,
            receiver_epoch=self._epoch,
            ttl_s=grant.ttl_s,
            start_block=blocks.start,
            num_blocks=len(blocks),
        )

    def _refuse(self, cause: str, message: str) -> pb.OfferResponse:
        return pb.OfferResponse(receiver_epoch=self._epoch, refused=cause, message=message)
