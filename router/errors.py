"""The boundary to callers: every failed call gets a status and an ErrorDetail, and nothing else gets out.

A guard wraps the handlers of Headrace's own services. It turns a `Rejection` into its status with the
detail in the trailing metadata, a message that cannot be parsed into INVALID_ARGUMENT, and an error that
nobody foresaw into INTERNAL with a reference that is in the log too. The log gets the error's type and
where it happened; its text might quote a prompt, and stays out.
"""

from __future__ import annotations

import inspect
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Code, Failure, Rejection, Stage, invalid
from rpc.call import ServerCall
from rpc.details import failed
from rpc.heads import Status
from rpc.server import Handler

OWN_SERVICES = "/headrace.v1."

logger = logging.getLogger(__name__)


def error_detail(failure: Failure, request_id: str = "", attempt: int = 0) -> pb.ErrorDetail:
    """A failure as the contract has it."""
    return pb.ErrorDetail(
        request_id=request_id,
        stage=failure.stage,
        cause=failure.cause,
        message=failure.message,
        retryable=failure.retryable,
        retry_after_s=failure.retry_after_s,
        attempt=attempt,
    )


def status_of(rejection: Rejection) -> Status:
    """How a call ends that is rejected."""
    failure = rejection.failure
    detail = error_detail(failure, rejection.request_id, rejection.attempt)
    return failed(grpc.StatusCode[failure.code], detail)


def unknown_request(request_id: str) -> Rejection:
    """A call asks for a request that is not in the book."""
    failure = Failure(
        code=Code.NOT_FOUND,
        stage=Stage.ADMISSION,
        cause="REQUEST_UNKNOWN",
        message="there is no request of that id, running or finished lately",
    )
    return Rejection(failure, request_id)


@dataclass(frozen=True, slots=True)
class _Unparsable:
    """Stands where a request should be; the handler never sees it."""


def guarded(path: str, handler: Handler) -> Handler:
    """An `rpc.server.Guard`: wraps unary-request handlers of Headrace's services; leaves those of others alone."""
    if handler.request_streaming or not path.startswith(OWN_SERVICES):
        return handler
    make: Any = grpc.unary_unary_rpc_method_handler
    handle: Any = handler.unary_unary
    if handler.response_streaming:
        make, handle = grpc.unary_stream_rpc_method_handler, handler.unary_stream
    guard = _guarded if inspect.iscoroutinefunction(handle) else _guarded_push
    found: Handler = make(guard(handle), _tolerant(handler.request_deserializer), handler.response_serializer)
    return found


def _tolerant(deserialize: Any) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unparsable()

    return parse


def _guarded(handle: Callable[[Any, ServerCall], Awaitable[Any]]) -> Callable[[Any, ServerCall], Any]:
    async def guarded_handle(request: Any, call: ServerCall) -> Any:
        try:
            _check_parsed(request)
            return await handle(request, call)
        except Exception as error:  # noqa: BLE001 - the boundary
            return end_with(call, error)

    return guarded_handle


def _guarded_push(handle: Callable[[Any, ServerCall], None]) -> Callable[[Any, ServerCall], None]:
    def guarded_handle(request: Any, call: ServerCall) -> None:
        try:
            _check_parsed(request)
            handle(request, call)
        except Exception as error:  # noqa: BLE001 - the boundary
            end_with(call, error)

    return guarded_handle


def _check_parsed(request: Any) -> None:
    if isinstance(request, _Unparsable):
        raise invalid("UNPARSABLE", "the message is damaged or holds text that is not UTF-8")


def end_with(call: ServerCall, error: Exception) -> None:
    """Ends a call that an error came out of: a defect must not reach the caller as it is."""
    call.end(status_of(error if isinstance(error, Rejection) else defect(error)))


def defect(error: Exception) -> Rejection:
    """What the caller is told of an error that nobody foresaw; logs it under a reference."""
    reference = secrets.token_hex(6)
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("internal error %s: %s\n%s", reference, type(error).__name__, frames)
    return Rejection(
        Failure(
            code=Code.INTERNAL,
            stage=Stage.ADMISSION,
            cause="INTERNAL",
            message=f"internal error; its reference in the router's log is {reference}",
        )
    )
