"""A worker's prefill role: prompts computed chunk by chunk, layer by layer, and pushed while they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvtransfer.frames import LeaseRef
from kvtransfer.lease_types import LeaseState, Outcome, Refused, RequestId, Waiting
from kvtransfer.ledger import FrameRefused
from kvtransfer.progress import PushProgress
from tests.lease_world.content import FRAME_BYTES, LAYOUT, NUM_LAYERS, PROMPTS, payload_of, root_of, whole
from tests.lease_world.memory import Writer
from tests.lease_world.sending import Upload
from worker.leasing import NotReserved

if TYPE_CHECKING:
    from tests.lease_world.worker import Event, Worker

CHUNK_TOKENS = 3
COMMIT_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """The lease to push into, as the router passes it on."""

    worker: str
    epoch: int
    lease_id: bytes
    cached_tokens: int
    ttl_s: float


class Prompt:
    """One prompt: its lease here, and its push into the lease over there."""

    def __init__(
        self, worker: Worker, request: RequestId, attempt: int, lease_id: bytes, target: Target
    ) -> None:
        self.request = request
        self.attempt = attempt
        self.lease_id = lease_id
        self.tokens = PROMPTS[request]
        self.ref = LeaseRef(target.lease_id, attempt, worker.epoch, target.epoch)
        self.upload = Upload(worker, self.ref, target.worker, lease_id, self.tokens, target.ttl_s)
        self.progress = PushProgress(LAYOUT, target.cached_tokens, FRAME_BYTES)
        self.num_computed: int | None = None  # None: no room yet
        self.num_layers = 0  # of the chunk in hand
        self.commit_sent_at: float | None = None

    def advance(self, num_tokens: int, num_layers: int | None = None) -> None:
        self.progress.advance(num_tokens, num_layers)
        self.upload.add(self.progress.take())


class Prefill:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.keeper = worker.make_keeper(b"p")
        self.keeper.on_lost = lambda lease_id, cause: worker.post_to_loop(
            partial(self._lost, lease_id, cause)
        )
        self.prompts: dict[RequestId, Prompt] = {}
        self.closing: list[Prompt] = []
        self.outcomes: set[tuple[RequestId, int]] = set()

    def events(self) -> Iterator[Event]:
        for prompt in (*self.prompts.values(), *self.closing):
            yield from prompt.upload.events()
        for prompt in self.prompts.values():
            yield from self._events_of(prompt)
        for prompt in self.closing:
            if not prompt.upload.is_reading:
                yield "a push is aborted", partial(self._let_go, prompt)

    def _events_of(self, prompt: Prompt) -> Iterator[Event]:
        now, upload = self.worker.clock(), prompt.upload
        if upload.error is not None:
            yield "a push has failed", partial(self._fail, prompt, upload.error)
            return
        if now >= upload.contact.renew_at and not upload.ledger.num_in_flight:
            yield "a lease is renewed", partial(self._renew, prompt)
        if prompt.num_computed is None:
            return
        if prompt.num_computed < len(prompt.tokens):
            yield "a chunk is computed", partial(self._compute, prompt)
        elif self._may_commit(upload):
            sent_at = prompt.commit_sent_at
            if sent_at is None or now >= sent_at + COMMIT_AGAIN_S:
                yield "a push is committed", partial(self._commit, prompt)

    def _may_commit(self, upload: Upload) -> bool:
        """When all is acknowledged; a hasty sender asks as soon as all is sent."""
        if upload.is_reading or upload.ledger.has_work:
            return False
        return self.worker.world.hasty or upload.ledger.is_settled

    # --- the router ----------------------------------------------------------------------------

    def start(self, request: RequestId, attempt: int, remaining_s: float, target: Target) -> None:
        known = self.prompts.get(request)
        if (known is not None and known.attempt == attempt) or (request, attempt) in self.outcomes:
            return
        if known is not None and known.attempt < attempt:
            self._end(known, "SUPERSEDED")
        granted = self.keeper.grant(request, attempt, remaining_s, local=True)
        if isinstance(granted, NotReserved):
            self.worker.tell_failed(request, attempt, granted.cause)
            return
        self.worker.watch_lease("prefill", granted)
        self.keeper.hold(granted)
        prompt = self.prompts[request] = Prompt(self.worker, request, attempt, granted, target)
        self._admit(prompt)

    def cancel(self, request: RequestId, attempt: int) -> None:
        prompt = self.prompts.get(request)
        if prompt is not None and prompt.attempt <= attempt:
            self._end(prompt, "CANCELLED")
        self.keeper.cancel(request, attempt, "CANCELLED")
        self.worker.note_cancel("prefill", request, attempt)

    def admit_waiting(self) -> None:
        """Now and then: there may be room."""
        for prompt in list(self.prompts.values()):
            if prompt.num_computed is None:
                self._admit(prompt)

    def _admit(self, prompt: Prompt) -> None:
        root = root_of(prompt.request.tenant)
        cached = self.keeper.reserve(prompt.lease_id, prompt.tokens, 1, root)
        if cached is not None:
            prompt.num_computed = cached
            prompt.advance(cached)

    # --- computing and pushing -----------------------------------------------------------------

    def _compute(self, prompt: Prompt) -> None:
        """Half of a chunk's layers, or the other half."""
        assert prompt.num_computed is not None
        end = min(prompt.num_computed + CHUNK_TOKENS, len(prompt.tokens))
        layers = range(prompt.num_layers, NUM_LAYERS // 2 if prompt.num_layers == 0 else NUM_LAYERS)
        memory = self.worker.memory
        for piece in whole(range(prompt.num_computed, end), layers):
            places = memory.locate(prompt.lease_id, piece)
            writer = Writer(prompt.lease_id, self.worker.epoch)
            memory.write(places, payload_of(prompt.tokens, piece), writer)
        if layers.stop < NUM_LAYERS:
            prompt.num_layers = layers.stop
            prompt.advance(end, layers.stop)
            return
        prompt.num_layers, prompt.num_computed = 0, end
        memory.seal(prompt.lease_id, prompt.tokens, root_of(prompt.request.tenant), end)
        prompt.advance(end)

    def _renew(self, prompt: Prompt) -> None:
        prompt.upload.contact.retry_renewal()

        def answer(outcome: Outcome | Refused) -> None:
            if isinstance(outcome, Outcome) and outcome.state.is_open:
                prompt.upload.contact.touch()
            elif not (isinstance(outcome, Outcome) and outcome.state is LeaseState.COMMITTED):
                prompt.upload.fail("LEASE_LOST")

        self.worker.call(prompt.upload.to, "renew", lambda peer: peer.decode.renew(prompt.ref), answer)

    def _commit(self, prompt: Prompt) -> None:
        prompt.commit_sent_at = self.worker.clock()
        manifest, worker = prompt.upload.ledger.manifest(), self.worker

        def deliver(peer: Worker) -> None:
            peer.decode.commit(
                prompt.ref,
                manifest,
                len(prompt.tokens),
                lambda verdict: peer.answer(worker, "committed?", partial(self._committed, prompt, verdict)),
            )

        worker.net.post(worker.name, prompt.upload.to, "commit", deliver)

    def _committed(self, prompt: Prompt, verdict: Outcome | Refused | Waiting) -> None:
        if self.prompts.get(prompt.request) is not prompt:
            return
        if isinstance(verdict, Waiting):
            prompt.commit_sent_at = None
            try:
                if prompt.upload.ledger.is_settled:  # else this answer is older than a resend
                    prompt.upload.ledger.send_missing(verdict.missing)
            except FrameRefused as refused:
                prompt.upload.fail(refused.cause)
        elif isinstance(verdict, Outcome) and verdict.state is LeaseState.COMMITTED:
            self._forget(prompt, handed_over=True)
            self.keeper.release(prompt.lease_id, "HANDED_OVER")
            self._give_back(prompt)
        else:
            self._fail(prompt, "LEASE_LOST")

    # --- ends ----------------------------------------------------------------------------------

    def _lost(self, lease_id: bytes, cause: str) -> None:
        for prompt in list(self.prompts.values()):
            if prompt.lease_id == lease_id:
                self._fail(prompt, cause)

    def _fail(self, prompt: Prompt, cause: str) -> None:
        self.worker.tell_failed(prompt.request, prompt.attempt, cause)
        self._end(prompt, cause)

    def _end(self, prompt: Prompt, cause: str) -> None:
        prompt.upload.fail(cause)
        self._forget(prompt, handed_over=False)
        self.keeper.release(prompt.lease_id, cause)
        self.closing.append(prompt)

    def _let_go(self, prompt: Prompt) -> None:
        """Nothing is read any more; the receiver is told, if it can be."""
        self.closing.remove(prompt)
        self.worker.call(
            prompt.upload.to, "abort", lambda peer: peer.decode.abort(prompt.ref), lambda _: None
        )
        self._give_back(prompt)

    def _give_back(self, prompt: Prompt) -> None:
        prompt.upload.hang_up()
        self.keeper.unhold(prompt.lease_id)

    def _forget(self, prompt: Prompt, *, handed_over: bool) -> None:
        if self.prompts.get(prompt.request) is prompt:
            del self.prompts[prompt.request]
        if handed_over:
            self.outcomes.add((prompt.request, prompt.attempt))
