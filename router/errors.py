"""The boundary to callers: every failed call gets a status and an ErrorDetail, and nothing else gets out.

An interceptor wraps the handlers of Headrace's own services. It turns a `Rejection` into its status with the
detail in the trailing metadata, a message that cannot be parsed into INVALID_ARGUMENT, and an error that
nobody foresaw into INTERNAL with a reference that is in the log too. The log gets the error's type and
where it happened; its text might quote a prompt, and stays out.
"""

from __future__ import annotations

import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Code, Failure, Rejection, Stage, invalid

ERROR_DETAIL_KEY = "headrace-error-bin"
OWN_SERVICES = "/headrace.v1."

logger = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


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


async def abort(context: Context, rejection: Rejection) -> None:
    """Ends a call with the rejection's status and detail."""
    failure = rejection.failure
    detail = error_detail(failure, rejection.request_id, rejection.attempt)
    trailer = ((ERROR_DETAIL_KEY, detail.SerializeToString()),)
    await context.abort(grpc.StatusCode[failure.code], failure.message, trailer)


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


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps unary-request handlers of Headrace's services; leaves those of others alone."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler, guarded where it is one of ours."""
        handler = await continuation(handler_call_details)
        is_own = handler_call_details.method.startswith(OWN_SERVICES)
        if handler is None or handler.request_streaming or not is_own:
            return handler
        make: Any = grpc.unary_unary_rpc_method_handler
        handle: Any = handler.unary_unary
        if handler.response_streaming:
            make, handle = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        guarded: Handler = make(
            _guarded(handle), _tolerant(handler.request_deserializer), handler.response_serializer
        )
        return guarded


def _tolerant(deserialize: Any) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unparsable()

    return parse


def _guarded(handle: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await _answered(handle, request, context)
        except grpc.aio.InternalError:
            # The transport's own: a write fails only where the call is over, and nobody is left to be told.
            logger.debug("a write met a call that is over")

    return guarded


async def _answered(handle: Callable[[Any, Context], Awaitable[Any]], request: Any, context: Context) -> Any:
    try:
        if isinstance(request, _Unparsable):
            raise invalid("UNPARSABLE", "the message is damaged or holds text that is not UTF-8")
        return await handle(request, context)
    except Rejection as rejection:
        await abort(context, rejection)
    except grpc.aio.BaseError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: a defect must not reach the caller as it is
        await abort(context, defect(error))


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
