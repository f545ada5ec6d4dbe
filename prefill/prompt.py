"""One prompt on its way through a prefill worker, and the messages made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import grpc

from engine.request import Drawn, SamplingParams
from headrace.v1 import kvtransfer_pb2, worker_pb2
from kvtransfer.codecs import Codec, Fidelity, newest_codec
from kvtransfer.frames import LeaseRef
from kvtransfer.transports.grpc_push import PushSession
from kvtransfer.transports.seam import HANDOFF_MAJOR, Pusher, PushStats
from worker.auth import cluster_metadata
from worker.facts import identity_digest
from worker.link import RouterLink
from worker.service import WorkerContext
from worker.wire import first_tokens_to_wire, sampling_params

LOSSLESS_CODEC = "raw"


class Phase(StrEnum):
    """Where a prompt is."""

    WAITING = "waiting"
    COMPUTING = "computing"
    HANDING_OVER = "handing over"


@dataclass(slots=True, eq=False)
class Prompt:
    """`message` is what the router asked for, `lease_id` the local lease. Times are of the loop's clock."""

    message: worker_pb2.StartPrefill
    link: RouterLink
    lease_id: bytes
    deadline: float
    codec: Codec
    push: Pusher
    sampling: SamplingParams = field(init=False)
    token_ids: Sequence[int] = field(init=False)
    generation: int = field(init=False)
    phase: Phase = Phase.WAITING
    cached_tokens: int = 0
    began: float | None = None
    """When the first chunk began."""
    drawn_at: float = 0.0
    """When the first token was drawn."""

    def __post_init__(self) -> None:
        """Take the prompt out of the message once."""
        self.sampling = sampling_params(self.message.task)
        self.token_ids = list(self.message.task.prompt_token_ids)
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


def choose_codec(name: str, *bounds: str) -> Codec:
    """The codec `name`, or the lossless one where a fidelity bound forbids it; "auto" is lossless for now.

    Raises UnknownCodec, or ValueError for a bound that is no fidelity class.
    """
    codec = newest_codec(LOSSLESS_CODEC if name == "auto" else name)
    if all(Fidelity(bound).allows(codec.fidelity) for bound in bounds if bound):
        return codec
    return newest_codec(LOSSLESS_CODEC)


def open_push(
    message: worker_pb2.StartPrefill,
    lease_id: bytes,
    codec: Codec,
    context: WorkerContext,
    channel: grpc.Channel,
) -> Pusher:
    """Begin to push into the decode worker's lease, behind the prefix that it holds.

    The push keeps that lease alive from now on, also while the prompt waits for room here.
    """
    lease = message.lease
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
        layout=context.engine.layout,
        codec=codec,
        owner=lease_id,
        start_token=lease.cached_tokens,
        metadata=cluster_metadata(context.config.cluster_secret),
        clock=context.clock,
    )


def handoff_record(prompt: Prompt, context: WorkerContext, first: Sequence[Drawn]) -> kvtransfer_pb2.Handoff:
    """What the decode worker must know to go on exactly here."""
    return kvtransfer_pb2.Handoff(
        key=prompt.key,
        num_tokens=len(prompt.token_ids),
        first_tokens=first_tokens_to_wire(first),
        codec=prompt.codec.name,
        handoff_major=HANDOFF_MAJOR,
        layout=context.engine.layout.identity(),
        penalty_boundary=len(prompt.token_ids),
        identity=identity_digest(context.identity),
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
        )
    )
