"""A worker's decode role: reservations, frames that land slowly, commits that wait, answers that end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvtransfer.coverage import find_gap
from kvtransfer.frames import Ack, AckFault, FrameRecord, LeaseRef
from kvtransfer.lease_types import (
    AlreadyLanded,
    Landing,
    LeaseState,
    Outcome,
    Ready,
    Refused,
    RequestId,
    Waiting,
)
from kvtransfer.transports.seam import HandoffRefused
from tests.lease_world.content import ENTRY_BYTES, LAYOUT, PROMPTS, checksum_of, root_of
from tests.lease_world.memory import Writer
from tests.lease_world.network import FrameMessage
from worker.leasing import NO_CAPACITY, NotReserved

if TYPE_CHECKING:
    from tests.lease_world.worker import Event, Worker

CommitReply = Callable[[Outcome | Refused | Waiting], None]


@dataclass(eq=False, slots=True)
class Answer:
    """A request that holds a lease here."""

    request: RequestId
    attempt: int
    lease_id: bytes
    cached_tokens: int
    decoding: bool = False


@dataclass(eq=False, slots=True)
class OpenLanding:
    """A frame that is being written: its places were looked up once, its bytes are written bit by bit."""

    landing: Landing
    frame: FrameMessage
    places: list[tuple[int, str, int, int]]
    reply: Callable[[Ack], None]
    num_written: int = 0
    fails: bool = False
    stalled: bool = False


@dataclass(eq=False, slots=True)
class OpenCommit:
    """A commit call: first it waits for frames, then it fences the cache, then it looks again and decides."""

    ref: LeaseRef
    manifest: dict[int, FrameRecord]
    num_tokens: int
    reply: CommitReply
    looked_at: int = -1
    was_ready: bool = False


class Decode:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.keeper = worker.make_keeper(b"d")
        self.keeper.on_lost = lambda lease_id, cause: worker.post_to_loop(
            partial(self._lost, lease_id, cause)
        )
        self.keeper.on_commit = self._adopt
        self.answers: dict[RequestId, Answer] = {}
        self.by_lease: dict[bytes, Answer] = {}
        self.landings: list[OpenLanding] = []
        self.commits: list[OpenCommit] = []

    def events(self) -> Iterator[Event]:
        for landing in self.landings:
            if landing.stalled:
                continue
            yield "a frame is written on", partial(self._write_on, landing)
        for commit in self.commits:
            yield "a commit is looked at", partial(self._look, commit)
        for answer in self.answers.values():
            if answer.decoding:
                yield "an answer ends", partial(self._finish, answer)

    # --- the router ----------------------------------------------------------------------------

    def reserve(self, request: RequestId, attempt: int, remaining_s: float) -> None:
        known = self.answers.get(request)
        if known is not None and known.attempt == attempt:
            self._tell_reserved(known)
            return
        self._forget(request, older_than=attempt)
        lease_id = self.keeper.grant(request, attempt, remaining_s, local=False)
        if isinstance(lease_id, NotReserved):
            self.worker.tell_failed(request, attempt, lease_id.cause)
            return
        self.worker.watch_lease("decode", lease_id)
        prompt, root = PROMPTS[request], root_of(request.tenant)
        cached_tokens = self.keeper.reserve(lease_id, prompt, 1, root, is_computed_here=False)
        if cached_tokens is None:
            self.keeper.release(lease_id, NO_CAPACITY)
            self.worker.tell_failed(request, attempt, NO_CAPACITY)
            return
        answer = Answer(request, attempt, lease_id, cached_tokens)
        self.answers[request] = self.by_lease[lease_id] = answer
        self._tell_reserved(answer)

    def cancel(self, request: RequestId, attempt: int) -> None:
        self._forget(request, older_than=attempt + 1)
        self.keeper.cancel(request, attempt, "CANCELLED")
        self.worker.note_cancel("decode", request, attempt)

    def _tell_reserved(self, answer: Answer) -> None:
        worker, epoch = self.worker, self.worker.epoch
        worker.tell(
            "reserved",
            lambda router: router.reserved(
                answer.request, answer.attempt, worker.name, epoch, answer.lease_id, answer.cached_tokens
            ),
        )

    # --- frames --------------------------------------------------------------------------------

    def take_frame(self, frame: FrameMessage, reply: Callable[[Ack], None]) -> None:
        if checksum_of(frame.payload, frame.number) != frame.record.checksum:
            reply(Ack(frame.number, ok=False, cause=AckFault.DAMAGED_FRAME, credit=64))
            return
        before = self.worker.expect_frame(frame)
        with self.keeper.desk.change() as table:
            answer = table.begin_landing(frame.ref, frame.number, frame.record)
        before.check(answer)
        if isinstance(answer, Refused):
            reply(Ack(frame.number, ok=False, cause=answer.refusal, message=answer.message, credit=64))
        elif isinstance(answer, AlreadyLanded):
            reply(Ack(frame.number, ok=True, credit=64))
        elif frame.piece.entries.start < answer.start_token:
            self._end_landing(answer, frame, landed=False)
            reply(Ack(frame.number, ok=False, cause=AckFault.BAD_PIECE, credit=64))
        else:
            places = self.worker.memory.locate(answer.lease_id, frame.piece)
            self.landings.append(OpenLanding(answer, frame, places, reply))

    def _write_on(self, landing: OpenLanding) -> None:
        frame = landing.frame
        if landing.fails:
            self.landings.remove(landing)
            self._end_landing(landing.landing, frame, landed=False)
            landing.reply(Ack(frame.number, ok=False, cause=AckFault.LANDING_FAILED, credit=64))
            return
        end = min(len(landing.places), landing.num_written + max(1, math.ceil(len(landing.places) / 2)))
        self.worker.memory.write(
            landing.places[landing.num_written : end],
            frame.payload[landing.num_written * ENTRY_BYTES : end * ENTRY_BYTES],
            Writer(landing.landing.lease_id, frame.ref.sender_epoch),
        )
        landing.num_written = end
        if end == len(landing.places):
            self.landings.remove(landing)
            self._end_landing(landing.landing, frame, landed=True)
            landing.reply(Ack(frame.number, ok=True, credit=64))

    def _end_landing(self, landing: Landing, frame: FrameMessage, *, landed: bool) -> None:
        with self.keeper.desk.change() as table:
            table.end_landing(landing, frame.record, frame.piece, landed=landed)

    # --- commit, renew, abort ------------------------------------------------------------------

    def commit(
        self, ref: LeaseRef, manifest: dict[int, FrameRecord], num_tokens: int, reply: CommitReply
    ) -> None:
        self.commits.append(OpenCommit(ref, manifest, num_tokens, reply))

    def _look(self, commit: OpenCommit) -> None:
        """Decides, or waits for as long as anything changes."""
        with self.keeper.desk.change() as table:
            verdict = table.check_commit(commit.ref, commit.manifest)
            version = table.version
            if isinstance(verdict, Ready):
                if not commit.was_ready:
                    commit.was_ready = True  # the lock is let go for the fence: anything may come between
                    return
                verdict = self._decide(commit, verdict)
            elif isinstance(verdict, Waiting) and commit.looked_at != version:
                commit.looked_at = version
                return
            if isinstance(verdict, Refused) and verdict.state is not None and verdict.state.is_open:
                verdict = table.abort(commit.ref, f"{verdict.refusal}: {verdict.message}")
        self.commits.remove(commit)
        assert not (isinstance(verdict, Outcome) and verdict.state is LeaseState.RELEASED), (
            "was it committed?"
        )
        self.worker.note_answer(commit.ref, verdict)
        commit.reply(verdict)

    def _decide(self, commit: OpenCommit, ready: Ready) -> Outcome | Refused:
        with self.keeper.desk.change() as table:
            assert all(o.landing.lease_id != ready.lease_id for o in self.landings), "committed while written"
            assert self.worker.lease(ready.lease_id).state.is_open, "ready, and not open"
            assert len(ready.pieces) == len(commit.manifest), "ready, and frames are missing"
            gap = find_gap(LAYOUT, ready.pieces, ready.start_token, commit.num_tokens)
            try:
                if gap is not None:
                    raise HandoffRefused("MANIFEST_INCOMPLETE", gap)
                self.keeper.commit(ready.lease_id, commit.num_tokens, ready.fidelity)  # type: ignore[arg-type]
            except HandoffRefused as refused:
                return table.abort(commit.ref, refused.cause)
            self.worker.check_own_bytes(ready.lease_id, range(ready.start_token, commit.num_tokens))
            return table.commit(ready.lease_id)

    def _adopt(self, lease_id: bytes, num_tokens: int, _fidelity: int) -> None:  # a keeper's on_commit
        answer = self.by_lease.get(lease_id)
        if answer is None:
            raise HandoffRefused("UNKNOWN_REQUEST", "the request has ended here")
        prompt = PROMPTS[answer.request]
        memory = self.worker.memory
        memory.check_content(lease_id, prompt, range(num_tokens))
        memory.seal(lease_id, prompt, root_of(answer.request.tenant), num_tokens)
        self.worker.adopted.add(lease_id)
        self.worker.post_to_loop(partial(self._adopted, lease_id))

    def _adopted(self, lease_id: bytes) -> None:
        answer = self.by_lease.get(lease_id)
        if answer is not None:
            answer.decoding = True

    def renew(self, ref: LeaseRef) -> Outcome | Refused:
        with self.keeper.desk.change() as table:
            answer = table.renew(ref)
        self.worker.note_answer(ref, answer)
        return answer

    def abort(self, ref: LeaseRef) -> Outcome | Refused:
        with self.keeper.desk.change() as table:
            answer = table.abort(ref, "SENDER")
        self.worker.note_answer(ref, answer)
        return answer

    # --- ends ----------------------------------------------------------------------------------

    def _finish(self, answer: Answer) -> None:
        self._drop(answer)
        self.keeper.release(answer.lease_id, "FINISHED")
        self.worker.tell("finished", lambda router: router.finished(answer.request, answer.attempt))

    def _lost(self, lease_id: bytes, cause: str) -> None:
        self.worker.fetch.forget(lease_id)
        answer = self.by_lease.get(lease_id)
        if answer is not None:
            self._drop(answer)
            self.keeper.release(lease_id, cause)
            self.worker.tell_failed(answer.request, answer.attempt, cause)

    def _forget(self, request: RequestId, older_than: int) -> None:
        answer = self.answers.get(request)
        if answer is not None and answer.attempt < older_than:
            self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        self.by_lease.pop(answer.lease_id, None)
        if self.answers.get(answer.request) is answer:
            del self.answers[answer.request]
