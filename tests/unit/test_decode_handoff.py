"""A handoff record is the lease's request's and of a worker of the same kind, or nothing of it is taken."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from decode.request import Request, check_handoff
from engine.drafter import DraftState
from headrace.v1 import kvtransfer_pb2, worker_pb2
from kvtransfer.transports.seam import HandoffRefused
from worker.facts import identity_digest
from worker.service import WorkerContext
from worker.wire import drafting_from_wire, drafting_to_wire

pytestmark = pytest.mark.unit

IDENTITY = worker_pb2.Identity(weights_digest="w", tokenizer_digest="t", arithmetic="a", layout="l")
CONTEXT = cast(WorkerContext, SimpleNamespace(identity=IDENTITY))
KEY = worker_pb2.RequestKey(tenant="t", request_id="r", attempt=1)
REQUEST = cast(
    Request,
    SimpleNamespace(key=KEY, head=[1, 2, 3, 4], num_prompt=4, sampling=SimpleNamespace(n=1)),
)


def record(**changes: Any) -> kvtransfer_pb2.Handoff:
    fields = {
        "key": KEY,
        "num_tokens": 4,
        "first_tokens": [kvtransfer_pb2.FirstToken(token_id=9)],
        "penalty_boundary": 4,
        "identity": identity_digest(IDENTITY),
        "drafting": drafting_to_wire(DraftState(3, 1.5, 0.5)),
    }
    return kvtransfer_pb2.Handoff(**{**fields, **changes})


@pytest.mark.parametrize("state", [DraftState(), DraftState(0, 2.0, 1.0), DraftState(3, 1e-3, 7.5)])
def test_what_a_drafter_knows_travels(state: DraftState) -> None:
    handoff = record(drafting=drafting_to_wire(state))
    assert drafting_from_wire(kvtransfer_pb2.Handoff.FromString(handoff.SerializeToString())) == state
    check_handoff(REQUEST, handoff, CONTEXT)


def test_a_record_without_it_is_taken() -> None:
    handoff = record(drafting=None)
    assert drafting_from_wire(handoff) is None
    check_handoff(REQUEST, handoff, CONTEXT)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"identity": "other"}, "IDENTITY_MISMATCH"),
        ({"key": worker_pb2.RequestKey(tenant="t", request_id="r", attempt=2)}, "HANDOFF_MISMATCH"),
        ({"num_tokens": 5}, "HANDOFF_MISMATCH"),
        ({"first_tokens": []}, "HANDOFF_MISMATCH"),
        ({"penalty_boundary": 3}, "HANDOFF_MISMATCH"),
        ({"drafting": kvtransfer_pb2.Drafting(follows=4, hits=1, misses=1)}, "HANDOFF_MISMATCH"),
        ({"drafting": kvtransfer_pb2.Drafting(hits=0, misses=1)}, "HANDOFF_MISMATCH"),
        ({"drafting": kvtransfer_pb2.Drafting(hits=1, misses=math.nan)}, "HANDOFF_MISMATCH"),
        ({"drafting": kvtransfer_pb2.Drafting(hits=-math.inf, misses=1)}, "HANDOFF_MISMATCH"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(HandoffRefused) as refused:
        check_handoff(REQUEST, record(**changes), CONTEXT)
    assert refused.value.cause == cause
