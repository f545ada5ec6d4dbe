"""Who may speak to a worker or a store: holders of the cluster secret.

Every call carries the token of cluster_token.py. Health checks and reflection are open: a supervisor has no secret,
and reflection listens on loopback only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from kvtransfer.cluster_token import ClusterTokenCheck

_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
REFUSAL = "this call needs the cluster's secret: metadata 'headrace-cluster' is missing or wrong"


def is_open(method: str) -> bool:
    """Whether anybody may call `/service/method`."""
    return method.startswith(_OPEN_SERVICES)


class ClusterTokenInterceptor(grpc.ServerInterceptor):
    """Refuses calls without the cluster's token with UNAUTHENTICATED, on a threaded server."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._check = ClusterTokenCheck(cluster_secret)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Pass the call on, or answer it with a refusal."""
        handler = continuation(handler_call_details)
        if handler is None or is_open(handler_call_details.method):
            return handler
        if self._check.admits(handler_call_details.invocation_metadata):
            return handler

        def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)

        return _same_shape(handler, refuse)


def _same_shape(handler: grpc.RpcMethodHandler[Any, Any], behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """`behavior` as a handler of the same cardinality, which gRPC looks at before it calls."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    shaped: grpc.RpcMethodHandler[Any, Any] = make(
        behavior, handler.request_deserializer, handler.response_serializer
    )
    return shaped
