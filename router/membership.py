"""Which workers there are: who registered, how their links stand, and what may be placed on them.

A worker id names one worker; a new epoch or a new address is a new incarnation of it, which replaces the old
one at once. Whatever a link brings is passed to the placement and the dispatcher here.
"""

import asyncio
import logging
from collections.abc import Callable

from headrace.v1 import cluster_pb2, worker_pb2
from router.core.admission import check_request_id
from router.core.canary import CANARY_TENANT, Canaries, Outgoing
from router.core.failures import Code, Failure, Rejection, Stage, invalid
from router.core.fleet import Identity, LinkSpeed, Role, WorkerFacts, WorkerRef, WorkerState
from router.core.index_feed import IndexFeed, KeyScheme
from router.core.placement import PlacementState
from router.direct import DirectSources
from router.dispatcher import Dispatcher
from router.requests import RequestKey
from router.workers import LinkSettings, WorkerLink, WrongWorker

logger = logging.getLogger(__name__)

MAX_WORKERS = 4096

_ROLES = {
    worker_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_pb2.ROLE_DECODE: Role.DECODE,
    worker_pb2.ROLE_BOTH: Role.BOTH,
}
_STATES = {
    worker_pb2.WORKER_STATE_SERVING: WorkerState.SERVING,
    worker_pb2.WORKER_STATE_NO_NEW: WorkerState.NO_NEW,
    worker_pb2.WORKER_STATE_KV_ONLY: WorkerState.KV_ONLY,
    worker_pb2.WORKER_STATE_GONE: WorkerState.GONE,
}


class Switchboard:
    """The links by incarnation: how the dispatcher reaches a worker."""

    def __init__(self) -> None:
        self._links: dict[WorkerRef, WorkerLink] = {}

    def add(self, link: WorkerLink) -> None:
        self._links[link.ref] = link

    def remove(self, link: WorkerLink) -> None:
        if self._links.get(link.ref) is link:
            del self._links[link.ref]

    def send(self, ref: WorkerRef, message: worker_pb2.RouterMessage) -> None:
        """Queues a message; to a worker that is gone it does nothing."""
        link = self._links.get(ref)
        if link is not None:
            link.send(message)

    def acknowledge(self, ref: WorkerRef, key: worker_pb2.RequestKey, choice: int, next_index: int) -> None:
        """Says, soon and together with others, which tokens need not be kept."""
        link = self._links.get(ref)
        if link is not None:
            link.acknowledge(key, choice, next_index)


class Membership:
    """Workers by id. Lives on the router's event loop; a `LinkObserver`."""

    def __init__(
        self,
        settings: LinkSettings,
        switchboard: Switchboard,
        placement: PlacementState[RequestKey],
        dispatcher: Dispatcher,
        feed: IndexFeed,
        canaries: Canaries,
        tokenizer_digest: str,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        direct: DirectSources | None = None,
    ) -> None:
        """`on_change` is called whenever a worker came, went or changed its state. `direct` is told of those that serve
        clients directly."""
        self._settings = settings
        self._switchboard = switchboard
        self._placement = placement
        self._dispatcher = dispatcher
        self._feed = feed
        self._canaries = canaries
        self._facts: dict[WorkerRef, WorkerFacts] = {}
        self._tokenizer_digest = tokenizer_digest
        self._clock = clock
        self._on_change = on_change
        self._direct = direct
        self._links: dict[str, WorkerLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def register(self, worker_id: str, epoch: int, address: str) -> bool:
        """Dials a worker that announced itself; True once a stream to this very incarnation is open.

        Raises:
            Rejection: the announcement makes no sense, or there are too many workers.
        """
        _check_announcement(worker_id, epoch, address)
        ref = WorkerRef(worker_id, epoch)
        known = self._links.get(worker_id)
        if known is not None and not known.is_lost:
            if known.ref == ref and known.address == address:
                return known.connected
            self._close(known)
            self._forget(known, "a new incarnation registered")
        elif known is None:
            self._make_room()
        link = WorkerLink(ref, address, self._settings, self, self._clock)
        self._links[worker_id] = link
        link.start()
        return False

    def set_state(self, worker_id: str, state: worker_pb2.WorkerState) -> worker_pb2.WorkerState:
        """Passes on where a worker shall go; returns the state it last said it was in.

        Raises:
            Rejection: no worker of that name is connected, or there is no such state.
        """
        if state not in _STATES:
            raise invalid("BAD_WORKER_STATE", f"state {state} is none that a worker can be asked to be in")
        link = self._links.get(worker_id)
        if link is None or not link.connected:
            raise Rejection(
                Failure(
                    code=Code.NOT_FOUND,
                    stage=Stage.ADMISSION,
                    cause="UNKNOWN_WORKER",
                    message=f"no worker {worker_id[:128]!r} is connected",
                )
            )
        logger.info("worker %s is asked to be %s", worker_id, _STATES[state])
        link.send(worker_pb2.RouterMessage(set_state=worker_pb2.SetState(state=state)))
        told = link.report or link.hello
        return told.state if told is not None else worker_pb2.WORKER_STATE_UNSPECIFIED

    def sweep(self) -> None:
        """Asks those workers for their cached blocks that should have told of them, and begins trials of newcomers.
        Called some times a second."""
        for ref in self._feed.due(self._clock()):
            self._ask_for_blocks(ref)
        self._try_out(self._canaries.due(self._clock()))

    async def close(self) -> None:
        """Ends every link."""
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)

    def rows(self) -> list[cluster_pb2.WorkerStatus]:
        """Every worker as an operator sees it, those lost lately too."""
        return [self._row(link) for link in self._links.values()]

    # --- LinkObserver ------------------------------------------------------------------------------------

    def joined(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """The worker may get requests, if its tokens mean what the router's do."""
        facts = _facts(link.ref, hello)
        if facts.identity.tokenizer_digest != self._tokenizer_digest:
            link.last_error = (
                f"not placed: its tokenizer {facts.identity.tokenizer_digest!r} is not the router's "
                f"{self._tokenizer_digest!r}"
            )
            logger.error("worker %s: %s", link.ref.worker_id, link.last_error)
            return
        slot = self._feed.joined(link.ref, _key_scheme(hello), self._clock())
        try:
            self._placement.add(facts, WorkerState.NO_NEW, slot)
        except ValueError as error:
            self._feed.left(link.ref)
            raise WrongWorker(str(error)) from None
        self._switchboard.add(link)
        others = list(self._facts.values())
        self._facts[link.ref] = facts
        if self._direct is not None:
            self._direct.joined(link.ref, hello.direct_address)
        self._on_change()
        self._try_out(self._canaries.joined(facts, hello.vocab_size, others, self._clock()))

    def out_of_touch(self, link: WorkerLink) -> None:
        """Nothing new goes there; what it has waits for the grace, unless the worker said that it goes."""
        if link.report is not None and link.report.state == worker_pb2.WORKER_STATE_GONE:
            link.is_lost, link.last_error = True, "it has left"
            self._close(link)
            self._forget(link, link.last_error)
            return
        self._placement.set_connected(link.ref, False)
        self._feed.out_of_touch(link.ref)
        self._on_change()

    def back(self, link: WorkerLink) -> None:
        """Its requests go on."""
        self._placement.set_connected(link.ref, True)
        self._feed.back(link.ref, self._clock())
        self._on_change()
        self._dispatcher.on_back(link.ref)

    def lost(self, link: WorkerLink, reason: str) -> None:
        """Its requests fail."""
        self._forget(link, reason)

    def message(self, link: WorkerLink, message: worker_pb2.WorkerMessage) -> None:
        """Passes a worker's message on."""
        if self._canaries.is_busy:
            self._try_out(self._canaries.take(link.ref, message, self._clock()))
        match message.WhichOneof("message"):
            case "step":
                self._dispatcher.on_step(link.ref, message.step)
            case "reserved":
                if message.reserved.key.tenant != CANARY_TENANT:
                    self._dispatcher.on_reserved(link.ref, message.reserved)
            case "prefill_finished":
                self._dispatcher.on_prefill_finished(link.ref, message.prefill_finished)
            case "direct":
                self._dispatcher.on_direct(link.ref, message.direct)
            case "failed":
                self._dispatcher.on_failed(link.ref, message.failed)
            case "report":
                self._reported(link, message.report)
            case "blocks":
                self._blocks_changed(link, message.blocks)
            case other:
                logger.warning("worker %s sent %s, which means nothing here", link.ref.worker_id, other)

    # -----------------------------------------------------------------------------------------------------

    def _reported(self, link: WorkerLink, report: worker_pb2.WorkerReport) -> None:
        link.report = report
        worker = self._placement.worker(link.ref)
        if worker is None:
            return
        state = self._state(link.ref, report.state)
        changed = worker.state is not state
        self._placement.report(
            link.ref,
            state=state,
            free_blocks=report.free_blocks,
            num_sequences=report.running_sequences + report.waiting_sequences,
            first_row_s=report.first_row_s,
            row_s=report.row_s,
            queued_prefill_tokens=report.queued_prefill_tokens,
            step_s=report.step_s,
            prefill_s_per_token=report.prefill_s_per_token,
            links={link.kv_address: LinkSpeed(link.bytes_per_s, link.fixed_s) for link in report.links},
        )
        if changed:
            self._on_change()
        if self._feed.reported(link.ref, self._clock()):
            self._ask_for_blocks(link.ref)
        self._dispatcher.pump()

    def _state(self, ref: WorkerRef, said: worker_pb2.WorkerState) -> WorkerState:
        """What a worker counts as: one that has not shown that it can move a block gets nothing yet."""
        state = _STATES.get(said, WorkerState.SERVING)
        is_tried = self._canaries.is_ready(ref)
        return WorkerState.NO_NEW if state is WorkerState.SERVING and not is_tried else state

    def _try_out(self, outgoing: Outgoing) -> None:
        """Sends what trials need, and lets those workers in that have passed one."""
        for ref, message in outgoing:
            self._switchboard.send(ref, message)
        for ref in self._canaries.let_in():
            link = self._links[ref.worker_id]
            newest = link.report or link.hello
            said = newest.state if newest is not None else worker_pb2.WORKER_STATE_UNSPECIFIED
            self._placement.set_state(ref, self._state(ref, said))
            self._on_change()
            self._dispatcher.on_joined()

    def _blocks_changed(self, link: WorkerLink, events: worker_pb2.BlockEvents) -> None:
        if self._links.get(link.ref.worker_id) is not link:
            return  # an older link to the same incarnation, which numbers its messages by itself
        if self._feed.take(link.ref, events, self._clock()):
            self._ask_for_blocks(link.ref)

    def _ask_for_blocks(self, ref: WorkerRef) -> None:
        self._switchboard.send(ref, worker_pb2.RouterMessage(snapshot=worker_pb2.BlockSnapshotRequest()))

    def _forget(self, link: WorkerLink, reason: str) -> None:
        self._placement.remove(link.ref)
        self._feed.left(link.ref)
        self._facts.pop(link.ref, None)
        if self._direct is not None:
            self._direct.left(link.ref)
        self._canaries.left(link.ref)
        self._switchboard.remove(link)
        self._on_change()
        self._dispatcher.on_lost(link.ref, reason)

    def _close(self, link: WorkerLink) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _make_room(self) -> None:
        if len(self._links) < MAX_WORKERS:
            return
        lost = next((worker_id for worker_id, link in self._links.items() if link.is_lost), None)
        if lost is None:
            raise Rejection(
                Failure(
                    code=Code.RESOURCE_EXHAUSTED,
                    stage=Stage.ADMISSION,
                    cause="TOO_MANY_WORKERS",
                    message=f"{MAX_WORKERS} workers are registered already",
                )
            )
        del self._links[lost]

    def _row(self, link: WorkerLink) -> cluster_pb2.WorkerStatus:
        worker = self._placement.worker(link.ref)
        unpaired = self._placement.unpaired_reason(worker) if worker is not None else ""
        return cluster_pb2.WorkerStatus(
            address=link.address,
            connected=link.connected,
            hello=link.hello or worker_pb2.WorkerHello(worker_id=link.ref.worker_id, epoch=link.ref.epoch),
            report=link.report,
            connected_s=self._clock() - link.connected_at_s if link.connected else 0.0,
            last_error=link.last_error or self._canaries.problem(link.ref) or unpaired,
        )


def _check_announcement(worker_id: str, epoch: int, address: str) -> None:
    if not worker_id:
        raise invalid("BAD_WORKER", "worker_id is empty")
    check_request_id(worker_id)
    if epoch == 0:
        raise invalid("BAD_WORKER", "epoch is 0; it must be random")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise invalid("BAD_WORKER", f"address {address[:128]!r} is not host:port")


def _key_scheme(hello: worker_pb2.WorkerHello) -> KeyScheme | None:
    """None for a worker that does not say what its keys begin with: nobody could name its blocks."""
    return KeyScheme(hello.key_identity, hello.block_tokens) if hello.key_identity else None


def _facts(ref: WorkerRef, hello: worker_pb2.WorkerHello) -> WorkerFacts:
    role = _ROLES.get(hello.role)
    if role is None:
        raise WrongWorker("its WorkerHello names no role")
    return WorkerFacts(
        ref=ref,
        role=role,
        identity=Identity(
            weights_digest=hello.identity.weights_digest,
            tokenizer_digest=hello.identity.tokenizer_digest,
            arithmetic=hello.identity.arithmetic,
            layout=hello.identity.layout,
            handoff_major=hello.identity.handoff_major,
        ),
        block_tokens=hello.block_tokens,
        num_blocks=hello.num_blocks,
        max_sequences=hello.max_sequences,
        max_context=hello.max_context,
        kv_address=hello.kv_address,
        kv_bytes_per_token=hello.kv_bytes_per_token,
        key_identity=hello.key_identity,
    )
