"""What the router makes of an attempt that failed, and what the request's caller is told."""

from dataclasses import replace
from enum import StrEnum

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Code, Failure, Stage
from router.core.lifecycle import RequestState
from router.core.placement import Wait

MAX_MESSAGE_CHARS = 500
NO_WORKERS_RETRY_S = 1.0

_NO_ROOM = frozenset({"NO_CAPACITY", "NOT_SERVING"})
_LEAVING = frozenset({"DRAINED", "NOT_SERVING"})
_OUTDATED = frozenset({"STALE_ATTEMPT", "LEASE_CLOSED", "CANCELLED"})
_TAKEN_OVER = frozenset({"TAKEN_OVER", "SUPERSEDED"})
"""A lease is superseded by a later attempt of the same request; of the present one, by another router's."""
_CODES = {
    "DEADLINE_EXCEEDED": Code.DEADLINE_EXCEEDED,
    "INVALID_TASK": Code.INVALID_ARGUMENT,
    "NO_CAPACITY": Code.RESOURCE_EXHAUSTED,
}


class Verdict(StrEnum):
    """What becomes of the request."""

    NO_ROOM = "NO_ROOM"  # the reservation was refused: back to the queue
    OUTDATED = "OUTDATED"  # the worker knows a later attempt of that name: place it with a higher number
    TAKEN_OVER = "TAKEN_OVER"  # another router goes on with it
    MOVE = "MOVE"  # the worker is leaving: elsewhere, and nobody's fault
    RECOVER = "RECOVER"  # another attempt may do better
    FAIL = "FAIL"


def verdict_on(error: pb.ErrorDetail, state: RequestState) -> Verdict:
    """By the failure's cause, and by how far the request has come."""
    if state is RequestState.PLACED and error.cause in _NO_ROOM:
        return Verdict.NO_ROOM
    if error.cause in _TAKEN_OVER:
        return Verdict.TAKEN_OVER
    if error.cause in _LEAVING:
        return Verdict.MOVE
    if error.cause in _OUTDATED:
        return Verdict.OUTDATED
    return Verdict.RECOVER if error.retryable else Verdict.FAIL


def failure_of(error: pb.ErrorDetail, stage: Stage) -> Failure:
    """What the client would be told; `stage` is used where the worker named none that exists."""
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


def worker_lost(worker_id: str, stage: Stage, reason: str) -> Failure:
    """A worker is gone, and with it an attempt."""
    return Failure(
        code=Code.UNAVAILABLE,
        stage=stage,
        cause="WORKER_LOST",
        message=f"worker {worker_id!r} was lost: {reason}",
        retryable=True,
    )


def too_large(wait: Wait) -> Failure:
    """No worker could ever take the request."""
    return Failure(code=Code.INVALID_ARGUMENT, stage=Stage.QUEUE, cause=wait.cause, message=wait.reason)


def no_workers(wait: Wait) -> Failure:
    """Nobody is there to take the request."""
    return Failure(
        code=Code.UNAVAILABLE,
        stage=Stage.QUEUE,
        cause=wait.cause,
        message=wait.reason,
        retryable=True,
        retry_after_s=NO_WORKERS_RETRY_S,
    )


def taken_over() -> Failure:
    """Another router goes on with the request. Mostly nobody listens here any more; but that router may not know that
    its client has gone on to this one, so whoever does listen asks again, and is then the later of the two."""
    return Failure(
        code=Code.UNAVAILABLE,
        stage=Stage.DECODE,
        cause="TAKEN_OVER",
        message="another router goes on with this request; ask again, with the resume handle",
        retryable=True,
    )


def given_up(failure: Failure, why: str) -> Failure:
    """An attempt's failure as the request's last one."""
    return replace(failure, message=f"{failure.message}; not tried again: {why}")
