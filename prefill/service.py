"""The prefill service of a worker: prompts in, their KV pushed while it is computed, then handed over.

    fetching ── done ──▶ waiting ── room ──▶ computing ── first tokens ──▶ handing over ── acknowledged ──▶ gone
       └──────────────────────┴────────────┴── cancel, deadline, failure: push aborted ──▶ gone

A prompt has two leases: one here, for the blocks it is computed in, and the one of the decode worker that
it is pushed into. The blocks here outlive the lease until nothing reads them (LeaseKeeper.hold). All of it
runs on the service loop; what waits for the peer (commit, abort) runs on threads of its own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engine.events import ChunkDone, PrefillDone, SequenceFailed, StepResult
from headrace.v1 import worker_pb2
from kvtransfer.choosers import strictest
from kvtransfer.lease_types import Refusal, RequestId
from kvtransfer.transports.seam import CommitOutcome, TransferCause, TransferError
from prefill.channels import PeerChannels
from prefill.prompt import (
    CannotConvert,
    Phase,
    Prompt,
    handoff_record,
    open_push,
    peer_of,
    prefill_finished,
)
from worker.leasing import DEADLINE_EXCEEDED, LOST_CAUSES, NotReserved
from worker.link import RouterLink
from worker.ownership import is_anothers, tell_taken_over
from worker.prefix_sources import Holder, Wanted, pushes_to
from worker.prefixes import Brought
from worker.service import WorkerContext
from worker.wire import MalformedTask, check_task, failure, so_far_of, taken_over

logger = logging.getLogger(__name__)

MAX_HANDOVERS = 8
MAX_OUTCOMES = 1024
RETRY_ROOM_S = 0.02
_BROKEN_PEER = (TransferCause.PEER_UNAVAILABLE, TransferCause.PEER_REFUSED, TransferCause.RECEIVER_STALLED)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How an attempt ended that pushed into that lease, as the router was told."""

    decode_lease_id: bytes
    message: worker_pb2.WorkerMessage


class PrefillService:
    """Implements `worker.service.RoleService`."""

    receives_kv = False

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._leases = context.leases
        self._leases.on_lost = self._on_lease_lost
        self._prompts: dict[RequestId, Prompt] = {}
        self._by_lease: dict[bytes, Prompt] = {}
        self._closing: set[bytes] = set()
        self._outcomes: OrderedDict[tuple[RequestId, int], _Outcome] = OrderedDict()
        self._channels = PeerChannels()
        # Apart, so that no abort waits behind a commit that it would end.
        self._commits = ThreadPoolExecutor(MAX_HANDOVERS, thread_name_prefix="commit")
        self._aborts = ThreadPoolExecutor(MAX_HANDOVERS, thread_name_prefix="abort")

    @property
    def num_requests(self) -> int:
        """Prompts that hold blocks or wait for them."""
        return len(self._prompts) + len(self._closing)

    # --- the router's messages -----------------------------------------------------------------

    def handle(self, link: RouterLink, message: worker_pb2.RouterMessage) -> bool:
        """Act on StartPrefill, CancelAttempt and ResumeStream."""
        match message.WhichOneof("message"):
            case "start_prefill":
                self._start(link, message.start_prefill)
            case "cancel":
                self._cancel(link, message.cancel)
            case "resume":
                return self._known(link, message.resume.key)
            case _:
                return False
        return True

    def _start(self, link: RouterLink, message: worker_pb2.StartPrefill) -> None:
        if self._known(link, message.key, message.lease.lease_id):
            return
        refusal = self._refusal(message)
        if refusal is not None:
            link.send(refusal)
            return
        older = self._prompts.get(_request_id(message.key))
        if older is not None and older.key.attempt == message.key.attempt:
            # Its lease here is the attempt's, and cannot be another prompt's too.
            text = f"attempt {older.key.attempt} is under way for another lease"
            link.send(failure(message.key, "prefill", Refusal.STALE_ATTEMPT, text))
            return
        if older is not None and older.key.attempt < message.key.attempt:
            tell_taken_over(older, link, "prefill")
            self._end(older, "SUPERSEDED")
        granted = self._leases.grant(
            _request_id(message.key), message.key.attempt, message.remaining_s, local=True
        )
        if isinstance(granted, NotReserved):
            link.send(failure(message.key, "prefill", granted.cause, granted.message))
            return
        prompt = self._open(link, message, granted)
        if prompt is None:
            return
        self._prompts[_request_id(message.key)] = prompt
        self._by_lease[granted] = prompt
        self._bring_prefix(prompt)
        self._context.changed()

    def _open(self, link: RouterLink, message: worker_pb2.StartPrefill, lease_id: bytes) -> Prompt | None:
        bound = strictest((self._context.config.fidelity, message.task.fidelity)).rank
        deadline = self._context.clock() + message.remaining_s
        so_far = so_far_of(message.task)
        token_ids = so_far.head(message.task.prompt_token_ids)
        channel = self._channels.acquire(*peer_of(message))
        try:
            push = open_push(message, lease_id, len(token_ids), bound, self._context, channel)
        except CannotConvert as error:
            self._channels.release(*peer_of(message))
            self._leases.release(lease_id, "DTYPE_MISMATCH")
            link.send(failure(message.key, "prefill", "DTYPE_MISMATCH", str(error)))
            return None
        self._leases.hold(lease_id)
        return Prompt(message, link, lease_id, deadline, bound, push, so_far, token_ids)

    def _refusal(self, message: worker_pb2.StartPrefill) -> worker_pb2.WorkerMessage | None:
        if not self._context.accepts_new():
            text = "the worker takes no new prompts"
            return failure(message.key, "prefill", "NOT_SERVING", text, retryable=True)
        if not message.remaining_s > 0:
            text = "the deadline had passed when the prompt arrived"
            return failure(message.key, "prefill", DEADLINE_EXCEEDED, text)
        try:
            check_task(message.task, self._engine)
        except MalformedTask as error:
            return failure(message.key, "prefill", "INVALID_TASK", str(error))
        if not self._may_hold(len(message.task.prompt_token_ids)):
            text = f"{len(self._prompts)} prompts are held already"
            return failure(message.key, "prefill", "PREFILL_QUEUE_FULL", text, retryable=True)
        return None

    def _may_hold(self, num_tokens: int) -> bool:
        """The running prompt and one more, or more that are short; and as many as the engine has places for."""
        config = self._context.config
        held = [p for p in self._prompts.values() if p.phase is not Phase.HANDING_OVER]
        held_tokens = sum(len(prompt.token_ids) for prompt in held)
        few = len(held) < config.max_prompts or held_tokens + num_tokens <= config.prompt_window_tokens
        return few and self.num_requests < self._engine.max_sequences

    def _cancel(self, link: RouterLink, message: worker_pb2.CancelAttempt) -> None:
        if self._is_anothers(link, message.key):
            return
        request_id = _request_id(message.key)
        prompt = self._prompts.get(request_id)
        cause = message.cause or "CANCELLED"
        if prompt is not None and prompt.key.attempt <= message.key.attempt:
            tell_taken_over(prompt, link, "prefill")
            self._end(prompt, cause)
        self._leases.cancel(request_id, message.key.attempt, cause)

    def disown(self, link: RouterLink, cause: str, before_generation: int) -> None:
        """Cancel the prompts of `link` that were not heard of since that generation began."""
        for prompt in list(self._prompts.values()):
            if prompt.link is link and prompt.generation < before_generation:
                self._end(prompt, cause)

    # --- the prefix that others have -----------------------------------------------------------

    def _bring_prefix(self, prompt: Prompt) -> None:
        """Fetch cached blocks that are worth it, then compute."""
        peers = [(*prompt.peer, prompt.message.lease.cached_tokens)]
        peers += [(each.kv_address, each.epoch, each.cached_tokens) for each in prompt.message.sources]
        holders = [
            Holder(address, epoch, cached_tokens, self._channels.acquire(address, epoch))
            for address, epoch, cached_tokens in peers
            if cached_tokens
        ]
        if not self._context.prefixes.anybody(holders):
            self._try_to_admit(prompt)
            return
        root_key = self._context.root_key(prompt.key.tenant)
        wanted = Wanted(
            tenant=prompt.key.tenant,
            keys=self._engine.prefix_keys(root_key, prompt.token_ids),
            bound=prompt.bound,
            deadline=prompt.deadline,
            holders=holders,
        )
        prompt.phase = Phase.FETCHING
        prompt.fetch = self._context.prefixes.bring(
            wanted, lambda brought: self._fetched(prompt, holders, brought)
        )
        if prompt.fetch is None:
            self._fetched(prompt, holders, Brought())

    def _fetched(self, prompt: Prompt, holders: Sequence[Holder], brought: Brought) -> None:
        for holder in holders:
            self._channels.release(holder.address, holder.epoch)
        prompt.fetch, prompt.brought, prompt.phase = None, brought, Phase.WAITING
        self._try_to_admit(prompt)

    # --- computing -----------------------------------------------------------------------------

    def _try_to_admit(self, prompt: Prompt) -> None:
        """A prompt that cannot be begun for a defect fails, and holds up no other."""
        try:
            self._admit(prompt)
        except Exception as error:
            logger.exception("prompt of request %s could not be begun", prompt.key.request_id)
            self._fail(prompt, "prefill", "INTERNAL", type(error).__name__, retryable=True)

    def _admit(self, prompt: Prompt) -> None:
        """Begin to compute a prompt if there is room, else look again soon."""
        if prompt.phase is not Phase.WAITING or prompt.lease_id not in self._by_lease:
            return
        root_key = self._context.root_key(prompt.key.tenant)
        # One choice, whatever n is: the others begin on the decode worker.
        cached_tokens = self._leases.reserve(prompt.lease_id, prompt.token_ids, 1, root_key, prompt.bound)
        if cached_tokens is None:
            self._context.loop.call_later(RETRY_ROOM_S, self._try_to_admit, prompt)
            return
        prompt.phase = Phase.COMPUTING
        prompt.cached_tokens = cached_tokens
        prompt.push.declare_fidelity(self._engine.fidelity_of(prompt.lease_id))
        prompt.push.advance(cached_tokens)
        self._engine.submit(
            prompt.lease_id, prompt.token_ids, prompt.sampling, prefill_only=True, so_far=prompt.so_far
        )
        self._context.wake_engine()

    def on_step(self, result: StepResult) -> None:
        """Push what a step computed, and hand over what it finished."""
        for event in result.events:
            prompt = self._by_lease.get(event.lease_id)
            if prompt is None:
                continue
            if isinstance(event, ChunkDone):
                self._push_on(prompt, event, result.step_s)
            elif isinstance(event, PrefillDone):
                self._hand_over(prompt, event)
            elif isinstance(event, SequenceFailed):
                self._fail(prompt, "prefill", event.cause, event.message, retryable=False)

    def _push_on(self, prompt: Prompt, done: ChunkDone, step_s: float) -> None:
        if prompt.began is None:
            prompt.began = self._context.clock() - step_s
        prompt.push.advance(done.num_tokens, done.num_layers)
        if prompt.push.error is not None:
            self._fail_transfer(prompt, prompt.push.error)

    # --- handing over --------------------------------------------------------------------------

    def _hand_over(self, prompt: Prompt, event: PrefillDone) -> None:
        if prompt.phase is not Phase.COMPUTING:
            return
        prompt.phase = Phase.HANDING_OVER
        prompt.drawn_at = self._context.clock()
        record = handoff_record(prompt, self._context, event.first)
        remaining_s = prompt.deadline - prompt.drawn_at
        commit = self._commits.submit(prompt.push.commit, record, remaining_s)
        commit.add_done_callback(
            lambda done: self._context.loop.call_soon_threadsafe(self._committed, prompt, done)
        )

    def _committed(self, prompt: Prompt, commit: Future[CommitOutcome]) -> None:
        if prompt.lease_id not in self._by_lease:
            return  # cancelled meanwhile; the abort gives the blocks back
        error = commit.exception()
        if isinstance(error, TransferError):
            self._fail_transfer(prompt, error)
        elif error is not None:
            self._fail(prompt, "handoff", "INTERNAL", type(error).__name__, retryable=True)
        elif not commit.result().is_committed:
            outcome = commit.result()
            cause = LOST_CAUSES.get(outcome.cause, outcome.cause) or f"LEASE_{outcome.state or 'UNKNOWN'}"
            retryable = cause != DEADLINE_EXCEEDED
            self._fail(prompt, "handoff", cause, outcome.message, retryable=retryable)
        else:
            self._tell(prompt, prefill_finished(prompt, prompt.push.stats(), self._context.clock()))
            self._forget(prompt)
            self._leases.release(prompt.lease_id, "HANDED_OVER")
            self._let_go(prompt)

    # --- ends ----------------------------------------------------------------------------------

    def on_engine_failed(self, lease_ids: Collection[bytes] | None, message: str) -> None:
        """End the prompts whose sequences the engine lost; None: all of them."""
        for prompt in list(self._prompts.values()):
            if lease_ids is None or prompt.lease_id in lease_ids:
                self._fail(prompt, "prefill", "ENGINE_FAILED", message, retryable=True)

    def _on_lease_lost(self, lease_id: bytes, cause: str) -> None:
        self._context.loop.call_soon_threadsafe(self._lease_lost, lease_id, cause)

    def _lease_lost(self, lease_id: bytes, cause: str) -> None:
        prompt = self._by_lease.get(lease_id)
        if prompt is not None:
            stage = "handoff" if prompt.phase is Phase.HANDING_OVER else "prefill"
            cause = LOST_CAUSES.get(cause, cause)
            retryable = cause != DEADLINE_EXCEEDED
            self._fail(prompt, stage, cause, "the prompt was not handed over in time", retryable=retryable)

    def _fail_transfer(self, prompt: Prompt, error: TransferError) -> None:
        # A frame that came too late is refused as LEASE_CLOSED; what happened is that the lease was lost.
        cause = TransferCause.LEASE_LOST if error.cause == Refusal.LEASE_CLOSED else error.cause
        self._fail(prompt, "transfer", cause, error.message, retryable=cause != DEADLINE_EXCEEDED)

    def _fail(self, prompt: Prompt, stage: str, cause: str, message: str, *, retryable: bool) -> None:
        logger.info("request %s failed in %s: %s", prompt.key.request_id, stage, cause)
        self._tell(prompt, failure(prompt.key, stage, cause, message, retryable=retryable))
        self._end(prompt, cause)

    def _end(self, prompt: Prompt, cause: str) -> None:
        """Stop computing at the next chunk, and abort the push; the router hears nothing of it here."""
        if prompt.fetch is not None:
            prompt.fetch.cancel()
        self._forget(prompt)
        self._leases.release(prompt.lease_id, cause)
        self._closing.add(prompt.lease_id)
        abort = self._aborts.submit(prompt.push.abort, cause)
        abort.add_done_callback(lambda _done: self._context.loop.call_soon_threadsafe(self._let_go, prompt))

    def _let_go(self, prompt: Prompt) -> None:
        """Nothing reads the prompt's blocks any more."""
        self._closing.discard(prompt.lease_id)
        self._leases.unhold(prompt.lease_id)
        self._count(prompt)
        error = prompt.push.error
        self._channels.release(*prompt.peer, failed=error is not None and error.cause in _BROKEN_PEER)
        self._context.changed()
        for other in list(self._prompts.values()):
            self._try_to_admit(other)

    def _count(self, prompt: Prompt) -> None:
        kv, stats = self._context.kv, prompt.push.stats()
        kv.counters.note_push(stats)
        kv.speeds.note_load(pushes_to(prompt.peer[0]), stats.kv_bytes, stats.frame_s)

    async def close(self) -> None:
        """Abort every prompt: the worker stops."""
        for prompt in list(self._prompts.values()):
            self._fail(prompt, "prefill", "WORKER_STOPPED", "the worker was stopped", retryable=True)
        await self._context.prefixes.close()
        for threads in (self._aborts, self._commits):
            await self._context.loop.run_in_executor(None, threads.shutdown)
        self._channels.close()

    # --- the books -----------------------------------------------------------------------------

    def _known(
        self, link: RouterLink, key: worker_pb2.RequestKey, decode_lease_id: bytes | None = None
    ) -> bool:
        """Whether the attempt is or was here; what the router was told of its end is told again. One for another lease
        is another attempt: a router that starts anew may count from where an older one had been before."""
        if self._is_anothers(link, key):
            if decode_lease_id is None:
                link.send(taken_over(key, "prefill"))
            return decode_lease_id is None
        prompt = self._prompts.get(_request_id(key))
        if prompt is not None and prompt.key.attempt == key.attempt:
            if decode_lease_id in (None, prompt.message.lease.lease_id):
                prompt.hear(link)
                return True
            return False
        outcome = self._outcomes.get((_request_id(key), key.attempt))
        if outcome is None or decode_lease_id not in (None, outcome.decode_lease_id):
            return False
        link.send(outcome.message)
        return True

    def _is_anothers(self, link: RouterLink, key: worker_pb2.RequestKey) -> bool:
        return is_anothers(self._prompts.get(_request_id(key)), link, key)

    def _tell(self, prompt: Prompt, message: worker_pb2.WorkerMessage) -> None:
        prompt.link.send(message)
        outcome = _Outcome(prompt.message.lease.lease_id, message)
        self._outcomes[_request_id(prompt.key), prompt.key.attempt] = outcome
        if len(self._outcomes) > MAX_OUTCOMES:
            self._outcomes.popitem(last=False)

    def _forget(self, prompt: Prompt) -> None:
        self._by_lease.pop(prompt.lease_id, None)
        if self._prompts.get(_request_id(prompt.key)) is prompt:
            del self._prompts[_request_id(prompt.key)]


def _request_id(key: worker_pb2.RequestKey) -> RequestId:
    return RequestId(key.tenant, key.request_id)
