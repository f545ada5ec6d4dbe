"""The client SDK of Headrace.

    from headrace import Client

    with Client("127.0.0.1:8460") as client:
        for text in client.generate("Once upon a time", max_tokens=64):
            ...

Everything public is named here; modules whose name begins with an underscore may change at any time.
`headrace.v1` holds the generated protocol, for those who speak it themselves.
"""

from headrace._async_client import AsyncAnswer, AsyncClient
from headrace._client import Answer, Client
from headrace._errors import (
    AlreadyExists,
    AnswerIncomplete,
    Cancelled,
    DeadlineExceeded,
    HeadraceError,
    InternalError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RequestFailed,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from headrace._requests import AnswerOptions
from headrace._retry import RetryPolicy
from headrace._types import (
    Choice,
    Delta,
    FinishReason,
    Message,
    Model,
    RequestInfo,
    RequestState,
    Timing,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "AlreadyExists",
    "Answer",
    "AnswerIncomplete",
    "AnswerOptions",
    "AsyncAnswer",
    "AsyncClient",
    "Cancelled",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "FinishReason",
    "HeadraceError",
    "InternalError",
    "InvalidRequest",
    "Message",
    "Model",
    "NotFound",
    "PermissionDenied",
    "RequestFailed",
    "RequestInfo",
    "RequestState",
    "ResourceExhausted",
    "RetryPolicy",
    "Timing",
    "TokenLogprob",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
