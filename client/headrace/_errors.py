"""What can go wrong, as a tree of exceptions. Knows neither gRPC nor protobuf.

    HeadraceError                      any failure of a call; catch this to catch them all
    ├── InvalidRequest   (ValueError)      the request itself is wrong: mend it, then send it again
    ├── Unauthenticated                    no API key, or one that nobody knows
    ├── PermissionDenied                   a good API key without the right to do this
    ├── NotFound                           no such request or model
    ├── AlreadyExists                      this request id was used with another body
    ├── ResourceExhausted                  queue or quota is full: wait `retry_after_s`
    ├── DeadlineExceeded (TimeoutError)    the time given was not enough; `stage` says where it went
    ├── Cancelled                          ended by a Cancel, or because the client was closed
    ├── Unavailable      (ConnectionError) the router, or a worker it needs, cannot be reached
    ├── RequestFailed                      accepted, then failed in the cluster: see `stage` and `cause`
    ├── InternalError                      a defect of the cluster or of this SDK: please report it
    └── AnswerIncomplete (RuntimeError)    an answer was asked for what has not been read

gRPC status → class:

    INVALID_ARGUMENT, OUT_OF_RANGE             InvalidRequest
    UNAUTHENTICATED                            Unauthenticated
    PERMISSION_DENIED                          PermissionDenied
    NOT_FOUND                                  NotFound
    ALREADY_EXISTS                             AlreadyExists
    RESOURCE_EXHAUSTED                         ResourceExhausted
    DEADLINE_EXCEEDED                          DeadlineExceeded
    CANCELLED                                  Cancelled
    UNAVAILABLE                                Unavailable
    ABORTED, FAILED_PRECONDITION, DATA_LOSS    RequestFailed
    INTERNAL, UNKNOWN, UNIMPLEMENTED, others   InternalError
"""

from collections.abc import Mapping
from types import MappingProxyType

# The `stage` of an error that was found on this side of the wire.
CLIENT_STAGE = "client"


class HeadraceError(Exception):
    """A call that failed.

    Attributes:
        message: what went wrong, for people.
        request_id: the request's id; empty where there is none.
        stage: where: admission, queue, reserve, prefill, transfer, handoff or decode in the
            cluster, `client` on this side; empty where it is not known.
        cause: why, as a stable word in UPPER_SNAKE case.
        code: name of the gRPC status, for example `UNAVAILABLE`; empty where there was no call.
        retryable: the same request may succeed later.
        retry_after_s: seconds to wait before that; 0 where the cluster did not say.
        attempt: which placement of the request failed, from 1; 0 where none was made.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        stage: str = "",
        cause: str = "",
        code: str = "",
        retryable: bool = False,
        retry_after_s: float = 0.0,
        attempt: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.stage = stage
        self.cause = cause
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.attempt = attempt

    def __str__(self) -> str:
        facts = [
            f"{name} {value}"
            for name, value in (("stage", self.stage), ("cause", self.cause), ("request", self.request_id))
            if value
        ]
        if self.retryable:
            facts.append(f"retry after {self.retry_after_s:g} s" if self.retry_after_s else "retryable")
        return f"{self.message} [{', '.join(facts)}]" if facts else self.message


class InvalidRequest(HeadraceError, ValueError):
    """The request is wrong and will be refused again until it is changed."""


class Unauthenticated(HeadraceError):
    """The API key is missing or unknown."""


class PermissionDenied(HeadraceError):
    """The API key does not allow this."""


class NotFound(HeadraceError):
    """The request id or the model is not known."""


class AlreadyExists(HeadraceError):
    """The request id was used before with another body."""


class ResourceExhausted(HeadraceError):
    """A queue or a quota is full; `retry_after_s` says how long to wait."""


class DeadlineExceeded(HeadraceError, TimeoutError):
    """The answer was not complete in the time given."""


class Cancelled(HeadraceError):
    """The request was cancelled, by a Cancel call or because its client was closed."""


class Unavailable(HeadraceError, ConnectionError):
    """The router, or a worker that the request needs, cannot be reached now."""


class RequestFailed(HeadraceError):
    """The request was accepted and then failed in the cluster."""


class InternalError(HeadraceError):
    """A defect of the cluster or of this SDK."""


class AnswerIncomplete(HeadraceError, RuntimeError):
    """An answer was asked for something that has not been read, or never will be."""


ERROR_CLASSES: Mapping[str, type[HeadraceError]] = MappingProxyType(
    {
        "INVALID_ARGUMENT": InvalidRequest,
        "OUT_OF_RANGE": InvalidRequest,
        "UNAUTHENTICATED": Unauthenticated,
        "PERMISSION_DENIED": PermissionDenied,
        "NOT_FOUND": NotFound,
        "ALREADY_EXISTS": AlreadyExists,
        "RESOURCE_EXHAUSTED": ResourceExhausted,
        "DEADLINE_EXCEEDED": DeadlineExceeded,
        "CANCELLED": Cancelled,
        "UNAVAILABLE": Unavailable,
        "ABORTED": RequestFailed,
        "FAILED_PRECONDITION": RequestFailed,
        "DATA_LOSS": RequestFailed,
    }
)


def error_class(code: str) -> type[HeadraceError]:
    """The class for the name of a gRPC status."""
    return ERROR_CLASSES.get(code, InternalError)


def bad_argument(message: str) -> InvalidRequest:
    """The error for an argument that cannot even be sent."""
    return InvalidRequest(message, stage=CLIENT_STAGE, cause="BAD_ARGUMENT")
