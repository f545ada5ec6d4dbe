"""One request on a decode worker, what its handoff must say, and the messages made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from decode.answers import Answer
from decode.direct import BulkPace, DirectReader
from engine.request import SamplingParams
from engine.resumption import SoFar
from headrace.v1 import kvtransfer_pb2, worker_pb2
from kvtransfer.transports.seam import HandoffRefused
from worker.facts import identity_digest
from worker.link import RouterLink
from worker.prefixes import Brought, PrefixFetch
from worker.service import WorkerContext
from worker.wire import drafting_from_wire


@dataclass(slots=True, eq=False)
class Request:
    """A lease and an answer. `head`: what is computed first, the prompt, and of an answer that goes on what its choices
    share; `bound`: the worst fidelity rank that it takes. Times are of the loop's clock."""

    key: worker_pb2.RequestKey
    link: RouterLink
    lease_id: bytes
    bound: int
    head: Sequence[int]
    so_far: SoFar
    sampling: SamplingParams
    answer: Answer
    local_prefill: bool
    deadline: float
    generation: int = field(init=False)
    fetch: PrefixFetch | None = None
    brought: Brought = field(default_factory=Brought)
    cached_tokens: int | None = None
    """Of the head, what its blocks held when it got them; None until then."""
    began: float = 0.0
    """When it got its blocks."""
    decoding: bool = False
    control: list[worker_pb2.WorkerMessage] = field(default_factory=list)
    """Sent already; sent again when the router asks again."""
    readers: list[DirectReader] = field(default_factory=list)
    """Clients that read the answer here."""
    pace: BulkPace = field(default_factory=BulkPace)

    def __post_init__(self) -> None:
        """It was heard of now."""
        self.generation = self.link.generation

    @property
    def num_prompt(self) -> int:
        """Tokens before the answer."""
        return len(self.head) - self.so_far.num_shared

    @property
    def stage(self) -> str:
        """Where it is, in the words of a failure."""
        if self.decoding:
            return "decode"
        if self.cached_tokens is None:
            return "reserve"
        return "prefill" if self.local_prefill else "transfer"

    def hear(self, link: RouterLink) -> None:
        """The router spoke of this request."""
        self.link = link
        self.generation = link.generation

    def become(self, key: worker_pb2.RequestKey) -> None:
        """Go on as another attempt; what was said of this one is not said again."""
        self.key = self.answer.key = key
        self.control.clear()

    def deliver(self, step_s: float, now: float) -> None:
        """The answer has grown: readers get it at once, the router too unless they do."""
        if not self.readers:
            self.link.mark(self.answer, step_s)
            return
        for reader in tuple(self.readers):
            reader.push()
        if self.answer.finished or self.pace.is_due(now):
            self.link.mark(self.answer, step_s)

    def hang_up(self, cause: str, message: str) -> None:
        """End the streams of all readers."""
        for reader in tuple(self.readers):
            reader.give_up(cause, message)

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """To its router, and again when the router asks again."""
        self.control.append(message)
        self.link.send(message)


def check_handoff(request: Request, handoff: kvtransfer_pb2.Handoff, context: WorkerContext) -> None:
    """Raises HandoffRefused where a record is not of the request, or of another kind of worker."""
    if handoff.identity != identity_digest(context.identity):
        text = "weights, tokenizer, arithmetic or layout of the two workers differ"
        raise HandoffRefused("IDENTITY_MISMATCH", text)
    facts = (
        ("request", handoff.key, request.key),
        ("number of tokens", handoff.num_tokens, len(request.head)),
        ("number of first tokens", len(handoff.first_tokens), request.sampling.n),
        ("penalty boundary", handoff.penalty_boundary, request.num_prompt),
    )
    for name, given, expected in facts:
        if given != expected:
            raise HandoffRefused("HANDOFF_MISMATCH", f"the handoff's {name} is not the lease's")
    drafting = drafting_from_wire(handoff)
    if drafting is not None:
        try:
            drafting.check(handoff.num_tokens)
        except ValueError as error:
            raise HandoffRefused("HANDOFF_MISMATCH", str(error)) from error


def reserved(request: Request, context: WorkerContext) -> worker_pb2.WorkerMessage:
    """The word to the router once a request has blocks."""
    return worker_pb2.WorkerMessage(
        reserved=worker_pb2.Reserved(
            key=request.key,
            lease_id=request.lease_id,
            decode_epoch=context.epoch,
            kv_address=context.kv_address,
            cached_tokens=request.cached_tokens,
            ttl_s=context.leases.ttl_s,
            kv_dtypes=chain.from_iterable(context.engine.layout.dtypes),
        )
    )


def direct_state(
    key: worker_pb2.RequestKey, ticket_id: bytes, phase: worker_pb2.DirectPhase
) -> worker_pb2.WorkerMessage:
    """The word to the router of a client that reads here, or has gone."""
    return worker_pb2.WorkerMessage(direct=worker_pb2.DirectState(key=key, ticket_id=ticket_id, phase=phase))


def prefilled_here(request: Request, now: float) -> worker_pb2.WorkerMessage:
    """The word to the router once a prompt has been computed on this worker."""
    cached = request.cached_tokens or 0
    return worker_pb2.WorkerMessage(
        prefill_finished=worker_pb2.PrefillFinished(
            key=request.key,
            prefill_s=now - request.began,
            cached_tokens=cached,
            computed_tokens=len(request.head) - cached,
            fetched_tokens=min(request.brought.num_tokens, cached),
            fetched_from=request.brought.source,
            fetch_s=request.brought.fetch_s,
        )
    )
