"""What the router makes of a worker's AttemptFailed."""

from enum import StrEnum

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Code, Failure, Stage
from router.core.lifecycle import RequestState

MAX_MESSAGE_CHARS = 500

_NO_ROOM = frozenset({"NO_CAPACITY", "NOT_SERVING"})
_OUTDATED = frozenset({"STALE_ATTEMPT", "LEASE_CLOSED", "CANCELLED"})
_CODES = {
    "DEADLINE_EXCEEDED": Code.DEADLINE_EXCEEDED,
    "INVALID_TASK": Code.INVALID_ARGUMENT,
    "NO_CAPACITY": Code.RESOURCE_EXHAUSTED,
}


class Verdict(StrEnum):
    """What becomes of the request."""

    NO_ROOM = "NO_ROOM"  # the reservation was refused: back to the queue
    OUTDATED = "OUTDATED"  # the worker knows a later attempt of that name: place it with a higher number
    FAIL = "FAIL"


def verdict_on(error: pb.ErrorDetail, state: RequestState, has_tokens: bool) -> Verdict:
    """By the failure's cause, and by how far the request has come."""
    if state is RequestState.PLACED and error.cause in _NO_ROOM:
        return Verdict.NO_ROOM
    if error.cause in _OUTDATED and not has_tokens:
        return Verdict.OUTDATED
    return Verdict.FAIL


def failure_of(error: pb.ErrorDetail, stage: Stage) -> Failure:
    """The failure that the client is told; `stage` is used where the worker named none that exists."""
    cause = error.cause or "WORKER_FAILED"
    default = Code.UNAVAILABLE if error.retryable else Code.INTERNAL
    return Failure(
        code=_CODES.get(cause, default),
        stage=Stage(error.stage) if error.stage in set(Stage) else stage,
        cause=cause,
        message=error.message[:MAX_MESSAGE_CHARS] or "the worker gave no reason",
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
    )
