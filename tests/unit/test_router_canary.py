"""Newcomers are tried with those that they will work with, and get nothing before a block has moved."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.v1 import inference_pb2, worker_pb2
from router.core.canary import CANARY_TENANT, Canaries
from router.core.fleet import Identity, Role, WorkerFacts, WorkerRef

pytestmark = pytest.mark.unit

IDENTITY = Identity(weights_digest="w", tokenizer_digest="t", arithmetic="a", layout="l", handoff_major=1)
OTHER = Identity(weights_digest="x", tokenizer_digest="t", arithmetic="a", layout="l", handoff_major=1)


def facts(worker_id: str, role: Role, identity: Identity = IDENTITY) -> WorkerFacts:
    return WorkerFacts(
        ref=WorkerRef(worker_id, 1),
        role=role,
        identity=identity,
        block_tokens=64,
        num_blocks=8,
        max_sequences=4,
        max_context=512,
    )


P, D = facts("p", Role.PREFILL), facts("d", Role.DECODE)


def canaries(timeout_s: float = 10.0) -> Canaries:
    return Canaries(timeout_s, Random(0))


def reserved(reserve: worker_pb2.Reserve) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(reserved=worker_pb2.Reserved(key=reserve.key, lease_id=b"lease"))


def finished(key: worker_pb2.RequestKey) -> worker_pb2.WorkerMessage:
    output = worker_pb2.ChoiceOutput(key=key, finished=inference_pb2.ChoiceFinished(num_tokens=2))
    return worker_pb2.WorkerMessage(step=worker_pb2.StepOutput(outputs=[output]))


def failed(key: worker_pb2.RequestKey, cause: str) -> worker_pb2.WorkerMessage:
    error = inference_pb2.ErrorDetail(cause=cause, message="so it was")
    return worker_pb2.WorkerMessage(failed=worker_pb2.AttemptFailed(key=key, error=error))


@pytest.mark.parametrize("newcomer", [P, D])
def test_a_block_travels_from_prefill_to_decode_before_a_newcomer_is_ready(newcomer: WorkerFacts) -> None:
    trials, partner = canaries(), D if newcomer is P else P
    ((to, message),) = trials.joined(newcomer, 300, [partner], 0.0)
    assert to == D.ref
    assert len(message.reserve.task.prompt_token_ids) == 65
    assert message.reserve.key.tenant == CANARY_TENANT
    assert not message.reserve.local_prefill
    ((to, start),) = trials.take(D.ref, reserved(message.reserve), 1.0)
    assert to == P.ref
    assert start.start_prefill.lease.lease_id == b"lease"
    assert (start.start_prefill.task, start.start_prefill.remaining_s) == (message.reserve.task, 9.0)
    assert not trials.is_ready(newcomer.ref) and trials.let_in() == []
    ((to, seen),) = trials.take(D.ref, finished(message.reserve.key), 2.0)
    assert (to, seen.acknowledge.seen[0].next_index) == (D.ref, 2)
    assert trials.is_ready(newcomer.ref) and not trials.is_busy
    assert trials.let_in() == [newcomer.ref] and trials.let_in() == []


def test_a_trial_may_be_as_lossy_as_requests() -> None:
    trials = Canaries(10.0, Random(0), fidelity="near")
    ((_, message),) = trials.joined(P, 300, [D], 0.0)
    assert message.reserve.task.fidelity == "near"


@pytest.mark.parametrize(
    "others",
    [
        [],
        [facts("d2", Role.DECODE)],
        [facts("p2", Role.PREFILL, OTHER)],
    ],
)
def test_whoever_has_nobody_to_be_tried_with_is_ready_at_once(others: list[WorkerFacts]) -> None:
    trials = canaries()
    assert trials.joined(D, 300, others, 0.0) == []
    assert trials.let_in() == [D.ref]


def test_without_a_timeout_nobody_is_tried() -> None:
    trials = canaries(timeout_s=0.0)
    assert trials.joined(D, 300, [P], 0.0) == []
    assert trials.is_ready(D.ref)


def test_what_fails_is_told_and_tried_again_ever_more_rarely() -> None:
    trials = canaries()
    ((_, message),) = trials.joined(P, 300, [D], 0.0)
    cancels = trials.take(D.ref, failed(message.reserve.key, "PEER_UNAVAILABLE"), 0.0)
    assert {ref for ref, _ in cancels} == {P.ref, D.ref}
    assert all(each.HasField("cancel") for _, each in cancels)
    assert "'d': PEER_UNAVAILABLE" in trials.problem(P.ref)
    starts, now = [], 0.0
    while len(starts) < 4:
        now += 0.25
        for _, each in trials.due(now):
            if each.HasField("reserve"):
                starts.append(now)
                trials.take(D.ref, failed(each.reserve.key, "PEER_UNAVAILABLE"), now)
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses == sorted(pauses) and pauses[-1] >= 4 * starts[0]
    assert not trials.is_ready(P.ref)


def test_silence_is_a_failure_and_the_next_partner_has_its_turn() -> None:
    trials, second = canaries(), facts("d2", Role.DECODE)
    ((first_to, first),) = trials.joined(P, 300, [D, second], 0.0)
    assert trials.due(9.0) == []
    outgoing = trials.due(10.0)
    assert [each.HasField("cancel") for _, each in outgoing] == [True, True, False]
    to, message = outgoing[-1]
    assert {first_to, to} == {D.ref, second.ref}
    assert "nothing came within 10 s" in trials.problem(P.ref)
    # What the first one says now is not heard, and its lease is given back.
    ((ref, late),) = trials.take(first_to, reserved(first.reserve), 11.0)
    assert (ref, late.cancel.key) == (first_to, first.reserve.key)
    trials.take(to, finished(message.reserve.key), 12.0)
    assert trials.is_ready(P.ref)


def test_a_partner_without_room_says_nothing_and_does_not_keep_a_newcomer_out() -> None:
    trials = canaries()
    ((_, message),) = trials.joined(P, 300, [D], 0.0)
    trials.take(D.ref, failed(message.reserve.key, "NO_CAPACITY"), 0.0)
    assert trials.is_ready(P.ref)
    assert trials.problem(P.ref) == ""


def test_when_its_only_partner_leaves_a_newcomer_is_ready() -> None:
    trials = canaries()
    trials.joined(P, 300, [D], 0.0)
    trials.left(D.ref)
    assert trials.let_in() == [P.ref] and not trials.is_busy


def test_requests_are_none_of_its_business() -> None:
    trials = canaries()
    ((_, message),) = trials.joined(P, 300, [D], 0.0)
    key = worker_pb2.RequestKey(tenant="t", request_id=message.reserve.key.request_id, attempt=1)
    assert trials.take(D.ref, reserved(worker_pb2.Reserve(key=key)), 0.0) == []
    assert trials.take(D.ref, finished(key), 0.0) == []
    assert trials.take(D.ref, failed(key, "ENGINE_FAILED"), 0.0) == []
    assert not trials.is_ready(P.ref) and trials.is_busy


@given(data=st.data())
def test_in_the_end_everybody_is_ready_who_can_move_a_block(data: st.DataObject) -> None:
    """Links that work and links that do not; partners come and go. Nothing stays behind of those that left."""
    trials, now = canaries(), 0.0
    members: dict[str, WorkerFacts] = {}
    works: dict[frozenset[str], bool] = {}
    for number in range(data.draw(st.integers(1, 6))):
        role = data.draw(st.sampled_from(list(Role)))
        newcomer = facts(f"w{number}", role)
        for other in members:
            works[frozenset((other, f"w{number}"))] = data.draw(st.booleans())
        outgoing = trials.joined(newcomer, 300, list(members.values()), now)
        members[f"w{number}"] = newcomer
        if data.draw(st.booleans()) and len(members) > 1:
            gone = data.draw(st.sampled_from(sorted(members)))
            trials.left(members.pop(gone).ref)
        for _ in range(200):
            pending, outgoing = outgoing, []
            for ref, message in pending:
                outgoing += _answer(trials, ref, message, works, now)
            now += 0.5
            outgoing += trials.due(now)
    for worker_id, worker in members.items():
        earlier = [o for o in members.values() if o.ref.worker_id < worker_id and o.role is not worker.role]
        if any(works[frozenset((worker_id, other.ref.worker_id))] for other in earlier):
            assert trials.is_ready(worker.ref)


def _answer(trials, ref, message, works, now):
    """Workers answer at once: the decode worker finishes when its link to the prefill worker works."""
    if message.HasField("reserve"):
        return trials.take(ref, reserved(message.reserve), now)
    if message.HasField("start_prefill"):
        key = message.start_prefill.key
        newcomer = trials._trials.get(key.request_id)
        if newcomer is None or newcomer.trial is None:
            return []
        trial = newcomer.trial
        if works.get(frozenset((trial.prefill.worker_id, trial.decode.worker_id)), False):
            return trials.take(trial.decode, finished(key), now)
        return trials.take(trial.prefill, failed(key, "RECEIVER_STALLED"), now)
    return []
