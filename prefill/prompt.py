"""One prompt on its way through a prefill worker, and the messages made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import islice

import grpc

from engine.drafter import Drafter
from engine.request import Drawn, SamplingParams
from engine.resumption import SoFar
from headrace.v1 import kvtransfer_pb2, worker_pb2
from kvtransfer.cluster_token import cluster_metadata
from kvtransfer.codecs import Fidelity
from kvtransfer.frames import LeaseRef
from kvtransfer.layouts import CacheLayout
from kvtransfer.transports.grpc_push import PushSession
from kvtransfer.transports.push_books import PushOptions
from kvtransfer.transports.seam import HANDOFF_MAJOR, Pusher, PushStats
from worker.facts import identity_digest
from worker.link import RouterLink
from worker.prefixes import Brought, PrefixFetch
from worker.service import WorkerContext
from worker.wire import drafting_to_wire, first_tokens_to_wire, sampling_params


class Phase(StrEnum):
    """Where a prompt is."""

    FETCHING = "fetching"
    WAITING = "waiting"
    COMPUTING = "computing"
    HANDING_OVER = "handing over"


@dataclass(slots=True, eq=False)
class Prompt:
    """`message` is what the router asked for, `lease_id` the local lease, `bound` the worst fidelity rank that it
    takes; `token_ids` are the prompt, and of an answer that goes on what its choices share. Times are of the loop's
    clock."""

    message: worker_pb2.StartPrefill
    link: RouterLink
    lease_id: bytes
    deadline: float
    bound: int
    push: Pusher
    so_far: SoFar
    token_ids: Sequence[int]
    sampling: SamplingParams = field(init=False)
    generation: int = field(init=False)
    phase: Phase = Phase.WAITING
    fetch: PrefixFetch | None = None
    brought: Brought = field(default_factory=Brought)
    cached_tokens: int = 0
    began: float | None = None
    """When the first chunk began."""
    drawn_at: float = 0.0
    """When the first token was drawn."""

    def __post_init__(self) -> None:
        """Take the prompt out of the message once."""
        self.sampling = sampling_params(self.message.task)
        self.generation = self.link.generation

    @property
    def key(self) -> worker_pb2.RequestKey:
        """The attempt."""
        return self.message.key

    @property
    def peer(self) -> tuple[str, int]:
        """Address and epoch of the decode worker."""
        return peer_of(self.message)

    def hear(self, link: RouterLink) -> None:
        """The router spoke of this prompt."""
        self.link = link
        self.generation = link.generation


def peer_of(message: worker_pb2.StartPrefill) -> tuple[str, int]:
    """Address and epoch of the decode worker."""
    return message.lease.kv_address, message.lease.decode_epoch


class CannotConvert(ValueError):
    """The two workers store KV in dtypes that the request's fidelity does not let into each other."""


def wire_layout(layout: CacheLayout, kv_dtypes: Sequence[str], bound: int) -> CacheLayout:
    """The layout in the dtypes that travel: field by field the narrower of ours and the receiver's `kv_dtypes`.

    An empty `kv_dtypes` says nothing of the receiver. Raises CannotConvert.
    """
    if not kv_dtypes:
        return layout
    ours = [dtype for fields in layout.dtypes for dtype in fields]
    both = f"KV is {', '.join(ours)} here and {', '.join(kv_dtypes)} there"
    flat = iter(kv_dtypes)
    try:
        wire = layout.narrowed([list(islice(flat, len(plane.fields))) for plane in layout.planes])
    except ValueError as error:
        raise CannotConvert(both) from error
    if len(ours) != len(kv_dtypes):
        raise CannotConvert(both)
    if ours != list(kv_dtypes) and bound < Fidelity.NEAR.rank:
        raise CannotConvert(f"{both}, which takes fidelity near; give both sections of workers one kv_dtype")
    return wire


def open_push(
    message: worker_pb2.StartPrefill,
    lease_id: bytes,
    num_tokens: int,
    bound: int,
    context: WorkerContext,
    channel: grpc.Channel,
) -> Pusher:
    """Begin to push `num_tokens` tokens into the decode worker's lease, behind the prefix that it holds.

    The push keeps that lease alive from now on, also while the prompt waits for room here. Raises CannotConvert.
    """
    lease, kv, layout = message.lease, context.kv, context.engine.layout
    wire = wire_layout(layout, lease.kv_dtypes, bound)
    missing_tokens = num_tokens - lease.cached_tokens
    return PushSession(
        channel=channel,
        lease=LeaseRef(
            lease_id=lease.lease_id,
            attempt=message.key.attempt,
            sender_epoch=context.epoch,
            receiver_epoch=lease.decode_epoch,
        ),
        ttl_s=lease.ttl_s,
        remaining_s=message.remaining_s,
        cache=context.engine.cache,
        layout=layout,
        wire=wire,
        chooser=kv.choosers.chooser_for(
            context.config.codec,
            (list(Fidelity)[bound],),
            peer=peer_of(message),
            layout=wire,
            total_bytes=wire.num_bytes(missing_tokens),
            shares_memory=kv.sending_carriers.shares_memory(lease.kv_address),
        ),
        owner=lease_id,
        start_token=lease.cached_tokens,
        metadata=(*cluster_metadata(context.config.cluster_secret), *kv.sending_carriers.metadata()),
        open_writer=partial(kv.sending_carriers.open_writer, address=lease.kv_address),
        options=PushOptions(frame_bytes=kv.sending_carriers.frame_bytes(lease.kv_address)),
        clock=context.clock,
    )


def handoff_record(prompt: Prompt, context: WorkerContext, first: Sequence[Drawn]) -> kvtransfer_pb2.Handoff:
    """What the decode worker must know to go on exactly here."""
    stats = prompt.push.stats()
    return kvtransfer_pb2.Handoff(
        key=prompt.key,
        num_tokens=len(prompt.token_ids),
        first_tokens=first_tokens_to_wire(first),
        codec=stats.codec,
        codec_reason=stats.reason,
        handoff_major=HANDOFF_MAJOR,
        layout=context.engine.layout.identity(),
        penalty_boundary=len(prompt.token_ids) - prompt.so_far.num_shared,
        identity=identity_digest(context.identity),
        drafting=drafting_to_wire(Drafter(prompt.token_ids).state),
    )


def prefill_finished(prompt: Prompt, stats: PushStats, now: float) -> worker_pb2.WorkerMessage:
    """The word to the router once the commit is acknowledged."""
    began = prompt.drawn_at if prompt.began is None else prompt.began
    return worker_pb2.WorkerMessage(
        prefill_finished=worker_pb2.PrefillFinished(
            key=prompt.key,
            prefill_s=prompt.drawn_at - began,
            transfer_s=stats.transfer_s,
            handoff_s=now - prompt.drawn_at,
            cached_tokens=prompt.cached_tokens,
            computed_tokens=len(prompt.token_ids) - prompt.cached_tokens,
            transferred_tokens=stats.num_tokens,
            kv_bytes=stats.kv_bytes,
            wire_bytes=stats.wire_bytes,
            frame_s=stats.frame_s,
            fetched_tokens=min(prompt.brought.num_tokens, prompt.cached_tokens),
            fetched_from=prompt.brought.source,
            fetch_s=prompt.brought.fetch_s,
            codec=stats.codec,
            codec_reason=stats.reason,
        )
    )
