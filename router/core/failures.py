"""How a request fails: a status code, the stage it failed in, a stable cause and a sentence for people.

Knows no transport: the codes carry gRPC's names because those are the contract's, and the front door maps
them one to one.
"""

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """The status codes that the router answers with, by gRPC's names."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"


class Stage(StrEnum):
    """Where in a request's life a failure happened."""

    ADMISSION = "admission"
    QUEUE = "queue"
    RESERVE = "reserve"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    HANDOFF = "handoff"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request ended without an answer.

    `cause` is UPPER_SNAKE and stable; `message` is for people and holds no prompt text. `retryable`: the
    same request may succeed later, elsewhere or unchanged. `retry_after_s` is 0 where there is nothing to
    wait for.
    """

    code: Code
    stage: Stage
    cause: str
    message: str
    retryable: bool = False
    retry_after_s: float = 0.0


class Rejection(Exception):
    """Raised where a call cannot go on; carries the failure that its caller is told."""

    def __init__(self, failure: Failure, request_id: str = "", attempt: int = 0) -> None:
        super().__init__(f"{failure.cause}: {failure.message}")
        self.failure = failure
        self.request_id = request_id
        self.attempt = attempt


def invalid(cause: str, message: str) -> Rejection:
    """A rejection of something the caller wrote: it will fail again unless it is changed."""
    return Rejection(Failure(code=Code.INVALID_ARGUMENT, stage=Stage.ADMISSION, cause=cause, message=message))
